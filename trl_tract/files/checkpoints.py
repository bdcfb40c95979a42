"""Which checkpoint a killed run can go on from. Knows nothing of what is in it."""

import json
import re
from pathlib import Path

STATE_FILE = "trainer_state.json"


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end; None if there is none.

    A run that is killed while it saves leaves a directory that looks like a checkpoint. The trainer's state is written
    last, so a checkpoint is complete if that file can be read.
    """
    directory = Path(output_dir)
    found = [
        (int(name.group(1)), path)
        for path in (directory.iterdir() if directory.is_dir() else [])
        if (name := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return next((path for _, path in sorted(found, reverse=True) if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state
