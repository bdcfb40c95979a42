"""JSON and JSONL files that are written whole or not at all, rows whose edits are noticed, and a guard of directories.

A file is written beside its place, synced, renamed and its directory synced. Knows nothing of rationales, scores or
models.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from filelock import FileLock

from trl_tract.text.probes import same_answers

CHECKSUM = "sha256"
_LOCK = ".lock"


@contextmanager
def whole_file(path: Path, partial: Path | None = None) -> Iterator[BinaryIO]:
    """A new file to write to, which takes the name `path` once all of it is on disk; on an error nothing is left.

    Args:
        path: What was there is replaced, a link too.
        partial: Where it is written. Of two processes that may write one path at once, each names its own.
    """
    partial = partial or path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # left by a kill
    try:
        with partial.open("xb") as file:  # x: not through a link either
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)  # of a full disk, say


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on disk, where the system can do that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, content: Any, *, checked: bool = False) -> None:
    """Write a JSON file whole or not at all; `checked`: an object, with a checksum that `read_json` looks at."""
    if checked:
        content = json.loads(json.dumps(content, default=str))
        content = {**content, CHECKSUM: digest([content])}
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, without the checksum; one without a checksum is taken as it is.

    Raises:
        ValueError: The file is damaged; it is named.
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} instead of an object")
        if content.pop(CHECKSUM, None) not in (None, digest([content])):
            raise ValueError("it does not match its checksum")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Restore it from a copy, or choose another output directory"
        ) from error
    return content


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSONL, whole or not at all; how many there were."""
    count = 0
    with whole_file(path) as file:
        for row in rows:
            # ASCII escapes: control characters and line separators in model text then stay inside their line.
            file.write(json.dumps(row).encode() + b"\n")
            count += 1
    return count


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


class Rows(Protocol):
    """Rows by number: a `Dataset`, `JsonlRows`, a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...


class KnownRows(Sequence[Any]):
    """Rows that are looked at once at the start, so that an edit is noticed when one is read later.

    Args:
        rows: They; each costs 8 bytes here.
        check: Called with each row and its number, to refuse rows before any work is done.

    Attributes:
        digest: Of all rows, as `digest(rows)`.
    """

    def __init__(self, rows: Rows, check: Callable[[Any, int], object] = lambda row, number: None) -> None:
        self._rows = rows
        self._file = rows.path if isinstance(rows, JsonlRows) else None
        self._stat = self._now()
        self._digests = bytearray()
        whole = hashlib.sha256()
        for number, row in enumerate(rows):
            check(row, number)
            encoded = _encoded(row)
            whole.update(encoded)
            self._digests += hashlib.sha256(encoded).digest()[:8]
        self.digest = whole.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._digests) // 8

    def __getitem__(self, number: Any) -> Any:
        """A row."""
        try:
            row = self._rows[number]
        except (ValueError, IndexError):
            if self._now() == self._stat:
                raise
            raise self._edited(number) from None
        if self._now() != self._stat and hashlib.sha256(_encoded(row)).hexdigest()[:16] != self.digest_of(number):
            raise self._edited(number)
        return row

    def digest_of(self, number: int) -> str:
        """16 hexadecimal digits that tell a row from others."""
        return self._digests[8 * number : 8 * number + 8].hex()

    def check(self) -> None:
        """Look whether the rows' file is still what it was at the start."""
        if self._now() != self._stat and digest(self._rows) != self.digest:
            raise self._edited(None)

    def _now(self) -> tuple[int, ...]:
        if self._file is None:
            return ()
        stat = self._file.stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _edited(self, number: int | None) -> RuntimeError:
        row = "" if number is None else f", row {number}"
        return RuntimeError(
            f"{self._file or 'the rows'}{row}: changed while the rows were being worked on. Run the same command "
            "again: results of unchanged rows are kept, and changed rows are processed again"
        )


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{where}: not JSON ({error}). Each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {type(row).__name__} instead of an object")
    return row


