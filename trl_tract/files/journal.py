"""JSON files that are written whole or not at all, JSONL files of any size, and a guard that a directory holds one run.

Knows nothing of rationales, scores or models.
"""

import hashlib
import json
import os
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = _partial(path)
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSONL, whole or not at all; how many there were."""
    partial = _partial(path)
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                # ASCII escapes: control characters and line separators in model text then stay inside their line.
                file.write(json.dumps(row) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # of a full disk, say
    return count


def _partial(path: Path) -> Path:
    """Where a file is written before it takes its name; another one for each thread of each process."""
    return path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, one at a time.

    Raises:
        ValueError: A line is not a JSON object; it is named.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _object(line, f"{path}, line {number}")


class JsonlRows(Sequence[dict[str, Any]]):
    """The rows of a JSONL file by number, read when they are asked for: a file of any size costs 8 bytes a row.

    Several threads may read at once.

    Args:
        path: One JSON object a line; blank lines are passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets = array("Q")
        offset = 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    self._offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            return _object(file.readline(), f"{self.path}, row {index}")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return read_jsonl(self.path)


def _write_new(path: Path, content: Any) -> None:
    """Write a JSON file whole, unless there is one already."""
    partial = _partial(path)
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        os.link(partial, path)
    finally:
        partial.unlink()


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{where}: not JSON ({error}). Each line has to be one object") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {type(row).__name__} instead of an object")
    return row


def digest(items: Iterable[Any]) -> str:
    """A fingerprint of JSON-serialisable items, order included."""
    state = hashlib.sha256()
    for item in items:
        state.update(json.dumps(item, sort_keys=True, default=str).encode())
        state.update(b"\0")
    return state.hexdigest()[:32]


def guard(directory: Path, settings: Mapping[str, Any], what: str) -> None:
    """Claim `directory` for a run with these settings, or recognise that it is being continued.

    Args:
        directory: Made if it is missing.
        settings: JSON-serialisable; whatever changes the result.
        what: Names the run in errors, such as `self-distillation`.

    Raises:
        FileExistsError: The directory holds another run, or files that are not of a run.
    """
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file: give a directory for the {what}")
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "settings.json"
    wanted = json.loads(json.dumps(settings))
    if not file.exists():
        names = sorted(entry.name for entry in directory.iterdir())
        strangers = [name for name in names if not name.endswith(".partial")]
        if strangers and not file.exists():
            raise FileExistsError(
                f"{directory} already holds {', '.join(strangers[:5])}, which is not of a {what} that can be "
                "continued. Choose an empty output directory"
            )
        # Of the workers that start at once, the first one's settings stand, and the others are compared with them.
        with suppress(FileExistsError):
            _write_new(file, wanted)
    changed = changed_settings(directory, settings)
    if changed:
        differences = "; ".join(changed[:5])
        raise FileExistsError(
            f"{directory} holds another {what} ({differences}). Choose another output directory, or go on with the "
            "settings that it was started with"
        )


def changed_settings(directory: Path, settings: Mapping[str, Any]) -> list[str]:
    """What differs between these settings and those that `directory` was claimed with; empty where nothing does."""
    held = json.loads((directory / "settings.json").read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(settings))
    changed = [name for name in {**held, **wanted} if held.get(name) != wanted.get(name)]
    return [f"{name}: {held.get(name)!r} there, {wanted.get(name)!r} now" for name in changed]
