"""The README beside self-generated rationales on the hub: who wrote them, how, what became of each.

Knows what self-distillation wrote down; knows nothing of models or generation.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from trl_tract import __version__
from trl_tract.text.markdown import code_span, plain_line, python_literal

_TEMPLATE = """\
---
{metadata}
---

# {title}

Training rows for stage two of [TRACT](https://aclanthology.org/2025.acl-long.147): the prompts and gold scores of
annotated judge rows, with rationales that a stage-one judge wrote itself.

```python
from datasets import load_dataset

rows = load_dataset({repo_id}, split="train")
```

## Where the rows come from

- Prompts, gold scores and annotated rationales: {source}
- Self-written rationales: sampled from {model}
- Each self-written rationale ends with the marker {marker} and the annotated score; a score of the model's own was
  never read

| rows | count |
| :-- | --: |
{counts}

| what was wrong with a rationale | rows, after the last attempt | attempts |
| :-- | --: | --: |
{failures}

What became of a row whose every attempt failed: {on_failure}.

## Sampling

{settings}

## Columns

- `prompt`, `completion`, `score` (or `messages`) and the annotated rows' other columns, as they were; the completion is
  new
- `rationale_source`: `self`, or `annotated` where the annotated rationale was kept
- `finish_reason`: `stop`, or why the last attempt failed
- `attempts`: how often the rationale was sampled

## Limits

The rationales argue for a score that was known beforehand, but not to the model that wrote them: a rationale may argue
for another score than its row has. They are a model's text, unread by people.

## Licence

{licence}
"""

_ON_FAILURE = {
    "keep_gold": "its annotated rationale was kept",
    "drop": "it was left out",
    "raise": "the run would have stopped",
}
_SAMPLING = (
    "num_generations",
    "temperature",
    "top_p",
    "repetition_penalty",
    "max_new_tokens",
    "max_attempts",
    "seed",
    "allow_leaks",
    "keep_annotated",
    "backend",
)
_NO_LICENCE = (
    "None is stated. The annotated rows, and the licence of the model that wrote the rationales, may both have a say "
    "in it: state one as `license` in the metadata of this card."
)


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
        summary: What self-distillation counted, from its `summary.json`.
        settings: What it was started with, from its `settings.json`.
        repo_id: Where the rows will be.
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
    counts = {
        "annotated rows": summary["rows"],
        "rationales asked for": summary["rationales"],
        "stage-two rows with a self-written rationale": summary["self_written"],
        "stage-two rows with an annotated rationale": summary["annotated"],
        "rationales sampled more than once": summary["resampled"],
        "rationales that failed and left no row": summary["dropped"],
    }
    last, attempts = summary["failed"], summary["attempts_failed"]
    return _TEMPLATE.format(
        metadata=metadata.to_yaml(),
        title=plain_line(repo_id.split("/")[-1]),
        repo_id=python_literal(repo_id),
        source="not stated" if source is None else code_span(source) if is_hub_id else plain_line(source),
        model=code_span(Path(written_by).name if local else written_by),
        marker=code_span(str(settings["format"]["marker"])),
        counts="\n".join(f"| {name} | {count:,} |" for name, count in counts.items()),
        failures="\n".join(f"| {name} | {last[name]:,} | {attempts[name]:,} |" for name in last),
        on_failure=_ON_FAILURE[settings["on_failure"]],
        settings="\n".join(
            [
                *(f"- `{name}`: {plain_line(str(settings[name]))}" for name in _SAMPLING if name in settings),
                f"- `trl-tract`: {__version__}",
            ]
        ),
        licence=_NO_LICENCE if license is None else plain_line(license),
    )
