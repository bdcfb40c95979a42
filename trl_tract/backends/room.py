"""How much a batch may hold, and what happens when it was too much. Knows nothing of what is in it."""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")


@dataclass
class Room:
    """How much one batch may hold; less after it was too much."""

    rows: int
    tokens: int
    is_less: bool = False

    def fits(self, rows: int, length: int) -> bool:
        """Whether a batch of so many rows of so many tokens may be; one row always may."""
        return rows <= 1 or (rows <= self.rows and rows * length <= self.tokens)

    def shrink(self, rows: int) -> None:
        """Take in that `rows` sequences ran out of memory.

        Raises:
            torch.OutOfMemoryError: There is no less.
        """
        if self.rows == 1:
            raise torch.OutOfMemoryError(
                "out of memory with a single sequence. Shorten its prompt, or use a device with more memory"
            )
        if not self.is_less:
            logger.warning("out of memory with %d sequences at a time; continuing with smaller batches", rows)
        self.rows, self.tokens, self.is_less = max(rows // 2, 1), self.tokens // 2, True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def in_batches(
        self,
        pending: deque[_Item],
        step: Callable[[list[_Item]], list[_Item]],
        length: Callable[[_Item], int],
        forget: Callable[[], None],
    ) -> None:
        """Hand batches from the left of `pending` to `step`, and put back what it returns, until nothing is left."""
        while pending:
            batch = [pending.popleft()]
            longest = length(batch[0])
            while pending and self.fits(len(batch) + 1, longest := max(longest, length(pending[0]))):
                batch.append(pending.popleft())
            out_of_memory = False
            try:
                left = step(batch)
            except torch.OutOfMemoryError:
                left, out_of_memory = batch, True
            if out_of_memory:  # Outside the handler: the exception's frames hold the batch's tensors.
                forget()
                self.shrink(len(batch))
            pending.extendleft(reversed(left))
