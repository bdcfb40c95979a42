"""Which checkpoint a killed run can go on from, and what it was made of. Knows nothing of what is in it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_tract.files.fingerprint import file_digests
from trl_tract.files.journal import read_json, write_json

STATE_FILE = "trainer_state.json"
_SEAL = "finished.json"


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end and is as it was then; None if there is none.

    A run that is killed while it saves leaves a directory that looks like a checkpoint. The trainer's state is written
    last, so a checkpoint is complete if that file can be read; one that was sealed has to match its seal.
    """
    directory = Path(output_dir)
    found = [
        (int(name.group(1)), path)
        for path in (directory.iterdir() if directory.is_dir() else [])
        if (name := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return next((path for _, path in sorted(found, reverse=True) if _is_complete(path)), None)


def seal_checkpoint(checkpoint: Path, made_of: Mapping[str, Any]) -> None:
    """Write down a digest of each file of a checkpoint, and what it was made of."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name != _SEAL)
    digests = {path.name: digest for path, digest in file_digests(files).items()}
    write_json(checkpoint / _SEAL, {"made_of": made_of, "files": digests}, checked=True)


def checkpoint_made_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint was made of; empty where it was not sealed."""
    seal = checkpoint / _SEAL
    return dict(read_json(seal)["made_of"]) if seal.exists() else {}


def _is_complete(checkpoint: Path) -> bool:
    try:
        if "global_step" not in read_json(checkpoint / STATE_FILE):
            return False
        if not (checkpoint / _SEAL).exists():
            return True
        files = read_json(checkpoint / _SEAL)["files"]
        return file_digests([checkpoint / name for name in files]) == {checkpoint / name: files[name] for name in files}
    except (OSError, ValueError, KeyError, TypeError):
        return False
