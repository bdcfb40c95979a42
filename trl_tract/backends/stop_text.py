"""Where a continuation ends: the stop text is looked for in the text that the tokens make, not in the tokens.

Knows a tokenizer and what `model.generate` asks at each step; knows nothing of batches or of how a token was drawn.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from trl_tract.backends.base import Generation, Stop

_SLACK_TOKENS = 8  # Read before the stop text's own tokens: the first token of a window may lose its leading space.


class Ending:
    """Text of sampled tokens, and where the stop text ends it.

    Args:
        tokenizer: Of the model.
        stop: The stop text, if any.

    Attributes:
        stop: It.
        shows_special: Whether it, or a text that it shows, has special tokens, which are left out of a text otherwise.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str | None) -> None:
        self.tokenizer = tokenizer
        self.stop = stop if stop is None or isinstance(stop, Stop) else Stop(stop)
        texts = [] if self.stop is None else [str(self.stop), *self.stop.shows]
        own = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        self._is_special = functools.cache(lambda token: not self._text([token], True) and self._text([token], False))
        self._shown = {token for token in own if self._is_special(token)}
        self.shows_special = bool(self._shown)
        follows = () if self.stop is None else self.stop.followed_by
        self._last = {text[-1] for text in follows or [stop] if text}
        # A token holds a byte or more.
        self.window = len((stop or "").encode()) + max((len(text.encode()) for text in follows), default=0)
        self.window += _SLACK_TOKENS
        self.may_end = functools.cache(self._may_end)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, as the tokens spell it, without special tokens that the stop text does not show."""
        if not self._shown:
            return self._text(ids, True)
        return self._text([token for token in ids if token in self._shown or not self._is_special(token)], False)

    def finish(self, written: Sequence[int], *, at_eos: bool) -> Generation:
        """A continuation that is finished, cut at the stop text.

        The text is decoded from the ids here, whatever text an engine reports: engines differ in the spaces around a
        stop text and in front of the first word, and their ids go past the stop text.

        Args:
            written: Every token sampled.
            at_eos: The last of them is an end of sequence.
        """
        text = self.decode(written[:-1] if at_eos else written)
        place = None if self.stop is None else self.stop.place_in(text, whole=True)
        ids = tuple(written)
        if place is not None:
            return Generation(text[:place], "stop", len(ids), ids)
        return Generation(text, "eos" if at_eos else "length", len(ids), ids)

    def is_reached(self, ids: Sequence[int]) -> bool:
        """Whether a continuation of these tokens holds the stop text near its end."""
        window = self.decode(ids[-self.window :])
        # Most windows do not hold it; what stands before it, in the rest of the text, may make it a mention.
        return self.stop is not None and self.stop in window and self.stop.place_in(self.decode(ids)) is not None

    def _may_end(self, token: int) -> bool:
        """Whether a continuation that has `token` as its last may end with what it has to end with."""
        text = self.decode([token])
        # A lone token may lose its spaces, and a piece of a character decodes to the replacement character.
        return "\ufffd" in text or any(last.isspace() or last in text for last in self._last)

    def _text(self, ids: Sequence[int], skip_special: bool) -> str:
        # clean_up_tokenization_spaces rewrites " ." to "." on some tokenizers, and with it the text to be matched.
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        )


class StopText(StoppingCriteria):
    """Ends each row once its continuation holds the stop text.

    The library's own `stop_strings` prepares a table over the whole vocabulary, works on it at every step, and lets
    the end of the prompt count as the beginning of the stop text.

    Args:
        ending: The stop text.
        starts: Where each row's continuation starts in the batch's token ids, `(B,)`.

    Attributes:
        ended_at: By row, the length of the batch's token ids when that row's stop text was complete.
    """

    def __init__(self, ending: Ending, starts: list[int]) -> None:
        self.ending = ending
        self.starts = starts
        self.ended_at: dict[int, int] = {}

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which rows have ended, `(B,)` bool."""
        length = input_ids.shape[1]
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if row in self.ended_at or not self.ending.may_end(token):
                continue
            if self.ending.is_reached(input_ids[row, self.starts[row] :].tolist()):
                self.ended_at[row] = length
        ended = [row in self.ended_at for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)
