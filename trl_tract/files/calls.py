"""Several calls at once, in threads that nobody has to wait for. Knows nothing of what is called."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

Result = TypeVar("Result")


def in_threads(do: Callable[[int], Result], items: Iterator[int], max_calls: int) -> Iterator[tuple[int, Result]]:
    """Items and what `do` makes of them as they are finished, `max_calls` at a time.

    After an error no item is begun, those under way are finished, and the error is raised.
    """
    if max_calls == 1:
        yield from ((item, do(item)) for item in items)
        return
    done: queue.Queue[tuple[int, Result | BaseException]] = queue.Queue()

    def run(item: int) -> None:
        try:
            done.put((item, do(item)))
        except BaseException as error:
            done.put((item, error))

    running, failure = 0, None
    while True:
        while failure is None and running < max_calls and (item := next(items, None)) is not None:
            # Daemons, not an executor's threads: after Ctrl-C the interpreter must not wait for a server's answers.
            threading.Thread(target=run, args=(item,), daemon=True).start()
            running += 1
        if not running:
            break
        item, result = done.get()
        running -= 1
        if isinstance(result, BaseException):
            failure = failure or result
        else:
            yield item, result
    if failure is not None:
        raise failure
