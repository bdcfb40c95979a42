"""What every generation backend can do, and nothing about scores or training.

Prompts go in as token ids, never as text: the ids a judge is asked with are then exactly the ids it was trained on,
whatever a tokenizer would make of the same text a second time.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal, Protocol, Self, TypedDict, Unpack, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from trl_tract.scale.scale import Scale
from trl_tract.scale.text import score_begins
from trl_tract.scale.trie import TokenTrie

FinishReason = Literal["stop", "eos", "length", "prompt_too_long"]


@dataclass(frozen=True)
class Generation:
    """One sampled continuation.

    Attributes:
        text: The continuation up to, and without, the stop text; special tokens that are no part of it are left out.
        finish_reason: `stop` (the stop string was written), `eos` (the model ended its turn first), `length`
            (`max_new_tokens` ran out) or `prompt_too_long` (nothing was generated: the prompt leaves no room in the
            context window).
        num_tokens: Tokens sampled, the stop text's and what had to follow it included.
        token_ids: They, behind which the text can be gone on with; empty where a backend does not tell.
    """

    text: str
    finish_reason: FinishReason
    num_tokens: int
    token_ids: tuple[int, ...] = field(default=(), compare=False, repr=False)


class Stop(str):
    """A stop text that may be mentioned before it is meant: where it does not count, a continuation goes on past it.

    A string still: whoever knows no more of it stops at its first occurrence.

    Args:
        text: The stop text.
        followed_by: Texts, one of which has to follow it, behind white space or at once. None: anything may.
        counts: Told the text before an occurrence: whether that one counts. By default all do.
        shows: Texts whose special tokens are not left out of what was written, such as the tags of thinking.
        separator: Text between it and what follows, as the model was taught to write it.
        begins: The first token of each of `followed_by` behind it. A model that is taught their mean alone, and no
            cross-entropy on them, often samples another token there: then the engine is asked for their probability.

    Example:
        >>> stop = Stop("[RESULT]", ["1", "2"])
        >>> text = "I end with [RESULT] and a score. Good. [RESULT] 2"
        >>> text[: stop.place_in(text)]
        'I end with [RESULT] and a score. Good. '
    """

    followed_by: tuple[str, ...]
    counts: Callable[[str], bool] | None
    shows: tuple[str, ...]
    separator: str
    begins: tuple[int, ...]

    def __new__(
        cls,
        text: str,
        followed_by: Sequence[str] = (),
        counts: Callable[[str], bool] | None = None,
        shows: Sequence[str] = (),
        separator: str = "",
        begins: Sequence[int] = (),
    ) -> Self:
        """See the class."""
        stop = super().__new__(cls, text)
        stop.followed_by, stop.counts, stop.shows = tuple(followed_by), counts, tuple(shows)
        stop.separator, stop.begins = separator, tuple(begins)
        return stop

    @classmethod
    def at(cls, scale: Scale, counts: Callable[[str], bool] | None = None, shows: Sequence[str] = ()) -> Self:
        """The marker of a scale with tokens, where one of its scores follows."""
        grid = scale.grid
        begins = grid.token_ids or [path.token_ids[0] for path in grid.paths]
        return cls(scale.marker, grid.texts, counts, shows, scale.format.separator, begins)

    def place_in(self, text: str, *, whole: bool = False) -> int | None:
        """Where the first occurrence that counts begins; None without one.

        Args:
            text: What was written.
            whole: Nothing will be added, so an occurrence that the text broke off behind counts too.
        """
        return next((place for place in self.places_in(text) if self.follows(text[place:], whole=whole)), None)

    def places_in(self, text: str) -> list[int]:
        """Where the occurrences begin that count if something fitting follows."""
        found = (match.start() for match in re.finditer(re.escape(self), text))
        return [place for place in found if self.counts is None or self.counts(text[:place])]

    def follows(self, text: str, *, whole: bool = False) -> bool | None:
        """Whether what has to follow does so in `text`, which begins with an occurrence; None if that is still open."""
        return not self.followed_by or score_begins(text[len(self) :], self.followed_by, whole=whole)

    @functools.cached_property
    def strings(self) -> list[str]:
        """For an engine that knows strings alone: it may end a text early at one of them, and hardly ever late."""
        if not self.followed_by:
            return [str(self)]
        texts = set(self.followed_by)
        shortest = [one for one in self.followed_by if not any(one[:end] in texts for end in range(1, len(one)))]
        return [f"{self}{gap}{one}" for gap in ("", " ", "\n") for one in shortest]


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling`, as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float


@dataclass(frozen=True)
class Sampling:
    """How a continuation is sampled. Every setting that shapes the text is here: none comes from a checkpoint.

    Attributes:
        max_new_tokens: Tokens sampled at most per continuation.
        temperature: 0 decodes greedily.
        top_p: Nucleus sampling threshold, in (0, 1].
        repetition_penalty: 1 leaves the logits alone.

    Raises:
        ValueError: A setting out of range.
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be 1 or more")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 turns it off")

    def check(self, n: int, stop: str | None) -> None:
        """Check what else `Backend.generate` was asked for.

        Raises:
            ValueError: It cannot be had with these settings.
        """
        if n < 1:
            raise ValueError(f"n={n} must be 1 or more")
        if stop == "":
            raise ValueError('stop="" would end every continuation before its first token. Pass None for no stop text')
        if self.temperature == 0 and n > 1:
            raise ValueError(
                f"n={n} with temperature=0 gives the same text {n} times. Raise the temperature, or set n=1"
            )


