"""Progress that can be read in a log file: where nobody watches a terminal, a line every so often instead of a bar.

Knows nothing of what progresses.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm.auto import tqdm

SECONDS = 30.0
"""Seconds between two lines of a log file."""


def is_watched() -> bool:
    """Whether someone looks at a bar that moves: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class ProgressLines:
    """A bar's stand-in that writes whole lines, at most one in `mininterval` seconds, and one at the end.

    Args:
        unit: What is counted, in the singular.
        initial: How much was done before.
        mininterval: Seconds between two lines.
        patient: Write nothing before `mininterval` seconds have passed: of short work not a line.
    """

    def __init__(
        self,
        *,
        total: int,
        desc: str,
        unit: str,
        initial: int = 0,
        file: TextIO | None = None,
        mininterval: float = SECONDS,
        disable: bool = False,
        patient: bool = False,
    ) -> None:
        self.n, self.total, self.desc, self.unit = initial, total, desc, unit
        self._initial, self._file, self._mininterval, self._disable = initial, file or sys.stderr, mininterval, disable
        self._started = time.monotonic()
        self._written_at, self._written_n = self._started, initial
        self._has_written = not patient
        if not patient:
            self._write()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Count `n` more."""
        self.n += n
        self.refresh()

    def refresh(self) -> None:
        """Write a line, unless the last one is not long past."""
        if time.monotonic() - self._written_at >= self._mininterval:
            self._write()

    def close(self) -> None:
        """Write the last line, unless it stands there, or there was none before."""
        if self._has_written and self._written_n != self.n:
            self._write()

    def _write(self) -> None:
        if self._disable:
            return
        self._written_at, self._written_n, self._has_written = time.monotonic(), self.n, True
        elapsed, done = self._written_at - self._started, self.n - self._initial
        speed = ", {rate_fmt}, {elapsed} so far, {remaining} left" if done else ""  # unknown before anything is done
        line = tqdm.format_meter(
            self.n,
            self.total,
            elapsed,
            prefix=self.desc,
            unit=self.unit,
            rate=done / elapsed if done and elapsed else None,
            bar_format=f"{{desc}}: {{n_fmt}} of {{total_fmt}} {self.unit}s ({{percentage:.0f}}%){speed}",
        )
        print(line, file=self._file, flush=True)


def progress(*, total: int, desc: str, unit: str, initial: int = 0, hidden: bool = False, patient: bool = False) -> Any:
    """A bar where someone watches it, lines elsewhere; `patient`: lines of long work alone."""
    # Never None, with which tqdm is silent wherever it writes to a file.
    settings: dict[str, Any] = {"total": total, "desc": desc, "unit": unit, "initial": initial, "disable": hidden}
    return tqdm(**settings) if is_watched() else ProgressLines(**settings, patient=patient)


class Passes:
    """Progress of items that are gone through several times, told of as whole items.

    Args:
        report: Told how many more items are done.

    Example:
        >>> passes = Passes(print, items=3, passes=2)
        >>> passes.add(3)
        1
        >>> passes.finish()
        2
    """

    def __init__(self, report: Callable[[int], None], items: int, passes: int) -> None:
        self._report, self._items, self._passes = report, items, passes
        self._gone, self._told = 0.0, 0

    def add(self, items: float) -> None:
        """Some items have been gone through once more."""
        self._gone += items
        self._tell(min(self._items, int(self._gone / self._passes + 1e-9)))

    def finish(self) -> None:
        """Tell of those that are left."""
        self._tell(self._items)

    def _tell(self, done: int) -> None:
        if done > self._told:
            done, self._told = done - self._told, done
            self._report(done)


def hide_bars_of_libraries() -> None:
    """Where nobody watches, keep the carriage returns of other libraries' short bars out of the log.

    Has an effect on libraries that are imported afterwards, and on processes that are started; a user's own setting
    stands.
    """
    if not is_watched():
        for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
