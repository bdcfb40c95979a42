"""One continuation that is being written, in batches with others. Knows nothing of models."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trl_tract.backends.stop_text import Doubt


@dataclass(eq=False)
class Continuation:
    """One continuation under way.

    Near the end of the context window the rows of a batch have room for different numbers of tokens. A batch then
    stops where its shortest room ends, and the other rows go on in a later batch.

    Attributes:
        prompt: Number of its prompt.
        prompt_ids: The prompt's tokens.
        limit: Tokens that it may have.
        numbers: A random number for each of them, in [0, 1).
        written: Those that it has.
        ended: Whether it came to its end before the limit.
        doubt: Where the stop text stands that ended it, and what is in doubt there.
        taken: Where the stop text counts, after a doubt.
        mentions: Where it does not.
    """

    prompt: int
    prompt_ids: list[int]
    limit: int
    numbers: NDArray[np.float64]
    written: list[int] = field(default_factory=list)
    ended: bool = False
    doubt: tuple[int, Doubt] | None = None
    taken: int | None = None
    mentions: set[int] = field(default_factory=set)

    @property
    def goes_on(self) -> bool:
        """Whether it has neither ended nor come to its limit."""
        return not self.ended and len(self.written) < self.limit

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
