"""Where a continuation ends: the stop text is looked for in the text that the tokens make, not in the tokens.

Knows a tokenizer and what `model.generate` asks at each step; knows nothing of batches or of how a token was drawn.
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from trl_tract.backends.base import Generation, Stop

_SLACK_TOKENS = 8  # Read before the stop text's own tokens: the first token of a window may lose its leading space.


@dataclass(frozen=True)
class Doubt:
    """The model stood where a score stands, and sampled something else: only its probabilities tell what it meant.

    Attributes:
        count: How many of the tokens reach to that place.
    """

    count: int


LEAST_MASS = 0.02
"""Probability of the scores from which on a `Doubt` is decided in favour of one."""


class Ending:
    """Text of sampled tokens, and where the stop text ends it.

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
        # The stop text itself, behind which each token is looked at, and what has to follow it.
        self._last = {text[-1] for text in (stop, *follows) if text}
        # A token holds a byte or more.
        self.window = len((stop or "").encode()) + max((len(text.encode()) for text in follows), default=0)
        self.window += _SLACK_TOKENS
        self.may_end = functools.cache(self._may_end)
        self._gap = self._find_gap()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, as the tokens spell it, without special tokens that the stop text does not show."""
        if not self._shown:
            return self._text(ids, True)
        return self._text([token for token in ids if token in self._shown or not self._is_special(token)], False)

    def finish(self, written: Sequence[int], *, at_eos: bool, taken: int | None = None) -> Generation:
        """A continuation that is finished, cut at the stop text.

        The text is decoded from the ids here, whatever text an engine reports: engines differ in the spaces around a
        stop text and in front of the first word, and their ids go past the stop text.

        Args:
            written: Every token sampled.
            at_eos: The last of them is an end of sequence.
            taken: Where a `Doubt` was decided in favour.
        """
        ids = tuple(written)
        read = ids[:-1] if at_eos else ids
        text = self.decode(read)
        found = self.occurrences(read, text, whole=True)
        # Where the model stood at a score's place and nothing better came, it meant that one.
        place = next((place for place, follows in found if follows is True or place == taken), None)
        if place is None and self._gap:
            place = next((place for place, follows in found if isinstance(follows, Doubt)), None)
        if place is not None:
            return Generation(text[:place], "stop", len(ids), ids)
        return Generation(text, "eos" if at_eos else "length", len(ids), ids)

    def occurrences(
        self, ids: Sequence[int], text: str, *, whole: bool = False
    ) -> list[tuple[int, "bool | Doubt | None"]]:
        """Where the stop text stands in the text of `ids`, and whether it counts: None where that is still open."""
        if self.stop is None or self.stop not in text:
            return []
        return [(place, self._follows(ids, text, place, whole)) for place in self.stop.places_in(text)]

    def _follows(self, ids: Sequence[int], text: str, place: int, whole: bool) -> "bool | Doubt | None":
        assert self.stop is not None
        follows = self.stop.follows(text[place:], whole=whole)
        if follows is not False or self._gap is None:
            return follows
        # Tokens up to where a score would stand, if the model went there.
        end = place + len(self.stop) + len(self._gap)
        count = bisect.bisect_left(range(len(ids)), end, key=lambda length: len(self.decode(ids[:length])))
        if count == len(ids) or self.decode(ids[:count]) != text[: end - len(self._gap)] + self._gap:
            return False
        if self._gap:
            # A word's own token would hold the space before it: a space by itself is written at a score's place alone.
            piece = self.decode(ids[: count + 1])[end:]
            joined = self.tokenizer(f"{self.stop}{self._gap}{piece}", add_special_tokens=False)["input_ids"]
            if piece[:1].isspace() or joined[-2:] != list(ids[count - 1 : count + 1]):
                return True
        return Doubt(count)

    def _find_gap(self) -> str | None:
        """Text between the stop text and a score's first token; None where no tokens of scores are known."""
        stop = self.stop
        if stop is None or not stop.begins:
            return None
        before = f"{stop}{stop.separator}"
        encoded = self.tokenizer(f"{before}{stop.followed_by[0]}", add_special_tokens=False)["input_ids"]
        places = [place for place, token in enumerate(encoded) if token == stop.begins[0]]
        read = self.decode(encoded[: places[-1]]) if places else ""
        return read[len(stop) :] if read in (before, stop) else None

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


class Watch:
    """Looks at one continuation after each of its tokens.

    Args:
        mentions: Where it was found not to count.
    """

    def __init__(self, ending: Ending, mentions: set[int]) -> None:
        self.ending = ending
        self.mentions = mentions
        self._is_open = False  # the last tokens were the stop text's

    def __call__(self, written: Sequence[int]) -> "tuple[int, bool | Doubt] | None":
        """Where the stop text stands that ends the continuation here, and whether in doubt; None: it goes on."""
        if self.ending.stop is None or not (self._is_open or self.ending.may_end(written[-1])):
            return None
        self._is_open = False
        if self.ending.stop not in self.ending.decode(written[-self.ending.window :]):  # most do not hold it
            return None
        for place, follows in self.ending.occurrences(written, self.ending.decode(written)):
            if follows is None:
                self._is_open = True
            elif follows and place not in self.mentions:
                return place, follows
        return None


class StopText(StoppingCriteria):
    """Ends each row of `model.generate` once its continuation holds the stop text.

    The library's own `stop_strings` prepares a table over the whole vocabulary, works on it at every step, and lets
    the end of the prompt count as the beginning of the stop text.

    Args:
        watches: Of each row.
        starts: Where each row's continuation starts in the batch's token ids, `(B,)`.

    Attributes:
        found: By row that ended, the length of the batch's token ids then, and what its watch said.
    """

    def __init__(self, watches: list[Watch], starts: list[int]) -> None:
        self.watches = watches
        self.starts = starts
        self.found: dict[int, tuple[int, tuple[int, bool | Doubt]]] = {}

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which rows have ended, `(B,)` bool."""
        for row, (watch, start) in enumerate(zip(self.watches, self.starts, strict=True)):
            if row not in self.found and (found := watch(input_ids[row, start:].tolist())) is not None:
                self.found[row] = (input_ids.shape[1], found)
        return torch.tensor([row in self.found for row in range(len(input_ids))], device=input_ids.device)
