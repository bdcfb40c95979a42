"""What every generation backend can do, and nothing about scores or training.

Prompts go in as token ids, never as text: the ids a judge is asked with are then exactly the ids it was trained on,
whatever a tokenizer would make of the same text a second time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

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


@runtime_checkable
class Backend(Protocol):
    """A language model that samples text and reports exact next-token log-probabilities."""

    name: str
    """Which engine produced a result ("transformers", "vllm", "server"): engines differ by tenths of a nat."""

    model_id: str
    """Directory or hub id of the model, for provenance and fingerprints."""

    tokenizer: PreTrainedTokenizerBase

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        stop: str | None = None,
        max_new_tokens: int = 1024,
        temperature: float = 1.0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Generation]]:
        """Sample `n` continuations of each prompt, in the order of the prompts.

        Args:
            prompts: Token ids, one sequence a prompt.
            n: Continuations per prompt.
            stop: Text that ends a continuation; it is not part of the result.
            max_new_tokens: Tokens sampled at most per continuation.
            temperature: 0 decodes greedily (then `n` must be 1).
            top_p: Nucleus sampling threshold.
            repetition_penalty: 1 leaves the logits alone.
            seed: The same seed, prompts and settings give the same text on the same backend and machine.
            on_progress: Called with the number of prompts that have just been finished.
        """
        ...

    def next_token_logprobs(
        self, token_id_lists: Sequence[Sequence[int]], token_ids: Sequence[int]
    ) -> NDArray[np.float64]:
        """Log-probabilities of `token_ids` as the next token, `(len(token_id_lists), len(token_ids))`, in nats.

        Under the softmax over the whole vocabulary, untouched by temperature, top-p or penalties; a row of NaN where
        the ids do not fit the context window. A backend that
        knows only the top k, or renormalises, raises instead.
        """
        ...
