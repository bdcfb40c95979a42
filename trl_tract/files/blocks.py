"""Work in numbered blocks that outlives its process: one journal for each worker, one directory for each run.

A finished block is one line of its worker's journal, flushed to the disk. Killed at any instant and started again,
with any number of workers, a run goes on with the blocks that no journal holds. Knows nothing of rationales, scores or
models.
"""

import json
import logging
import os
import queue
import re
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trl_tract.files.journal import guard
from trl_tract.text.progress import progress

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Report = Callable[[int], None]
Work = Callable[[range, Report], list[Record]]

_LINE_START = re.compile(rb'\{"block": (\d+), "records": \[')
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Shard:
    """Which of the blocks a worker does.

    Attributes:
        index: Number of the worker, from 0.
        count: Workers there are.
        helps: Whether it goes on with the blocks of slower workers when its own are done, and waits for the last of
            them. So do the processes of one launcher; the jobs of an array end when their share is done.
    """

    index: int = 0
    count: int = 1
    helps: bool = False

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `i/n`, i from 1 to n, as on the command line.

        Raises:
            ValueError: It is not of that form.

        Example:
            >>> Shard.parse("2/8")
            Shard(index=1, count=8, helps=False)
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"shard {text!r} is not i/n with i from 1 to n, such as 1/8 for the first of eight jobs")
        return cls(int(found[1]) - 1, int(found[2]))

    @classmethod
    def from_launcher(cls) -> "Shard":
        """This process among those that `torchrun` or `accelerate launch` started; without them, the only one."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(int(os.environ.get("RANK", "0")), count, helps=count > 1)

    def owns(self, block: int) -> bool:
        """Whether the block is in this worker's share."""
        return block % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"


