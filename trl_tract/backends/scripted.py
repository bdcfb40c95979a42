"""A backend that says what it is told: the double for tests, here and in users' own code.

Knows the protocol and a tokenizer; runs no model.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from trl_tract.backends.base import Backend, Generation, Sampling, SamplingOptions, prompt_seeds
from trl_tract.backends.stop_text import Ending

Script = Callable[[str, int], str] | Mapping[str, str] | Sequence[str]
Probabilities = Callable[[list[int]], Sequence[float]] | Sequence[float]


class ScriptedBackend(Backend):
    """Continuations and score probabilities from a script, deterministic and without a model.

    A continuation is treated as a model's would be: it is cut before `stop`, or after `max_new_tokens` tokens, and
    otherwise ends with an end-of-sequence token.

    Args:
        script: What is written. A function of the prompt's text and a seed (`seed` for the first continuation of a
            prompt, `seed + 1` for the second, ...); or texts by prompt text; or a sequence of texts, used up one per
            continuation.
        tokenizer: Turns prompts into text, and counts tokens.
        probs: What `next_token_logprobs` reports: one probability for each token asked for, or a function of a row's
            token ids that returns them. They may sum to less than 1, never to more.
        context_length: Prompts that leave fewer than two of these tokens are `prompt_too_long`.
        generate_errors: Exceptions to raise, by the number of the `generate` call (the first is 0).
        logprob_errors: The same for `next_token_logprobs`.
        model_id: Name for provenance.
        record_calls: Keep what each call was asked for. Turn it off for runs of any length in flat memory.

    Attributes:
        generate_calls: The settings of each `generate` call, prompts included, in order; calls that raised count.
            Empty without `record_calls`.
        logprob_calls: The token id lists of each `next_token_logprobs` call, likewise.

    Example:
        >>> from trl_tract.backends import ScriptedBackend
        >>> backend = ScriptedBackend(lambda prompt, seed: f"Seed {seed}. [RESULT] 4", tokenizer)  # doctest: +SKIP
        >>> backend.generate([[1, 2]], stop="[RESULT]")  # doctest: +SKIP
        [[Generation(text='Seed 0. ', finish_reason='stop', num_tokens=9)]]
    """

    name = "scripted"
    max_calls = 1

    def __init__(
        self,
        script: Script,
        tokenizer: PreTrainedTokenizerBase,
        *,
        probs: Probabilities | None = None,
        context_length: int | None = None,
        generate_errors: Mapping[int, Exception] | None = None,
        logprob_errors: Mapping[int, Exception] | None = None,
        model_id: str = "scripted",
        record_calls: bool = True,
    ) -> None:
        self.script = script
        self.tokenizer = tokenizer
        self.probs = probs
        self.context_length = context_length
        self.generate_errors = dict(generate_errors or {})
        self.logprob_errors = dict(logprob_errors or {})
        self.model_id = model_id
        self.record_calls = record_calls
        self.generate_calls: list[dict[str, Any]] = []
        self.logprob_calls: list[list[list[int]]] = []
        self._generate_number = itertools.count()
        self._logprob_number = itertools.count()
        self._texts_used = 0

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
        """Read `n` continuations of each prompt from the script; see `Backend.generate`.

        Raises:
            ValueError: An empty prompt, or a setting out of range.
            LookupError: The script has no text for a prompt, or none left.
        """
        settings = Sampling(**sampling)
        call = next(self._generate_number)
        if self.record_calls:
            self.generate_calls.append(
                {
                    "prompts": [list(prompt) for prompt in prompts],
                    "n": n,
                    "stop": stop,
                    "seed": seed if isinstance(seed, int) else list(seed),
                    **asdict(settings),
                }
            )
        if call in self.generate_errors:
            raise self.generate_errors[call]
        settings.check(n, stop)
        results = []
        # One seed for all stays what it is, so that a script can read it.
        seeds = [seed] * len(prompts) if isinstance(seed, int) else prompt_seeds(seed, len(prompts))
        ending = Ending(self.tokenizer, stop)
        for index, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts[{index}] is empty: there is nothing to continue")
            if self.context_length is not None and len(prompt) >= self.context_length - 1:
                results.append([Generation("", "prompt_too_long", 0)] * n)
            else:
                room = math.inf if self.context_length is None else self.context_length - len(prompt)
                limit = int(min(settings.max_new_tokens, room))
                asked = self.tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False)
                results.append(
                    [self._say(self._look_up(asked, seeds[index] + sample), ending, limit) for sample in range(n)]
                )
            if on_progress is not None:
                on_progress(1)
        return results

    def next_token_logprobs(
        self, token_id_lists: Sequence[Sequence[int]], token_ids: Sequence[int]
    ) -> NDArray[np.float64]:
        """Logarithms of the scripted probabilities; see `Backend.next_token_logprobs`.

        Raises:
            ValueError: No `probs` were scripted, or they are not one probability for each of `token_ids`.
        """
        call = next(self._logprob_number)
        rows = [list(row) for row in token_id_lists]
        if self.record_calls:
            self.logprob_calls.append(rows)
        if call in self.logprob_errors:
            raise self.logprob_errors[call]
        if self.probs is None:
            raise ValueError("no probabilities were scripted: pass ScriptedBackend(..., probs=...)")
        probs = np.empty((len(rows), len(token_ids)))
        for index, row in enumerate(rows):
            scripted = list(self.probs(row) if callable(self.probs) else self.probs)
            if len(scripted) != len(token_ids) or min(scripted, default=0) < 0 or sum(scripted) > 1 + 1e-9:
                raise ValueError(
                    f"row {index}: {scripted} are not {len(token_ids)} probabilities, one for each token asked for"
                )
            probs[index] = scripted
        with np.errstate(divide="ignore"):  # log(0) is -inf, as a model that rules a token out reports it.
            return np.log(probs)

    def _look_up(self, prompt: str, seed: int) -> str:
        if callable(self.script):
            return self.script(prompt, seed)
        if isinstance(self.script, Mapping):
            if prompt not in self.script:
                raise LookupError(f"the script has no text for the prompt {prompt!r}")
            return self.script[prompt]
        if self._texts_used == len(self.script):
            raise LookupError(f"all {len(self.script)} texts of the script have been used")
        self._texts_used += 1
        return self.script[self._texts_used - 1]

    def _say(self, text: str, ending: Ending, limit: int) -> Generation:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        written = ids[:limit]
        if len(ids) > limit:
            text = ending.decode(written)
        at_eos = len(ids) < limit
        stop = ending.stop
        place = None if stop is None else stop.place_in(text, whole=True)
        if stop is None or place is None:
            return Generation(text, "eos" if at_eos else "length", len(written) + at_eos, tuple(written))
        ends = range(1, len(written) + 1)
        count = bisect.bisect_left(ends, True, key=lambda end: stop.place_in(ending.decode(ids[:end])) is not None) + 1
        return Generation(text[:place], "stop", min(count, len(written) + at_eos), tuple(written[:count]))
