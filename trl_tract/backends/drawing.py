"""The next token of each row of a batch, drawn by random numbers of the row's own.

What a row draws then does not depend on the rows beside it, on its place among them, or on the device. Knows logits;
knows nothing of prompts, of what ends a text, or of scores.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper


def random_numbers(seed: int, sample: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1), the same ones for a seed and a sample on every machine."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{sample}".encode()).digest()[:16], "big")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


class DrawEach(LogitsProcessor):
    """Leaves each row the one token that it draws, for a greedy search to take.

    Args:
        numbers: Random numbers in [0, 1) for each row, of its next tokens in order.
        temperature: Of the softmax, above 0.
        top_p: Nucleus sampling threshold, in (0, 1].
    """

    def __init__(self, numbers: Sequence[NDArray[np.float64]], temperature: float, top_p: float) -> None:
        self._numbers = np.stack(list(numbers))
        self._step = 0
        self._warpers = [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
        self._warpers += [TopPLogitsWarper(float(top_p))] if top_p < 1 else []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """Scores `(B, V)` of which one in each row is not -inf."""
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        probs = scores.softmax(dim=-1)
        # In float32 a sum of 100,000 numbers is off by more than many tokens' probabilities. MPS has nothing else.
        exact = torch.float32 if probs.device.type == "mps" else torch.float64
        below = probs.cumsum(dim=-1, dtype=exact)
        number = torch.from_numpy(self._numbers[:, self._step]).to(below.device, exact)[:, None]
        self._step += 1
        # The first token up to which there is more than the number: it has a probability itself.
        place = torch.searchsorted(below, number * below[:, -1:], right=True)
        # What rounding leaves beyond the last is the likeliest one's.
        place = torch.where(place < probs.shape[1], place, probs.argmax(dim=-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(1, place, 0.0)