class BlockLog:
    """The finished blocks of a run, in the journals of all its workers.

    Args:
        directory: Holds one run; `blocks/` in it has the journals.
        settings: Whatever changes the results; a directory with other settings is refused. The number of workers is
            not among them.
        what: Names the run in messages, such as `self-distillation`.
        rows: Rows of the run, in blocks of `block_size`.
        block_size: Rows that are worked on together; a block is on disk whole or not at all.
        shard: This worker.

    Raises:
        FileExistsError: The directory holds another run, or files that are not of a run.
        RuntimeError: Another process is at work in the directory.
        ValueError: A journal was damaged in its middle.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        what: str,
        *,
        rows: int,
        block_size: int,
        shard: Shard | None = None,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be 1 or more")
        self.shard = shard or Shard.from_launcher()
        self.what = what
        self.rows = rows
        self.block_size = block_size
        self.directory = directory
        guard(directory, {**settings, "rows": rows, "block_size": block_size}, what)
        self._folder = directory / "blocks"
        self._folder.mkdir(exist_ok=True)
        self._path = self._folder / f"worker-{self.shard.index + 1}-of-{self.shard.count}.jsonl"
        self._lock = self._claim()
        self._journals: list[Path] = []
        self._scanned: dict[Path, int] = {}  # bytes of each journal that are known
        blocks = -(-rows // block_size)
        self._journal_of = array("i", [-1]) * blocks
        self._offset_of = array("q", [0]) * blocks
        self._handed_out = bytearray(blocks)
        self.finished_rows = 0
        self.refresh()
        self._cut_torn_line()

    def __len__(self) -> int:
        return len(self._journal_of)

    @property
    def complete(self) -> bool:
        """Whether every block is on disk, as far as was seen."""
        return self.finished_rows == self.rows

    def rows_of(self, block: int) -> range:
        """Row numbers of a block."""
        return range(block * self.block_size, min((block + 1) * self.block_size, self.rows))

    def refresh(self) -> None:
        """Look for blocks that other workers have finished."""
        for path in sorted(self._folder.glob("worker-*.jsonl")):
            if path not in self._scanned:
                self._journals.append(path)
                self._scanned[path] = 0
            if path.stat().st_size > self._scanned[path]:
                self._scan(path)

    def append(self, block: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Write a finished block and wait until it is on disk.

        Raises:
            OSError: It could not be written, for example since the disk is full. What was complete before stays.
        """
        # ASCII escapes: control characters and line separators in model text then stay inside their line.
        line = json.dumps({"block": block, "records": list(records)}).encode("ascii") + b"\n"
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self._path.exists():
                os.truncate(self._path, size)
            raise self._kept(error, self._path) from error
        self.refresh()

    def records(self) -> Iterator[Record]:
        """The records of all blocks in order, from disk, one block in memory at a time.

        Raises:
            RuntimeError: A block is missing.
            ValueError: A block cannot be read.
        """
        files = [path.open("rb") for path in self._journals]
        try:
            for block in range(len(self)):
                journal = self._journal_of[block]
                if journal < 0:
                    raise RuntimeError(f"block {block} of {self.directory} is not finished: start the run again")
                files[journal].seek(self._offset_of[block])
                try:
                    yield from json.loads(files[journal].readline())["records"]
                except ValueError as error:
                    raise ValueError(_damaged(self._journals[journal], f"block {block}")) from error
        finally:
            for file in files:
                file.close()

    def run(
        self,
        work: Work,
        final: Path,
        write: Callable[[Iterator[Record]], None],
        *,
        max_calls: int = 1,
        cancel: Callable[[], None] | None = None,
    ) -> bool:
        """Do this worker's blocks and, when all blocks are there, write the final file.

        Args:
            work: Makes the records of a range of rows; told of a function to report finished rows to. It is called
                from `max_calls` threads.
            final: What `write` writes, whole or not at all; where it exists the run is over.
            write: Given all records in order. Of several workers, one is asked to.
            max_calls: Blocks that are worked on at once.
            cancel: Ends the calls under way, after Ctrl-C.

        Returns:
            Whether `final` is there. False after a share of an array of jobs whose other shares are not done.
        """
        try:
            if not final.exists():
                self._work(work, max_calls)
                self._write(final, write)
        except KeyboardInterrupt:
            if cancel is not None:
                cancel()
            logger.warning(
                "%s stopped with %d of %d rows on disk in %s. Start the same again to go on from there",
                self.what,
                self.finished_rows,
                self.rows,
                self.directory,
            )
            raise
        finally:
            self._lock.release()
        return final.exists()

    def _work(self, work: Work, max_calls: int) -> None:
        hidden = self.shard.helps and self.shard.index > 0  # one bar for a launcher's processes
        with progress(total=self.rows, initial=self.finished_rows, desc=self.what, unit="row", hidden=hidden) as shown:

            def report(rows: int) -> None:
                if max_calls == 1:
                    shown.update(rows)

            def do(block: int) -> list[Record]:
                return work(self.rows_of(block), report)

            for block, records in _in_threads(do, self._to_do(), max_calls):
                self.append(block, records)
                shown.n = self.finished_rows
                shown.refresh()

    def _write(self, final: Path, write: Callable[[Iterator[Record]], None]) -> None:
        self.refresh()
        while self.shard.helps and not ((self.complete and self.shard.index == 0) or final.exists()):
            time.sleep(_POLL_SECONDS)
            self.refresh()
        if self.complete:
            with FileLock(self._folder / "final.lock"):  # two jobs of an array may end at once
                if not final.exists():
                    for left_by_a_kill in final.parent.glob(f"{final.name}.*.partial"):
                        left_by_a_kill.unlink()
                    try:
                        write(self.records())
                    except OSError as error:
                        raise self._kept(error, final) from error
        elif not final.exists():
            logger.warning(
                "shard %s is done; %d of %d rows are on disk in %s. The shard that ends last writes %s",
                self.shard,
                self.finished_rows,
                self.rows,
                self.directory,
                final.name,
            )

    def _kept(self, error: OSError, path: Path) -> OSError:
        return OSError(
            error.errno,
            f"{error.strerror} with {self.finished_rows} of {self.rows} rows done. They are kept: mend the cause and "
            "start the same again, it goes on from there",
            str(path),
        )

    def _to_do(self) -> Iterator[int]:
        mine = (block for block in range(len(self)) if self.shard.owns(block))
        yield from filter(self._take, mine)
        if self.shard.helps:
            left = [block for block in range(len(self)) if self._journal_of[block] < 0]
            # Each helper starts elsewhere, and at the far end of what the owner has before it.
            first = len(left) * self.shard.index // self.shard.count
            yield from filter(self._take, reversed(left[first:] + left[:first]))

    def _take(self, block: int) -> bool:
        """Whether the block is still to be done; it then counts as handed out."""
        if self.shard.count > 1:
            self.refresh()
        if self._journal_of[block] >= 0 or self._handed_out[block]:
            return False
        self._handed_out[block] = 1
        return True

    def _claim(self) -> Any:
        """Lock this worker's journal; refuse to work beside a run with another number of workers."""
        busy = (
            f"another process is at work in {self.directory}. Wait until it ends, or stop it: two runs would do the "
            "same rows twice"
        )
        lock = FileLock(self._path.with_suffix(".lock"), blocking=False)
        try:
            lock.acquire()
            for other in self._folder.glob("worker-*.lock"):
                if not other.name.endswith(f"-of-{self.shard.count}.lock"):
                    with FileLock(other, blocking=False):
                        pass
        except Timeout as error:
            raise RuntimeError(busy) from error
        return lock

    def _scan(self, path: Path) -> None:
        """Note the whole lines that were added to a journal."""
        journal, offset = self._journals.index(path), self._scanned[path]
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                start = _LINE_START.match(line)
                if not line.endswith(b"]}\n") or start is None:
                    if line.endswith(b"\n") and file.read(1):
                        raise ValueError(_damaged(path, f"byte {offset}"))
                    break  # being written, or cut short when its process ended
                block = int(start[1])
                if block < len(self) and self._journal_of[block] < 0:
                    self._journal_of[block], self._offset_of[block] = journal, offset
                    self.finished_rows += len(self.rows_of(block))
                offset += len(line)
        self._scanned[path] = offset

    def _cut_torn_line(self) -> None:
        known = self._scanned.get(self._path, 0)
        if self._path.exists() and self._path.stat().st_size > known:
            os.truncate(self._path, known)


def _damaged(path: Path, where: str) -> str:
    return (
        f"{path}: {where} is damaged, as after a failure of the disk. Move this file away and start the same again: "
        "its blocks are made anew"
    )


def _in_threads(
    do: Callable[[int], list[Record]], blocks: Iterator[int], max_calls: int
) -> Iterator[tuple[int, list[Record]]]:
    """Blocks and their records as they are finished, `max_calls` at a time.

    After an error no block is begun, those under way are finished, and the error is raised.
    """
    if max_calls == 1:
        yield from ((block, do(block)) for block in blocks)
        return
    done: queue.Queue[tuple[int, list[Record] | BaseException]] = queue.Queue()

    def run(block: int) -> None:
        try:
            done.put((block, do(block)))
        except BaseException as error:
            done.put((block, error))

    running, failure = 0, None
    while True:
        while failure is None and running < max_calls and (block := next(blocks, None)) is not None:
            # Daemons, not an executor's threads: after Ctrl-C the interpreter must not wait for a server's answers.
            threading.Thread(target=run, args=(block,), daemon=True).start()
            running += 1
        if not running:
            break
        block, result = done.get()
        running -= 1
        if isinstance(result, BaseException):
            failure = failure or result
        else:
            yield block, result
    if failure is not None:
        raise failure
