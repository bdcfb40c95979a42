"""What backends share that send one request a prompt to an engine which joins them into batches of its own.

Knows prompts, limits, order and progress; the engine is the subclass's.
"""

import math
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Self, Unpack

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from trl_tract.backends.base import Backend, Generation, Sampling, SamplingOptions, prompt_seeds
from trl_tract.backends.request_loop import RequestLoop
from trl_tract.backends.stop_text import LEAST_MASS, Doubt, Ending
from trl_tract.backends.tokens import checked_ids

MAX_LOGPROB_IDS = 128  # vLLM's bound on `logprob_token_ids` of one request.
_BLOCK = 64  # Prompts that a caller is expected to hand over at a time.


@dataclass(frozen=True)
class Written:
    """One continuation as vLLM reports it, in process and over HTTP alike.

    Attributes:
        token_ids: Every token sampled, with the end-of-sequence token or the stop text's tokens.
        stop_reason: The stop string, another end-of-sequence token than the first, or None.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    stop_reason: str | int | None


class RequestBackend(Backend):
    """A backend whose engine serves many requests at once, from any number of threads.

    Attributes:
        max_calls: Calls that it takes to keep the engine busy while the last continuations of some are being written.
        context_length: Tokens of prompt and continuation together.
    """

    name: str
    most_strings: float = math.inf
    """Stop strings that the engine takes in one request."""

    def __init__(
        self,
        model_id: str,
        tokenizer: PreTrainedTokenizerBase,
        loop: RequestLoop,
        *,
        context_length: int,
        vocabulary: int,
        concurrency: int,
        request_seeds: bool,
    ) -> None:
        self.model_id = model_id
        self.tokenizer = tokenizer
        self.context_length = context_length
        # Twice what runs at once, so that a block's stragglers never leave the engine waiting; and two more.
        self.max_calls = 2 + math.ceil(2 * concurrency / _BLOCK)
        self._vocabulary = vocabulary
        self._requests = loop
        self._request_seeds = request_seeds

    @abstractmethod
    async def _sample(
        self, prompt: list[int], n: int, stop: Sequence[str], settings: Sampling, seed: int | None, special: bool
    ) -> list[Written] | None:
        """Sample `n` continuations; None where the engine finds the prompt too long after all.

        Each may end at any of the strings `stop`, of which special tokens are a part if `special`.
        """

    @abstractmethod
    async def _score(self, prompt: list[int], token_ids: list[int]) -> Mapping[int, float] | None:
        """Log-probabilities of up to MAX_LOGPROB_IDS different tokens; None where the prompt is too long after all."""

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
        """Sample `n` continuations of each prompt; see `Backend.generate`.

        A `stop` that was only mentioned costs a request more. `seed` is used with `request_seeds` alone: otherwise the
        engine's own seed decides, and what else it does at the time. vLLM raises temperatures between 0 and 0.01 to
        0.01.

        Raises:
            ValueError: A setting out of range, or a prompt that is empty or holds an id outside the vocabulary.
            RuntimeError: The engine failed, or `cancel` or `close` was called.
        """
        settings = Sampling(**sampling)
        settings.check(n, stop)
        rows = checked_ids(prompts, "prompts", self._vocabulary)
        seeds = prompt_seeds(seed, len(rows))
        ending = Ending(self.tokenizer, stop)
        results: list[list[Generation]] = [[Generation("", "prompt_too_long", 0)] * n for _ in rows]
        numbers: list[int] = []
        requests: list[Callable[[], Awaitable[list[Generation] | None]]] = []
        for number, row in enumerate(rows):
            room = self.context_length - len(row)
            if room < 2:
                continue
            limited = replace(settings, max_new_tokens=min(settings.max_new_tokens, room))
            own_seed = seeds[number] if self._request_seeds else None
            numbers.append(number)
            requests.append(partial(self._write, row, n, ending, limited, own_seed))
        if on_progress is not None and len(numbers) < len(rows):
            on_progress(len(rows) - len(numbers))

        def arrived(request: int, written: list[Generation] | None) -> None:
            if written is not None:
                results[numbers[request]] = written
            if on_progress is not None:
                on_progress(1)

        self._requests.run(requests, arrived)
        return results

    def next_token_logprobs(
        self, token_id_lists: Sequence[Sequence[int]], token_ids: Sequence[int]
    ) -> NDArray[np.float64]:
        """Log-probabilities of `token_ids` as the next token; see `Backend.next_token_logprobs`.

        More than 128 tokens take several requests a row.
        """
        rows = checked_ids(token_id_lists, "token_id_lists", self._vocabulary)
        (wanted,) = checked_ids([token_ids], "token_ids", self._vocabulary)
        logprobs = np.full((len(rows), len(wanted)), np.nan)
        different = list(dict.fromkeys(wanted))
        parts = [different[start : start + MAX_LOGPROB_IDS] for start in range(0, len(different), MAX_LOGPROB_IDS)]
        places = {token: [column for column, id_ in enumerate(wanted) if id_ == token] for token in different}
        asked = [(number, part) for number, row in enumerate(rows) if len(row) < self.context_length for part in parts]

        def arrived(request: int, scored: Mapping[int, float] | None) -> None:
            if scored is not None:
                number, part = asked[request]
                for token in part:
                    logprobs[number, places[token]] = scored[token]

        self._requests.run([partial(self._score, rows[number], part) for number, part in asked], arrived)
        return logprobs

    def cancel(self) -> None:
        """Cancel the requests of all calls under way, such as after Ctrl-C; those calls end with a RuntimeError."""
        self._requests.cancel()

    @abstractmethod
    def close(self) -> None:
        """Give back what the engine holds. Calls under way end with a RuntimeError; more than once does no harm."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _write(
        self, prompt: list[int], n: int, ending: Ending, settings: Sampling, seed: int | None
    ) -> list[Generation] | None:
        strings = [] if ending.stop is None else ending.stop.strings
        if ending.stop is not None and len(strings) > self.most_strings:
            strings = [str(ending.stop)]  # what follows is then asked for by itself, a token at a time
        special = ending.shows_special
        written = await self._sample(prompt, n, strings, settings, seed, special)
        if written is None:
            return None
        generations = []
        for one in written:
            ids = one.token_ids
            # An engine stops at every mention of the stop text: go on past those that do not count. Whether a word is
            # that of a score, the next token says.
            reached: bool | None = False
            while (_at(strings, one) or reached is None) and len(ids) < settings.max_new_tokens:
                reached = self._is_reached(ids, ending)
                if reached:
                    break
                left = 1 if reached is None else settings.max_new_tokens - len(ids)
                asked = replace(settings, max_new_tokens=left)
                more = await self._sample([*prompt, *ids], 1, strings, asked, seed, special)
                if more is None:
                    break
                (one,) = more
                ids = [*ids, *one.token_ids]
                if one.finish_reason == "stop" and not _at(strings, one):
                    break  # the end of its turn
            at_stop = _at(strings, one)
            at_eos = one.finish_reason == "stop" and not at_stop
            taken = await self._taken(prompt, ids[:-1] if at_eos else ids, ending)
            generation = ending.finish(ids, at_eos=at_eos, taken=taken)
            if at_stop and generation.finish_reason != "stop" and self._is_reached(ids, ending):
                # The ids spell the stop text only behind the prompt's last token: the engine saw it, take its cut.
                generation = Generation(one.text, "stop", len(ids), tuple(ids))
            generations.append(generation)
        return generations

    async def _taken(self, prompt: list[int], ids: list[int], ending: Ending) -> int | None:
        """Where the stop text counts although another text was sampled behind it, since a score was to be expected."""
        for place, follows in ending.occurrences(ids, ending.decode(ids), whole=True):
            if follows is True or ending.stop is None:
                break
            if isinstance(follows, Doubt):
                asked = sorted(set(ending.stop.begins))[:MAX_LOGPROB_IDS]
                scored = await self._score([*prompt, *ids[: follows.count]], asked)
                if scored is None or sum(map(math.exp, scored.values())) >= LEAST_MASS:
                    return place
        return None

    @staticmethod
    def _is_reached(ids: Sequence[int], ending: Ending) -> bool | None:
        """Whether the stop text, at which the engine stopped, counts anywhere; None if the next token has to tell."""
        text = ending.decode(ids)
        if ending.stop is None or ending.stop not in text:
            return True
        follows = [ending.stop.follows(text[place:]) for place in ending.stop.places_in(text)]
        return True in follows or (None if None in follows[-1:] else False)


def _at(strings: Sequence[str], written: Written) -> bool:
    return written.finish_reason == "stop" and written.stop_reason in strings
