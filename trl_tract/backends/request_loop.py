"""Requests of many callers, at most so many at once, on one event loop in a thread of its own.

Knows nothing of models: a request is a coroutine.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from queue import SimpleQueue
from typing import Any, TypeVar

_T = TypeVar("_T")


class RequestLoop:
    """Runs requests for any number of threads, first come, first served.

    Args:
        limit: Requests under way at once, of all callers together.
    """

    def __init__(self, limit: int) -> None:
        if not limit > 0:
            raise ValueError(f"max_concurrency={limit} must be above 0")
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(limit)
        self._calls: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._closed = False
        # A daemon: a caller that is interrupted must not wait at exit for what it no longer wants.
        self._thread = threading.Thread(target=self._loop.run_forever, name="trl-tract requests", daemon=True)
        self._thread.start()

    def run(
        self, requests: Sequence[Callable[[], Awaitable[_T]]], on_arrival: Callable[[int, _T], None] | None = None
    ) -> list[_T]:
        """Make all of `requests`, and return their results in order.

        The first failure cancels the others and is raised. So does an interrupt (Ctrl-C): it reaches the caller at
        once, whatever the requests are doing.

        Args:
            on_arrival: Called in the caller's thread with number and result of each request as it is finished.

        Raises:
            RuntimeError: `cancel` or `close` was called meanwhile, or `close` before.
        """
        arrivals: SimpleQueue[tuple[int, _T] | None] = SimpleQueue()

        async def make(index: int, request: Callable[[], Awaitable[_T]]) -> None:
            async with self._slots:
                result = await request()
            arrivals.put((index, result))

        async def make_all() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for index, request in enumerate(requests):
                        group.create_task(make(index, request))
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None

        call = self._start(make_all())
        call.add_done_callback(lambda _: arrivals.put(None))
        results: dict[int, _T] = {}
        try:
            while (arrival := arrivals.get()) is not None:
                index, result = arrival
                results[index] = result
                if on_arrival is not None:
                    on_arrival(index, result)
            self._result(call)
        except BaseException:
            call.cancel()
            raise
        return [results[index] for index in range(len(requests))]

    def wait_for(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run one coroutine, outside the limit, and return its result."""
        call = self._start(coroutine)
        try:
            return self._result(call)
        except BaseException:
            call.cancel()
            raise

    def cancel(self) -> None:
        """Cancel what is under way, for all callers; their calls end with a RuntimeError. New calls are welcome."""
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def close(self) -> None:
        """Cancel everything and end the thread. Once is enough, twice does no harm."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.cancel()
        asyncio.run_coroutine_threadsafe(_cancel_all_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _start(self, coroutine: Coroutine[Any, Any, _T]) -> "Future[_T]":
        with self._lock:
            if self._closed:
                coroutine.close()
                raise RuntimeError("this backend is closed. Create a new one")
            call = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._calls.add(call)
        call.add_done_callback(self._forget)
        return call

    def _forget(self, call: "Future[Any]") -> None:
        with self._lock:
            self._calls.discard(call)

    def _result(self, call: "Future[_T]") -> _T:
        try:
            return call.result()
        except CancelledError:
            raise RuntimeError("the requests were cancelled: cancel() or close() was called on the backend") from None


async def _cancel_all_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
