"""Where a continuation ends: the stop text is looked for in the text that the tokens make, not in the tokens.

Knows a tokenizer and what `model.generate` asks at each step; knows nothing of batches or of how a token was drawn.
"""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from trl_tract.backends.tokens import decode

_SLACK_TOKENS = 8  # Read before the stop text's own tokens: the first token of a window may lose its leading space.


class MayEnd:
    """Tells which tokens can complete the stop text, so that the others need not be decoded."""

    def __init__(self, stop: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.stop = stop
        self.tokenizer = tokenizer
        self.window = len(stop.encode()) + _SLACK_TOKENS  # A token holds a byte or more.
        self._known: dict[int, bool] = {}

    def __call__(self, token: int) -> bool:
        """Whether a continuation that has `token` as its last may end with the stop text."""
        if token not in self._known:
            text = decode(self.tokenizer, [token])
            last = self.stop[-1]
            # A lone token may lose its spaces, and a piece of a character decodes to the replacement character.
            self._known[token] = last.isspace() or last in text or "\ufffd" in text
        return self._known[token]


class StopText(StoppingCriteria):
    """Ends each row once its continuation holds the stop text.

    The library's own `stop_strings` prepares a table over the whole vocabulary, works on it at every step, and lets
    the end of the prompt count as the beginning of the stop text.

    Args:
        may_end: The stop text.
        starts: Where each row's continuation starts in the batch's token ids, `(B,)`.

    Attributes:
        ended_at: By row, the length of the batch's token ids when that row's stop text was complete.
    """

    def __init__(self, may_end: MayEnd, starts: list[int]) -> None:
        self.may_end = may_end
        self.starts = starts
        self.ended_at: dict[int, int] = {}

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which rows have ended, `(B,)` bool."""
        length = input_ids.shape[1]
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if row in self.ended_at or not self.may_end(token):
                continue
            start = max(self.starts[row], length - self.may_end.window)
            if self.may_end.stop in decode(self.may_end.tokenizer, input_ids[row, start:].tolist()):
                self.ended_at[row] = length
        ended = [row in self.ended_at for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)
