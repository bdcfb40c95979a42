"""Work in numbered blocks that outlives its process: one file for each block, one directory for each run.

A block is finished when its file is there and whole: its first line is a checksum over all that follows, its second has
the block's number and the digests of its rows, its third the records. Killed at any instant and started again, with any
number of workers, a run goes on with the blocks that are not finished; one whose rows have changed since is done anew.
Knows nothing of rationales, scores or models.
"""

import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trl_tract.files.calls import in_threads
from trl_tract.files.journal import KnownRows, guard, sync_directory, whole_file
from trl_tract.files.seal import OTHER_ROWS, seal_result, wrong_with_result
from trl_tract.files.shards import Shard
from trl_tract.text.progress import progress

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Report = Callable[[int], None]
Work = Callable[[list[Any], int, Report], list[Record]]

_POLL_SECONDS = 0.2
_WRITERS = 4


class _NotWhole(Exception):
    """A block's file that is missing, damaged, or of other rows."""


class BlockLog:
    """The finished blocks of a run, and the result that is made of them.

    Args:
        directory: Holds one run; `blocks/` in it has the blocks.
        settings: Whatever changes the results; a directory with other settings is refused. The number of workers is
            not among them.
        what: Names the run in messages, such as `self-distillation`.
        rows: Rows of the run, in blocks of `block_size`.
        block_size: Rows that are worked on together; a block is on disk whole or not at all.
        shard: This worker.

    Attributes:
        finished: Whether the result is there, whole, and of these rows.

    Raises:
        FileExistsError: The directory holds another run, the results of other rows, or files that are not of a run.
        RuntimeError: Another process is at work in the directory.
        ValueError: Its settings are damaged.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        what: str,
        *,
        rows: KnownRows,
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
        guard(directory, {**settings, "block_size": block_size}, what)
        self._folder = directory / "blocks"
        self._folder.mkdir(exist_ok=True)
        sync_directory(directory)
        self._worker = f"worker-{self.shard.index + 1}-of-{self.shard.count}"
        self._lock = self._claim()
        self._sweep()
        blocks = -(-len(rows) // block_size)
        self._done = bytearray(blocks)
        self._handed_out = bytearray(blocks)
        self.finished_rows = 0
        wrong = self._wrong()
        self.finished = wrong is None
        if not self.finished:
            self._look_at_all(wrong == OTHER_ROWS)
        if wrong:
            logger.warning("%s: %s; rebuilding the result from the blocks", directory, wrong)

    def __len__(self) -> int:
        return len(self._done)

    @property
    def complete(self) -> bool:
        """Whether every block is on disk, as far as was seen."""
        return self.finished_rows == len(self.rows)

    def rows_of(self, block: int) -> range:
        """Row numbers of a block."""
        return range(block * self.block_size, min((block + 1) * self.block_size, len(self.rows)))

    def append(self, block: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Write a finished block and wait until it is on disk.

        Raises:
            OSError: It could not be written, for example since the disk is full. What was complete before stays.
        """
        # ASCII escapes: control characters and line separators in model text then stay inside their line.
        head = {"block": block, "rows": [self.rows.digest_of(number) for number in self.rows_of(block)]}
        body = f"{json.dumps(head)}\n{json.dumps(list(records))}\n".encode("ascii")
        path = self._path(block)
        with whole_file(path, path.with_suffix(f".{self._worker}.partial")) as file:
            file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)

    def records(self) -> Iterator[Record]:
        """The records of all blocks in order, from disk, one block in memory at a time.

        Raises:
            _NotWhole: A block is missing or damaged; it then counts as still to be done.
        """
        for block in range(len(self)):
            try:
                _, records = self._read(block)
            except _NotWhole:
                self._handed_out[block] = 0
                if self._done[block]:
                    self._done[block] = 0
                    self.finished_rows -= len(self.rows_of(block))
                raise
            yield from json.loads(records)

    def run(
        self,
        work: Work,
        write: Callable[[Iterator[Record]], None],
        result: Sequence[str],
        *,
        max_calls: int = 1,
        cancel: Callable[[], None] | None = None,
    ) -> bool:
        """Do this worker's blocks and, when all blocks are there, write the result.

        Args:
            work: Makes the records of some rows, the first of which has the given number; told of a function to report
                finished rows to. It is called from `max_calls` threads.
            write: Writes the result. Given all records in order. Of several workers, one is asked to.
            result: Names of the files that it writes into the directory.
            max_calls: Blocks that are worked on at once.
            cancel: Ends the calls under way, after Ctrl-C.

        Returns:
            Whether the result is there. False after a share of an array of jobs whose other shares are not done.

        Raises:
            RuntimeError: The rows were changed meanwhile.
        """
        try:
            while not self.finished:
                self._work(work, max_calls)
                try:
                    self._write(write, result)
                    break
                except _NotWhole as error:
                    logger.warning("%s: rebuilt", error)
        except KeyboardInterrupt:
            if cancel is not None:
                cancel()
            logger.warning(
                "%s stopped with %d of %d rows on disk in %s. Run the same command again to continue",
                self.what,
                self.finished_rows,
                len(self.rows),
                self.directory,
            )
            raise
        finally:
            self._lock.release()
        return self.finished

    def _work(self, work: Work, max_calls: int) -> None:
        hidden = self.shard.helps and self.shard.index > 0  # one bar for a launcher's processes
        done, rows = self.finished_rows, len(self.rows)
        # Several at once: the disk is waited for while the next block is worked on, and syncs at one time are one.
        with (
            ThreadPoolExecutor(_WRITERS) as writers,
            progress(total=rows, initial=done, desc=self.what, unit="row", hidden=hidden) as shown,
        ):

            def report(count: int) -> None:
                if max_calls == 1:
                    shown.update(count)

            def do(block: int) -> list[Record]:
                numbers = self.rows_of(block)
                return work([self.rows[number] for number in numbers], numbers.start, report)

            def note(block: int, writing: Future[None]) -> None:
                try:
                    writing.result()
                except OSError as error:
                    raise self._kept(error, self._path(block)) from error
                self._note(block)
                if self.shard.count > 1:
                    self._refresh()
                shown.n = max(shown.n, self.finished_rows)  # rows of the next block are told of already
                shown.refresh()

            under_way: deque[tuple[int, Future[None]]] = deque()
            try:
                for block, records in in_threads(do, self._to_do(), max_calls):
                    under_way.append((block, writers.submit(self.append, block, records)))
                    while under_way and (len(under_way) > _WRITERS or under_way[0][1].done()):
                        note(*under_way.popleft())
            finally:
                while under_way:
                    note(*under_way.popleft())

    def _write(self, write: Callable[[Iterator[Record]], None], result: Sequence[str]) -> None:
        self._refresh()
        while self.shard.helps and not (self.complete and self.shard.index == 0) and self._wrong() is not None:
            time.sleep(_POLL_SECONDS)
            self._refresh()
        self.rows.check()
        if self.complete:
            with FileLock(self._folder / "final.lock"):  # two jobs of an array may end at once
                if self._wrong() is not None:
                    try:
                        write(self.records())
                        seal_result(self.directory, self.rows, result)
                    except OSError as error:
                        raise self._kept(error, self.directory / result[0]) from error
                self._sweep()
        self.finished = self._wrong() is None
        if not self.finished:
            logger.warning(
                "shard %s is done; %d of %d rows are on disk in %s. The shard that finishes last writes %s",
                self.shard,
                self.finished_rows,
                len(self.rows),
                self.directory,
                result[0],
            )

    def _wrong(self) -> str | None:
        return wrong_with_result(self.directory, self.rows.digest)

    def _kept(self, error: OSError, path: Path) -> OSError:
        kept = "They are kept. Fix the cause and run the same command again; it continues from there"
        if not self._folder.is_dir():
            kept = (
                "But their directory was deleted in the meantime. Run the same command again; it starts from the "
                "beginning"
            )
        rows = f"{self.finished_rows} of {len(self.rows)} rows done"
        return OSError(error.errno, f"{error.strerror} with {rows}. {kept}", str(path))

    def _to_do(self) -> Iterator[int]:
        yield from filter(self._take, range(self.shard.index, len(self), self.shard.count))
        if self.shard.helps:
            left = [block for block in range(len(self)) if not self._done[block]]
            # Each helper starts elsewhere, and at the far end of what the owner has before it.
            first = len(left) * self.shard.index // self.shard.count
            yield from filter(self._take, reversed(left[first:] + left[:first]))

    def _take(self, block: int) -> bool:
        """Whether the block is still to be done; it then counts as handed out."""
        if self.shard.count > 1 and not self._done[block]:
            self._look(block)
        if self._done[block] or self._handed_out[block]:
            return False
        self._handed_out[block] = 1
        return True

    def _claim(self) -> Any:
        """Lock this worker's share; refuse to work beside a run with another number of workers."""
        lock = FileLock(self._folder / f"{self._worker}.lock", blocking=False)
        try:
            lock.acquire()
            for other in self._folder.glob("worker-*.lock"):
                if not other.name.endswith(f"-of-{self.shard.count}.lock"):
                    with FileLock(other, blocking=False):
                        pass
        except Timeout as error:
            raise RuntimeError(
                f"another process is working in {self.directory}. Wait until it ends, or stop it; two runs would "
                "process the same rows twice"
            ) from error
        return lock

    def _sweep(self) -> None:
        """Delete what killed workers left of blocks that they were writing."""
        for partial in self._folder.glob("*.partial"):
            worker = partial.name.split(".")[1]
            lock = FileLock(self._folder / f"{worker}.lock", blocking=False)
            with suppress(Timeout), nullcontext() if worker == self._worker else lock:  # who has its lock is alive
                partial.unlink(missing_ok=True)

    def _path(self, block: int) -> Path:
        return self._folder / f"{block:06d}.jsonl"

    def _blocks_there(self) -> list[int]:
        names = (entry.name.removesuffix(".jsonl") for entry in os.scandir(self._folder))
        return sorted(block for name in names if name.isdigit() and (block := int(name)) < len(self))

    def _read(self, block: int) -> tuple[list[str], bytes]:
        """The digests of a block's rows, and its records as JSON."""
        path = self._path(block)
        try:
            checksum, body = path.read_bytes().split(b"\n", 1)
            head, records = body.split(b"\n", 1)
            named = json.loads(head)
        except (FileNotFoundError, ValueError) as error:
            raise _NotWhole(f"{path} is missing or damaged") from error
        if checksum != hashlib.sha256(body).hexdigest().encode() or named["block"] != block:
            raise _NotWhole(f"{path} is damaged")
        return named["rows"], records

    def _look(self, block: int) -> list[int] | None:
        """Note a block that is finished; otherwise the numbers of its rows that are as they were, if it is whole."""
        try:
            rows, _ = self._read(block)
        except _NotWhole:
            return None
        same = [
            number for number, row in zip(self.rows_of(block), rows, strict=False) if row == self.rows.digest_of(number)
        ]
        if len(same) == len(rows) == len(self.rows_of(block)):
            self._note(block)
        return same

    def _note(self, block: int) -> None:
        if not self._done[block]:
            self._done[block] = 1
            self.finished_rows += len(self.rows_of(block))

    def _refresh(self) -> None:
        """Look for blocks that other workers have finished."""
        for block in self._blocks_there():
            if not self._done[block]:
                self._look(block)

    def _look_at_all(self, other_rows: bool) -> None:
        """Find the finished blocks; those that are damaged, or whose rows have changed, are deleted and named."""
        seen = {block: self._look(block) for block in self._blocks_there()}
        damaged = [block for block, same in seen.items() if same is None]
        changed = [block for block, same in seen.items() if same is not None and not self._done[block]]
        if not any(seen.values()) and (other_rows or sum(len(self.rows_of(block)) for block in changed) > 1):
            raise FileExistsError(
                f"{self.directory} holds the {self.what} of other rows: no finished row matches the row at the same "
                "position in the current data. Choose another output directory, or use the original rows"
            )
        for blocks, why in ((damaged, "damaged"), (changed, "of rows that have changed since")):
            if blocks:
                logger.warning(
                    "%s: %d blocks are %s and are generated again, the first for rows %d to %d",
                    self.directory,
                    len(blocks),
                    why,
                    self.rows_of(blocks[0])[0],
                    self.rows_of(blocks[0])[-1],
                )
            for block in blocks:
                self._path(block).unlink(missing_ok=True)
