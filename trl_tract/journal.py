"""An append-only JSONL file that survives being killed, and a guard that one directory holds one run.

Knows nothing of rationales, scores or models.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSONL, whole or not at all; how many there were."""
    partial = path.with_name(path.name + ".partial")
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            # ASCII escapes: control characters and line separators in model text then stay inside their line.
            file.write(json.dumps(row) + "\n")
            count += 1
    os.replace(partial, path)
    return count


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, one at a time.

    Raises:
        ValueError: A line is not a JSON object; it is named.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not JSON ({error}). Each line has to be one object"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: {type(row).__name__} instead of an object")
            yield row


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
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "settings.json"
    wanted = json.loads(json.dumps(settings))
    if not file.exists():
        strangers = sorted(entry.name for entry in directory.iterdir())
        if strangers:
            raise FileExistsError(
                f"{directory} already holds {', '.join(strangers[:5])}, which is not of a {what} that can be "
                "continued. Choose an empty output directory"
            )
        write_json(file, wanted)
        return
    held = json.loads(file.read_text(encoding="utf-8"))
    changed = [name for name in {**held, **wanted} if held.get(name) != wanted.get(name)]
    if changed:
        differences = "; ".join(f"{name}: {held.get(name)!r} there, {wanted.get(name)!r} now" for name in changed[:5])
        raise FileExistsError(
            f"{directory} holds another {what} ({differences}). Choose another output directory, or go on with the "
            "settings that it was started with"
        )


class Journal:
    """Records appended a block at a time, each block on disk before the next one is made.

    Args:
        path: The JSONL file; continued if it exists.
        block: Records that belong together. What was written of an unfinished block is taken back when the journal is
            opened, so a run that was killed makes that block again, from the same seed, with the same result.
    """

    def __init__(self, path: Path, block: int) -> None:
        self.path = path
        self.records = 0
        if path.exists():
            self._repair(block)

    def _repair(self, block: int) -> None:
        ends = [0]
        with self.path.open("rb") as file:
            for line in file:
                # A line without its newline was being written when the run ended.
                if line.endswith(b"\n"):
                    ends.append(ends[-1] + len(line))
        self.records = (len(ends) - 1) // block * block
        os.truncate(self.path, ends[self.records])

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write a block and wait until it is on disk.

        Raises:
            OSError: It could not be written, for example since the disk is full. What was complete before stays.
        """
        lines = [json.dumps(record) + "\n" for record in records]
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror} after {self.records} records. They are kept: mend the cause and start the same "
                "command again, it goes on from there",
                str(self.path),
            ) from error
        self.records += len(lines)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return read_jsonl(self.path) if self.path.exists() else iter(())