def settings_that_count(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments that a backend is made with, those that move its answers."""
    names = ("dtype", "merge_adapter", "revision", "quantization", "kv_cache_dtype")
    return {name: str(arguments[name]) for name in names if arguments.get(name)}


def prompt_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """A seed for each of `count` prompts: those given, or different ones made of a single one.

    Raises:
        ValueError: Others than `count` are given.
    """
    if isinstance(seed, int):
        return [int.from_bytes(sha256(f"{seed}/{number}".encode()).digest()[:4], "big") for number in range(count)]
    if len(seed) != count:
        raise ValueError(f"{len(seed)} seeds for {count} prompts. Pass one for each prompt, or one for all")
    return list(seed)


@runtime_checkable
class Backend(Protocol):
    """A language model that samples text and reports exact next-token log-probabilities."""

    name: str
    """Which engine produced a result ("transformers", "vllm", "server"): engines differ by tenths of a nat."""

    model_id: str
    """Directory or hub id of the model, for provenance and fingerprints."""

    tokenizer: PreTrainedTokenizerBase

    max_calls: int
    """Calls that may run at once, from several threads: 1 for an engine that does a batch at a time, more for one that
    joins the requests of all callers and would idle at the end of each call."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        stop: str | None = None,
        seed: int | Sequence[int] = 0,
        on_progress: Callable[[int], None] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[list[Generation]]:
        """Sample `n` continuations of each prompt, in the order of the prompts.

        Args:
            prompts: Token ids, one sequence a prompt.
            n: Continuations per prompt; 1 with temperature 0.
            stop: Text that ends a continuation; it is not part of the result. A `Stop` says where it counts.
            seed: One for each prompt, or one that they are made of. The same seed, prompt and settings give the same
                text on the same machine, where the engine gives each prompt random numbers of its own.
            on_progress: Called with the number of prompts that have just been finished.
            **sampling: Fields of `Sampling`. A continuation never has more tokens than the context window has left.

        Raises:
            ValueError: A setting out of range, or a prompt that is empty or holds an id outside the vocabulary.
        """
        ...

    def next_token_logprobs(
        self, token_id_lists: Sequence[Sequence[int]], token_ids: Sequence[int]
    ) -> NDArray[np.float64]:
        """Log-probabilities of `token_ids` as the next token, `(len(token_id_lists), len(token_ids))`, in nats.

        Under the softmax over the whole vocabulary, untouched by temperature, top-p or penalties; a row of NaN where
        the ids do not fit the context window. A backend that knows only the top k, or renormalises, raises instead.

        Raises:
            ValueError: A row that is empty, or an id outside the vocabulary.
        """
        ...

    def trie_logprobs(self, token_id_lists: Sequence[Sequence[int]], trie: TokenTrie) -> NDArray[np.float64] | None:
        """Log-probabilities of whole scores of several tokens, `(len(token_id_lists), K)`, in nats.

        None, as by default, where an engine cannot: the same is then asked for with `next_token_logprobs`.
        """
        return None

    def reuse(self) -> AbstractContextManager[None]:
        """While open, what was computed for one call may serve the next: the model's weights must not change.

        An engine that keeps nothing, or always does, needs none: nothing by default.
        """
        return nullcontext()

    def cancel(self) -> None:
        """End the calls under way in other threads, such as after Ctrl-C. Nothing by default."""
        return

    def fingerprint(self) -> dict[str, str]:
        """What the engine knows of its model's identity, by name; nothing where `model_id` names files that tell."""
        return {}


def reusing(backend: Backend) -> AbstractContextManager[None]:
    """`Backend.reuse`, which a user's own double need not have."""
    opened: AbstractContextManager[None] = getattr(backend, "reuse", nullcontext)()
    return opened
