"""Progress that can be read in a log file: where nobody watches a terminal, a line every so often instead of a bar.

Knows nothing of what progresses.
"""

import os
import sys
import time
from typing import Any

from tqdm.auto import tqdm as automatic
from tqdm.std import tqdm

SECONDS = 30.0
"""Seconds between two lines of a log file."""


def is_watched() -> bool:
    """Whether someone looks at a bar that moves: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class ProgressLines(tqdm):
    """tqdm that writes whole lines, at most one in `mininterval` seconds, and one at the end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("mininterval", SECONDS)
        unit = kwargs.get("unit", "it")
        kwargs["bar_format"] = (
            f"{{desc}}: {{n_fmt}} of {{total_fmt}} {unit}s ({{percentage:.0f}}%), {{rate_fmt}}, {{elapsed}} so far, "
            "{remaining} left"
        )
        kwargs.update(dynamic_ncols=False, ncols=None, position=0)
        self._written, self._written_n, self._ending = 0.0, -1.0, False
        super().__init__(*args, **kwargs)

    @staticmethod
    def status_printer(file: Any) -> Any:
        """Write a line where tqdm would overwrite one."""

        def write(text: str) -> None:
            file.write(f"{text.strip()}\n")
            file.flush()

        return write

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write a line, unless the last one is not long past."""
        now = time.monotonic()
        if not self._ending and self._written and now - self._written < self.mininterval:
            return False
        self._written, self._written_n = now, self.n
        self.sp(str(self) if msg is None else msg)
        return True

    def close(self) -> None:
        """Write the last line, unless it stands there."""
        if not self.disable:
            self._ending = True
            if self._written_n != self.n:
                self.display()
            self.disable: bool = True
            self._decr_instances(self)


def progress(*, total: int, desc: str, unit: str, initial: int = 0, hidden: bool = False) -> Any:
    """A bar where someone watches it, lines elsewhere."""
    kind = automatic if is_watched() else ProgressLines
    # Never None, with which tqdm is silent wherever it writes to a file.
    return kind(total=total, desc=desc, unit=unit, initial=initial, disable=hidden)


def hide_bars_of_libraries() -> None:
    """Where nobody watches, keep the carriage returns of other libraries' short bars out of the log.

    Has an effect on libraries that are imported afterwards, and on processes that are started; a user's own setting
    stands.
    """
    if not is_watched():
        for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
