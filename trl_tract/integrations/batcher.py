"""Items of many callers, judged together. Knows a judge and threads; knows nothing of HTTP."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from trl_tract.judge.judge import CoTRAILJudge, Judgement


class QueueFull(Exception):
    """There is no room for more items now."""


class Closed(Exception):
    """No more items are taken."""


class Batcher:
    """One judge for many callers: what arrives while it is at work is judged together next.

    An item's judgement does not depend on what it is judged with. Where a batch fails, its items are judged one by one,
    so that an error stays with the item that it comes from.

    Args:
        judge: The judge. It is called from as many threads as its backend takes calls at once.
        linger: Seconds that an idle judge waits for one more item; while they keep coming, it waits on.
    """

    def __init__(
        self,
        judge: CoTRAILJudge,
        *,
        max_batch: int = 32,
        max_queue: int = 256,
        linger: float = 0.005,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        for name, count in (("max_batch", max_batch), ("max_queue", max_queue)):
            if count < 1:
                raise ValueError(f"{name}={count} must be 1 or more")
        self.judge = judge
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.linger = linger
        self._on_batch = on_batch or (lambda count: None)
        self._waiting: deque[tuple[Any, int | None, Future[Judgement]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        # Daemons: an interpreter that is told to stop at once does not wait for a batch.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(judge.backend.max_calls)]
        for thread in self._threads:
            thread.start()

    def submit(self, rows: Sequence[Any], seeds: Sequence[int | None]) -> list[Future[Judgement]]:
        """Put items into the queue, all of them or none. A future that is cancelled before its turn is passed over.

        Args:
            rows: As `CoTRAILJudge.judge` takes them.
            seeds: Of each item; None: the judge's.

        Raises:
            QueueFull: There is no room for all of them.
            Closed: `close` was called.
        """
        with self._changed:
            if self._closing:
                raise Closed
            if len(self._waiting) + len(rows) > self.max_queue:
                self._waiting = deque(item for item in self._waiting if not item[2].cancelled())
                if len(self._waiting) + len(rows) > self.max_queue:
                    raise QueueFull
            futures: list[Future[Judgement]] = [Future() for _ in rows]
            self._waiting.extend(zip(rows, seeds, futures, strict=True))
            self._changed.notify()
        return futures

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether items are being taken and judged."""
        return not self._closing and all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Take no more items, judge those that wait, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            rows, seeds, futures = zip(*batch, strict=True)
            self._on_batch(len(rows))
            for future, outcome in zip(futures, self._judged(rows, seeds), strict=True):
                if isinstance(outcome, Judgement):
                    future.set_result(outcome)
                else:
                    future.set_exception(outcome)

    def _next_batch(self) -> list[tuple[Any, int, Future[Judgement]]]:
        """The next items, at least one; none at the end."""
        batch: list[tuple[Any, int, Future[Judgement]]] = []
        while not batch:
            with self._changed:
                while not self._waiting:
                    if self._closing:
                        return []
                    self._changed.wait()
                # Callers who were answered together ask again one after the other, and half a batch costs as much.
                seen = 0
                while seen < len(self._waiting) < self.max_batch and not self._closing:
                    seen = len(self._waiting)
                    self._changed.wait(self.linger)
                while self._waiting and len(batch) < self.max_batch:
                    row, seed, future = self._waiting.popleft()
                    if future.set_running_or_notify_cancel():
                        batch.append((row, self.judge.seed if seed is None else seed, future))
        return batch

    def _judged(self, rows: Sequence[Any], seeds: Sequence[int]) -> list[Judgement | BaseException]:
        try:
            return list(self.judge.judge(rows, seed=list(seeds), on_progress=lambda count: None))
        except BaseException as error:
            if len(rows) == 1:
                return [error]
            return [self._judged([row], [seed])[0] for row, seed in zip(rows, seeds, strict=True)]