def _encoded(item: Any) -> bytes:
    return json.dumps(item, sort_keys=True, default=str).encode() + b"\0"


def digest(items: Iterable[Any]) -> str:
    """A fingerprint of JSON-serialisable items, order included."""
    state = hashlib.sha256()
    for item in items:
        state.update(_encoded(item))
    return state.hexdigest()[:32]


def seed_of(*parts: Any) -> int:
    """A random seed of 32 bits that depends on all of the parts."""
    return int(digest(parts)[:8], 16)


def is_address(name: str) -> bool:
    """Whether a name is an address, and no path of this machine.

    Example:
        >>> is_address("s3://bucket/rows.jsonl"), is_address("C:/rows.jsonl"), is_address("user/rows")
        (True, False, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+(::.*)?://", name) is not None


def guard(directory: Path, settings: Mapping[str, Any], what: str) -> None:
    """Claim `directory` for a run with these settings, or recognise that it is being continued.

    Args:
        settings: JSON-serialisable; whatever changes the result.

    Raises:
        FileExistsError: The directory holds another run, files that are not of a run, or a link.
        ValueError: It is an address, or its `settings.json` is damaged.
    """
    if is_address(str(directory).replace(":/", "://", 1)):  # a path has no double slash
        raise ValueError(
            f"{directory} is a remote address, but blocks need file locks and atomic renames. Use a directory on this "
            "machine or on a shared file system, and copy the result to the address with --export"
        )
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file. Give a directory for the {what}")
    directory.mkdir(parents=True, exist_ok=True)
    refuse_links(directory)
    file = directory / "settings.json"
    with FileLock(directory / _LOCK):  # of workers that start at once, the first one's settings stand
        if not file.exists():
            strangers = sorted({entry.name for entry in directory.iterdir()} - {_LOCK, f"{file.name}.partial"})
            if strangers:
                raise FileExistsError(
                    f"{directory} already holds {', '.join(strangers[:5])}, which does not belong to a {what} that can "
                    "be continued. Choose an empty output directory"
                )
            write_json(file, settings, checked=True)
    changed = changed_settings(directory, settings)
    if "trl_tract" in settings and "trl_tract" not in read_json(file):
        raise FileExistsError(
            f"{directory} holds a {what} of an earlier version of trl_tract that did not record its inputs, so it "
            "cannot be continued. Choose another output directory, or delete this one to start over"
        )
    if changed:
        raise FileExistsError(
            f"{directory} holds another {what} ({'; '.join(changed[:5])}). Choose another output directory, restore "
            "the original settings, or delete this directory to start over"
        )


def refuse_links(directory: Path) -> None:
    """Look for symbolic links inside an output directory: what is written there must not land elsewhere."""
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            if (link := Path(folder, name)).is_symlink():
                raise FileExistsError(
                    f"{link} is a symbolic link to {os.readlink(link)}, and trl_tract does not write through links "
                    "inside an output directory. Delete the link, or choose another output directory"
                )


def changed_settings(directory: Path, settings: Mapping[str, Any]) -> list[str]:
    """What differs between these settings and those that `directory` was claimed with; empty where nothing does."""
    return differences(read_json(directory / "settings.json"), settings)


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Which settings are others than they were, with both values; those inside settings by names with a dot.

    What is told by its content, a model with a `fingerprint` and files with `contents`, may lie elsewhere now.
    """
    one, other = (_flat(json.loads(json.dumps(each, default=str))) for each in (held, wanted))
    by_content = {*wanted.get("contents", ()), *(("model",) if wanted.get("fingerprint") else ())}
    changed = [name for name in {**one, **other} if not same_answers(one.get(name), other.get(name))]
    return [
        f"{name.removeprefix('fingerprint.')}: {one.get(name)!r} there, {other.get(name)!r} now"
        for name in changed
        if name not in by_content
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
