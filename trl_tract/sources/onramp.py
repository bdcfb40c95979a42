"""Whatever `--data` names -> the JSONL file that a step reads. Knows nothing of what steps do with it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_tract.backends.loading import load_tokenizer
from trl_tract.files.journal import write_jsonl
from trl_tract.rows.row import Row
from trl_tract.scale.scales import Scales
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.files import first_record, read_records
from trl_tract.sources.preferences import is_pair
from trl_tract.sources.schemas import Item, judged_rows, load_items, written_rows

_READY = {"prompt", "messages", "conversations", "input_ids"}


@contextmanager
def as_jsonl(source: str, model: str, scales: Scales, own: OwnColumns | None, *, judged: bool = False) -> Iterator[str]:
    """A JSONL file of `source`'s rows: itself, if a step can read it, or a temporary one, gone afterwards.

    Args:
        source: File or hub id.
        model: Whose chat template decides whether prompts that were written here become chat messages.
        scales: How the rows write their scores.
        own: The user's rubric and column names.
        judged: Rows to judge instead of rows to train on.

    Raises:
        FileNotFoundError, ValueError: See `schemas.load_items`.
    """
    first = first_record(source)
    if first is None:
        raise ValueError(f"{source} holds no rows")
    if own is None and Path(source).suffix == ".jsonl" and not is_pair(first) and _READY & first.keys():
        yield source
        return
    chat = bool(load_tokenizer(model).chat_template)
    with tempfile.TemporaryDirectory(prefix="trl-tract-") as folder:
        file = Path(folder) / "rows.jsonl"
        rows = _judged(source, scales, own, chat) if judged else _trained(source, scales, own, chat)
        write_jsonl(file, rows)
        yield str(file)


def _trained(source: str, scales: Scales, own: OwnColumns | None, chat: bool) -> list[Row]:
    rows = written_rows(load_items(source, scales, own, only_trained=True), lambda item: item.training, chat=chat)
    if not rows:
        raise ValueError(f"{source}: none of the rows has a completion (or rationale), so there is none to train on")
    return rows


def _judged(source: str, scales: Scales, own: OwnColumns | None, chat: bool) -> Iterator[Row]:
    for number, record in enumerate(read_records(source)):
        try:
            items: list[Item] = judged_rows(record, scales, own)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"column {error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{source}, row {number}: {reason}") from error
        yield from written_rows(items, lambda item: (item.reference,), chat=chat)
