"""Text for a terminal or a log file: colour where it is wanted, bars. Knows nothing of rows or models."""

import logging
import os
import re
import warnings
from collections.abc import Mapping
from typing import TextIO

STYLES: Mapping[str, str] = {
    "dim": "2",
    "bold": "1",
    "green": "32",
    "yellow": "33",
    "cyan": "36",
    "red": "31",
    "score": "1;7;35",
}


def uses_colour(stream: TextIO) -> bool:
    """Whether colour is wanted: on a terminal, or with FORCE_COLOR; never with NO_COLOR (https://no-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def paint(text: str, style: str) -> str:
    """`text` in one of `STYLES`, line by line, so that a pager that cuts lines does not bleed.

    Example:
        >>> paint("a", "red")
        '\\x1b[31ma\\x1b[0m'
    """
    return "\n".join(f"\033[{STYLES[style]}m{line}\033[0m" if line else "" for line in text.split("\n"))


def bars(counts: Mapping[str, int], *, width: int = 40, mark: str = "█") -> list[str]:
    """A histogram, a line for each name: its bar and its count.

    Example:
        >>> bars({"1": 1, "10": 4}, width=4, mark="#")
        [' 1 #    1', '10 #### 4']
    """
    highest = max([*counts.values(), 1])
    names, numbers = max(map(len, counts), default=0), max((len(f"{count:,}") for count in counts.values()), default=0)
    lines = []
    for name, count in counts.items():
        length = max(1, round(width * count / highest)) if count else 0  # the least of counts is still seen
        lines.append(f"{name:>{names}} {mark * length:<{width}} {count:>{numbers},}")
    return lines


def as_options(text: str) -> str:
    """Settings in a message as they are typed: those who call a command do not write Python.

    Example:
        >>> as_options("set invalid_rows='drop' to continue")
        'set --invalid_rows drop to continue'
        >>> as_options("write it with to_json(path, orient='records')")
        "write it with to_json(path, orient='records')"
    """
    return re.sub(r"(?<!, )\b([a-z]\w*)=(['\"])([\w.-]+)\2", r"--\1 \3", text)


def hide_host_warnings() -> None:
    """Keep back warnings that are about nothing a user has asked for, and that no user can act on."""
    # SFTConfig sets the old name by default, and PEFT asks the model by it: see pyproject.toml for the versions.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning)
    # Imported, bitsandbytes looks for a faster kernel of 4-bit products on CPUs, where nobody loads in four bits.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def can_write(stream: TextIO, text: str) -> bool:
    """Whether the stream's encoding has the characters of `text`."""
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
