"""The next token of each row of a batch, drawn by random numbers of the row's own.

What a row draws then does not depend on the rows beside it, on its place among them, or on the device. Knows logits;
knows nothing of prompts, of what ends a text, or of scores.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from trl_tract.backends.base import Sampling


def random_numbers(seed: int, sample: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1), the same ones for a seed and a sample on every machine."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{sample}".encode()).digest()[:16], "big")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


class Nucleus(LogitsProcessor):
    """The library's `TopPLogitsWarper`, looking at the likeliest tokens alone where they are enough.

    Sorting a whole vocabulary for each row takes an eighth of all the time of writing on a CPU. A row whose nucleus is
    larger goes through the library's own, whatever stands beside it.

    Args:
        top_p: Nucleus sampling threshold, below 1.
        most: Tokens that are looked at.
    """

    def __init__(self, top_p: float, most: int = 1024) -> None:
        self._top_p, self._most = top_p, most
        self._whole = TopPLogitsWarper(top_p)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores `(B, V)`, -inf outside the nucleus."""
        best, places = scores.topk(min(self._most, scores.shape[-1]), dim=-1)
        probs = (best - scores.logsumexp(dim=-1, keepdim=True)).exp()
        reached = probs.cumsum(dim=-1)
        kept = best.masked_fill(reached - probs >= self._top_p, -torch.inf)
        result = torch.full_like(scores, -torch.inf).scatter(1, places, kept)
        larger = reached[:, -1] < self._top_p
        if larger.any():
            result[larger] = self._whole(input_ids[larger], scores[larger])
        return result


class Drawing:
    """Draws the next token of each row, with the library's own processors."""

    def __init__(self, settings: Sampling) -> None:
        self._is_greedy = settings.temperature == 0
        self._processors: Any = LogitsProcessorList()
        if settings.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)))
        if not self._is_greedy and settings.temperature != 1:
            self._processors.append(TemperatureLogitsWarper(float(settings.temperature)))
        if not self._is_greedy and settings.top_p < 1:
            self._processors.append(Nucleus(float(settings.top_p)))

    def __call__(self, input_ids: Any, logits: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
        """Tokens, `(B,)`.

        Args:
            input_ids: What stands before, `(B, L)`. Padding has to be a token that stands there as well, since the
                repetition penalty counts it.
            logits: `(B, V)`.
            numbers: A random number in [0, 1) for each row.
        """
        scores = self._processors(input_ids, logits.to(torch.promote_types(logits.dtype, torch.float32)))
        if self._is_greedy:
            tokens: torch.Tensor = scores.argmax(dim=-1)
            return tokens
        probs = scores.softmax(dim=-1)
        # In float32 a sum of 100,000 numbers is off by more than many tokens' probabilities. MPS has nothing else.
        exact = torch.float32 if probs.device.type == "mps" else torch.float64
        below = probs.cumsum(dim=-1, dtype=exact)
        number = torch.tensor(numbers, dtype=exact, device=below.device)[:, None]
        # The first token up to which there is more than the number: it has a probability itself.
        place = torch.searchsorted(below, number * below[:, -1:], right=True)
        # What rounding leaves beyond the last is the likeliest one's.
        return torch.where(place < probs.shape[1], place, probs.argmax(dim=-1, keepdim=True))[:, 0]


class DrawEach(LogitsProcessor):
    """The same in `model.generate`: leaves each row the one token that it draws, for a greedy search to take.

    Args:
        drawing: Draws.
        padding: True where a row is padded, `(B, L)` at the start.
        numbers: The random numbers of all rows, by how many tokens were written since.
    """

    def __init__(self, drawing: Drawing, padding: torch.Tensor, numbers: Callable[[int], Sequence[float]]) -> None:
        self._drawing, self._padding, self._numbers = drawing, padding, numbers

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """Scores `(B, V)` of which one in each row is not -inf."""
        start = self._padding.shape[1]
        before = torch.where(self._padding, input_ids[:, start - 1 : start], input_ids[:, :start])
        ids = torch.cat([before, input_ids[:, start:]], dim=1)
        tokens = self._drawing(ids, scores, self._numbers(input_ids.shape[1] - start))
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)
