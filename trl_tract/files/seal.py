"""`finished.json`: which rows a result is of, and that its files are as they were written. Knows nothing of blocks."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_tract.files.journal import KnownRows, read_json, write_json

SEAL = "finished.json"
OTHER_ROWS = "the result belongs to other rows"


def seal_result(directory: Path, rows: KnownRows, names: Sequence[str]) -> None:
    """Write down the digest of the rows, and the count of lines and the digest of each file of the result."""
    files = {name: counted(directory / name) for name in names}
    write_json(directory / SEAL, {"rows": len(rows), "rows_digest": rows.digest, "files": files}, checked=True)


def wrong_with_result(directory: Path, rows_digest: str) -> str | None:
    """None where the result is there, whole, and of these rows; else what is wrong, "" if none was finished."""
    if not (directory / SEAL).exists():
        return ""
    try:
        seal = read_json(directory / SEAL)
        changed = [name for name, was in seal["files"].items() if counted(directory / name) != was]
        if seal["rows_digest"] != rows_digest:
            return OTHER_ROWS
    except (ValueError, KeyError, AttributeError):
        return f"{SEAL} is damaged"
    return f"{', '.join(changed)} missing or changed" if changed else None


def check_result(file: Path) -> None:
    """Look whether a file of a result is as it was written, where that is written down."""
    seal = file.with_name(SEAL)
    if seal.exists() and counted(file) != read_json(seal).get("files", {}).get(file.name):
        raise ValueError(
            f"{file} was changed after it was written: its digest in {SEAL} does not match. Run the command that wrote "
            "it again, with the same settings; the file is then rebuilt from the blocks"
        )


def sealed_rows(directory: Path) -> str | None:
    """The digest of the rows that the result in a directory is of; None where that is not written down."""
    seal = directory / SEAL
    return str(read_json(seal)["rows_digest"]) if seal.exists() else None


def contents(files: Mapping[str, str | None]) -> dict[str, str]:
    """Name -> digest of the file that it stands for, of those that are files here; of a directory its chat template."""
    named = {name: Path(file) for name, file in files.items() if file}
    held = ("chat_template.jinja", "tokenizer_config.json")  # where a tokenizer has its template
    named = {
        name: next((file / each for each in held if (file / each).is_file()), file) for name, file in named.items()
    }
    return {name: counted(file)["sha256"][:16] for name, file in named.items() if file.is_file()}


def counted(file: Path) -> dict[str, Any]:
    """Count of lines and digest of a file; empty for one that is missing."""
    if not file.is_file():
        return {}
    lines, state = 0, hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(2**20):
            lines += chunk.count(b"\n")
            state.update(chunk)
    return {"lines": lines, "sha256": state.hexdigest()}
