"""What every generation backend can do, and nothing about scores or training.

Prompts go in as token ids, never as text: the ids a judge is asked with are then exactly the ids it was trained on,
whatever a tokenizer would make of the same text a second time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict, Unpack, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "eos", "length", "prompt_too_long"]


@dataclass(frozen=True)
class Generation:
    """One sampled continuation.

    Attributes:
        text: The continuation up to, and without, the stop string; special tokens are left out.
        finish_reason: `stop` (the stop string was written), `eos` (the model ended its turn first), `length`
            (`max_new_tokens` ran out) or `prompt_too_long` (nothing was generated: the prompt leaves no room in the
            context window).
        num_tokens: Tokens sampled, the stop string's included.
    """

    text: str
    finish_reason: FinishReason
    num_tokens: int


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
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 leaves the logits alone")

    def check(self, n: int, stop: str | None) -> None:
        """Check what else `Backend.generate` was asked for.

        Raises:
            ValueError: It cannot be had with these settings.
        """
        if n < 1:
            raise ValueError(f"n={n} must be 1 or more")
        if stop == "":
            raise ValueError('stop="" would end every continuation before its first token: pass None for no stop text')
        if self.temperature == 0 and n > 1:
            raise ValueError(
                f"n={n} with temperature=0 gives the same text {n} times: raise the temperature, or set n=1"
            )


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
        seed: int = 0,
        on_progress: Callable[[int], None] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[list[Generation]]:
        """Sample `n` continuations of each prompt, in the order of the prompts.

        Args:
            prompts: Token ids, one sequence a prompt.
            n: Continuations per prompt; 1 with temperature 0.
            stop: Text that ends a continuation; it is not part of the result.
            seed: The same seed, prompts and settings give the same text on the same machine, where the engine's
                batches do not depend on what else it does.
            on_progress: Called with the number of prompts that have just been finished.
            **sampling: Fields of `Sampling`.
        """
        ...

    def next_token_logprobs(
        self, token_id_lists: Sequence[Sequence[int]], token_ids: Sequence[int]
    ) -> NDArray[np.float64]:
        """Log-probabilities of `token_ids` as the next token, `(len(token_id_lists), len(token_ids))`, in nats.

        Under the softmax over the whole vocabulary, untouched by temperature, top-p or penalties; a row of NaN where
        the ids do not fit the context window. A backend that knows only the top k, or renormalises, raises instead.
        """
        ...
