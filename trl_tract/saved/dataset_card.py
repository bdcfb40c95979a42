"""The README beside self-generated rationales on the hub: who wrote them, how, what became of each.

Knows what self-distillation wrote down; knows nothing of models or generation.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from trl_tract import __version__
from trl_tract.saved.cards import render


def rows_card(
    summary: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    repo_id: str,
    source: str | None = None,
    model: str | None = None,
    license: str | None = None,
) -> str:
    """The card's text.

    Args:
        source: Where the annotated rows come from: a hub id, or words; None: the card says that it is not stated.
        model: Hub id of the model that wrote the rationales; None: what it was started with, of a path the name alone.
        license: For the card's metadata; None states none.
    """
    written_by = model or str(settings["model"])
    local = model is None and (Path(written_by).exists() or written_by.startswith((".", "/", "~")))
    is_hub_id = (
        source is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not Path(source).exists()
    )
    metadata = DatasetCardData(
        license=license,
        tags=["trl", "tract", "llm-as-a-judge", "synthetic"],
        task_categories=["text-generation"],
        source_datasets=[source] if is_hub_id else None,
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "rows.jsonl"}]}],
    )
    return render(
        "dataset_card",
        metadata=metadata.to_yaml(),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        source=source,
        source_on_hub=is_hub_id,
        model=Path(written_by).name if local else written_by,
        markers=[own["marker"] for own in settings.get("aspects", {"": settings.get("format")}).values()],
        summary=summary,
        settings=settings,
        version=__version__,
        license=license,
    )
