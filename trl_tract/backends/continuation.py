"""One continuation that is being written, in batches with others. Knows nothing of models."""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trl_tract.backends.stop_text import Doubt, Ending, Watch


@dataclass(eq=False)
class Continuation:
    """One continuation under way.

    Attributes:
        numbers: A random number in [0, 1) for each token that it may have.
        doubt: Where the stop text stands that ended it, and what is in doubt there.
        taken: Where the stop text counts, after a doubt.
        mentions: Where it does not.
    """

    prompt: int
    prompt_ids: list[int]
    numbers: NDArray[np.float64]
    written: list[int] = field(default_factory=list)
    ended: bool = False
    doubt: tuple[int, Doubt] | None = None
    taken: int | None = None
    mentions: set[int] = field(default_factory=set)

    @property
    def goes_on(self) -> bool:
        """Whether it has neither ended nor come to its limit."""
        return not self.ended and self.room > 0

    @property
    def room(self) -> int:
        """Tokens that it may still have."""
        return len(self.numbers) - len(self.written)

    @property
    def number(self) -> float:
        """What its next token is drawn with."""
        return float(self.numbers[len(self.written)])

    @property
    def before(self) -> list[int]:
        """Its tokens but the last, whose keys and values the next token needs."""
        return [*self.prompt_ids, *self.written][:-1]

    @property
    def last(self) -> int:
        """Its last token, which the next one is drawn behind."""
        return self.written[-1] if self.written else self.prompt_ids[-1]

    def watch(self, ending: Ending) -> Watch:
        """What looks for its end."""
        return Watch(ending, self.mentions)

    def end(self, eos: Collection[int], found: tuple[int, bool | Doubt] | None) -> None:
        """Take note of what ends it with its last token: an end of sequence, or what its watch found."""
        self.ended = found is not None or self.written[-1] in eos
        if found is not None and isinstance(found[1], Doubt):
            self.doubt = found[0], found[1]

    def settle(self, mass: float, least: float) -> None:
        """Decide the doubt by the probability that a score had there."""
        assert self.doubt is not None
        place, _ = self.doubt
        self.doubt = None
        if mass < least:
            self.mentions.add(place)
            self.ended = False
        else:
            self.taken = place
