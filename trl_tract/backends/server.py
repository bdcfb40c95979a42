"""Generation and exact log-probabilities from a server with vLLM's OpenAI-compatible completions.

Knows the requests; `http.py` sends and repeats them, `answers.py` takes the answers apart.
"""

import asyncio
import math
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_tract.backends.answers import (
    NO_PROBABILITY,
    context_length_of,
    json_object,
    read_scores,
    read_written,
    served_models,
)
from trl_tract.backends.base import Sampling
from trl_tract.backends.http import JSONServer, Refused
from trl_tract.backends.loading import load_tokenizer, tokenizer_fingerprint
from trl_tract.backends.request_loop import RequestLoop
from trl_tract.backends.requests import RequestBackend, Written
from trl_tract.backends.vllm_versions import OLDEST_SERVER
from trl_tract.text.probes import same_answers

_PROBE = "Score the reply from 1 to 5."
_PROBED = 16  # tokens whose log-probabilities behind the probe tell one model from another
_PROBE_EVERY = 60.0  # seconds
_RESTART = 1.0  # seconds that no server needs less of to come back with another model
_UPGRADE = (
    "/v1/completions must return exact log-probabilities of chosen tokens (`logprob_token_ids`) and token ids "
    f"(`return_token_ids`), as in vLLM {OLDEST_SERVER} or later. Upgrade with pip install -U vllm, and start it "
    "without --speculative-config. llama.cpp's server ignores `logprob_token_ids` and cannot be used"
)
_START_SECONDS = 30.0
_BYTES_A_TOKEN = 64  # of an answer, at most: its id, its text, and its part of the prompt that comes back
# The last is what vLLM says to a prompt that fills the window to the last token.
_TOO_LONG = re.compile(
    r"context (length|window)|max(imum)?[_ ]model[_ ]len|max_tokens must be at least 1, got 0", re.IGNORECASE
)


class ServerBackend(RequestBackend):
    """A model on a server with vLLM's OpenAI-compatible API.

    Start the server, in a separate environment if needed:

        vllm serve MODEL --port 8000

    For an adapter, NAME is the `model` to pass here:

        vllm serve BASE --enable-lora --lora-modules NAME=DIRECTORY --max-lora-rank RANK

    Requests are retried while the server is unreachable, overloaded or returns invalid answers. Prompts are sent as
    token ids, and an answer is accepted only if it names this model and these ids. A test request at the start, after
    an outage and every minute detects another model under the same name. Use a separate server for each judge, because
    requests of other clients can affect its results.

    Attributes:
        model_id: The model that the server reports as loaded, or else `model`.
        model: Name of the model on the server.
    """

    name = "server"
    most_strings = 4  # as vLLM's HTTP API has it, and OpenAI's

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_concurrency: int = 64,
        timeout: float = 600.0,
        retry_seconds: float = 900.0,
        retry_delay: float = 0.5,
        api_key_env: str = "VLLM_API_KEY",
        context_length: int | None = None,
        request_seeds: bool = False,
    ) -> None:
        """Ask the server what it serves, and whether its log-probabilities are exact.

        Args:
            base_url: Such as `http://localhost:8000/v1`.
            model: Name of the model, as the server offers it.
            tokenizer: Of that model; by default loaded from where the server says it found the model, or from `model`.
                Compared with the server's own.
            max_concurrency: Requests under way at once, of all calls together.
            timeout: Seconds that one request may take, the time in the server's queue included.
            retry_seconds: How long a request is repeated without an answer before the call fails. Longer than a restart
                of the server takes, or a run does not survive one.
            retry_delay: Seconds before the first repetition; doubled up to 30.
            api_key_env: Environment variable that holds the API key, if the server wants one.
            context_length: Tokens of prompt and continuation together, for a server that does not say.
            request_seeds: Send a seed with each request, so that a prompt's text no longer depends on what else is
                being written. vLLM's CPU engine can die of such requests.

        Raises:
            ValueError: The address, a setting, a model that is not served, another tokenizer than the server's, or a
                server that cannot give exact log-probabilities.
            ConnectionError: Nothing answers there for 30 seconds.
        """
        self.model = model
        self._fingerprint: dict[str, str] = {}
        self._agrees = False
        self._server = JSONServer(
            base_url, key_variable=api_key_env, timeout=timeout, retry_seconds=retry_seconds, retry_delay=retry_delay
        )
        loop = RequestLoop(max_concurrency)
        self._closing = weakref.finalize(self, _shut, loop, self._server)
        try:
            served = loop.wait_for(self._ask_once("GET", "/models", None, served_models))
            card = self._card(served)
            context_length = context_length or context_length_of(card, served)
            if context_length is None:
                raise ValueError(
                    f"{self._server.url} does not report the context length of {model}. Pass context_length="
                )
            tokenizer = tokenizer or _find_tokenizer(model, card, served)
            super().__init__(
                self._server.public(str(card.get("root") or model)),
                tokenizer,
                loop,
                context_length=context_length,
                vocabulary=len(tokenizer),
                concurrency=max_concurrency,
                request_seeds=request_seeds,
            )
            self._probing = asyncio.Lock()
            self._probed_at = -math.inf
            loop.wait_for(self._check_model())
        except BaseException:
            self._closing()
            raise

    def fingerprint(self) -> dict[str, str]:
        """What the server said of the model at the start, and answered to the probe (compare with `same_answers`).

        The tokenizer and its chat template are this side's, so they are told as those of a loaded model.
        """
        return self._fingerprint | tokenizer_fingerprint(self.tokenizer)

    def close(self) -> None:
        """Close the connections. Pending calls raise a RuntimeError. Can be called more than once."""
        self._closing()

    async def _sample(
        self, prompt: list[int], n: int, stop: Sequence[str], settings: Sampling, seed: int | None, special: bool
    ) -> list[Written] | None:
        body = {
            **self._neutral(prompt),
            "n": n,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "repetition_penalty": settings.repetition_penalty,
        }
        if stop:
            body["stop"] = list(stop)
        if special:
            body["skip_special_tokens"] = False
        if seed is not None:
            body["seed"] = seed
        read = partial(read_written, prompt, n, settings.max_new_tokens, self._vocabulary)
        written: list[Written] | None = await self._complete(body, read)
        return written

    async def _score(self, prompt: list[int], token_ids: list[int]) -> Mapping[int, float] | None:
        def read(model: str, answer: Any) -> dict[int, float]:
            scores = read_scores(prompt, token_ids, model, answer)
            self._check_likeliest(answer["choices"][0], scores)
            return scores

        scores: dict[int, float] | None = await self._complete(self._scoring(prompt, token_ids), read)
        return scores

    def _check_likeliest(self, choice: Mapping[str, Any], scores: Mapping[int, float]) -> None:
        """The token that was written is told twice where it was asked for: if ever these agreed, they have to.

        Where the probabilities are none in any case, the item that they are of is told so.
        """
        (written,), (told,) = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if written in scores and sum(map(math.exp, scores.values())) <= 1 + 1e-3:
            agrees = abs(scores[written] - told) < 1e-2
            if self._agrees and not agrees:
                raise ValueError(f"token {written} has the log-probability {told} and {scores[written]}")
            self._agrees |= agrees

    async def _complete(self, body: Mapping[str, Any], read: Callable[[str, Any], Any]) -> Any:
        tokens = body.get("n", 1) * (len(body["prompt"]) + body["max_tokens"])
        try:
            answer = await self._server.ask(
                "POST",
                "/completions",
                body,
                partial(read, self.model),
                retry_seconds=self._server.retry_seconds,
                limit=2**20 + _BYTES_A_TOKEN * tokens,
            )
        except Refused as refused:
            if refused.status == 400 and _TOO_LONG.search(refused.reason):
                return None
            raise
        await self._check_model()  # before the answer counts
        return answer

    def _neutral(self, prompt: list[int] | str) -> dict[str, Any]:
        # A server fills in what is left out from the checkpoint's generation_config.json.
        return {
            "model": self.model,
            "prompt": prompt,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "return_token_ids": True,
        }

    def _scoring(self, prompt: list[int] | str, token_ids: list[int]) -> dict[str, Any]:
        return {
            **self._neutral(prompt),
            "max_tokens": 1,
            "logprobs": 0,
            "logprob_token_ids": token_ids,
            "return_tokens_as_token_ids": True,
        }

    async def _ask_once(
        self, method: str, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], Any]
    ) -> Any:
        # Later on, a server may be away for as long as in any other request.
        patience = self._server.retry_seconds if self._fingerprint else min(_START_SECONDS, self._server.retry_seconds)
        return await self._server.ask(method, path, body, read, retry_seconds=patience)

    async def _check_model(self) -> None:
        """Look whether the server has the model that it had at the start, if it may have changed."""
        clock = asyncio.get_running_loop().time
        async with self._probing:
            if self._server.longest_silence < _RESTART and clock() < self._probed_at + _PROBE_EVERY:
                return
            self._server.longest_silence = 0.0
            card = self._card(await self._ask_once("GET", "/models", None, served_models))
            now = {
                "served model": self.model,
                "root": self._server.public(str(card.get("root"))),
                "answers": await self._probe(),
            }
            first = self._fingerprint = self._fingerprint or now
            changed = [
                f"{name}: {first[name]}, now {now[name]}" for name in now if not same_answers(first[name], now[name])
            ]
            if changed:
                raise RuntimeError(
                    f"{self._server.url} now serves another model under the name {self.model!r} "
                    f"({'; '.join(changed)}). Serve the first model again, or use another output directory"
                )
            self._probed_at = clock()

    async def _probe(self) -> str:
        """Log-probabilities of a few tokens behind a fixed text.

        Raises:
            ValueError: They cannot be relied on, or the server's tokens are others than the tokenizer's.
        """
        expected = self.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        size = len(self.tokenizer)
        chosen = sorted({place * (size - 1) // (_PROBED - 1) for place in range(_PROBED)})
        body = {**self._scoring(_PROBE, chosen), "add_special_tokens": False}
        url, public = self._server.url, self._server.public
        try:
            answer = await self._ask_once("POST", "/completions", body, json_object)
            choice = answer["choices"][0]
            seen, (written,) = choice["prompt_token_ids"], choice["token_ids"]
            (best,) = choice["logprobs"]["token_logprobs"]
            scores = read_scores(seen, chosen, self.model, answer)
            # The likeliest token has at least the mean probability, and no token more: logits rarely look like that.
            is_likely = -math.log(size) - 1 <= best <= 1e-3 and max(scores.values()) <= best + 1e-3
        except Refused as refused:
            if refused.status not in (400, 422):
                raise
            raise ValueError(f"{refused}: {_UPGRADE}") from None
        except ConnectionError as error:
            if "HTTP 500" not in str(error) or self._fingerprint:
                raise
            raise ConnectionError(f"{error}. The server must support score requests: {_UPGRADE}") from None
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{url} answers a test request without what a judge needs ({public(repr(error))}): {_UPGRADE}"
            ) from None
        if not is_likely:
            raise ValueError(
                f"{url} reports {public(str(best))} for the likeliest token ({public(str(written))}), which is not a "
                "log-probability. Start the server with --logprobs-mode raw_logprobs, vLLM's default"
            )
        if seen != expected:
            raise ValueError(
                f"{url} reads {_PROBE!r} as the tokens {public(str(seen))}, but the local tokenizer as {expected}. "
                f"Pass tokenizer=, the one that {self.model} was trained with, and serve the model with the same one"
            )
        return "~ " + " ".join(f"{max(score, NO_PROBABILITY):.3f}" for score in scores.values())

    def _card(self, served: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        if self.model not in served:
            others = ", ".join(map(repr, served)) or "nothing"
            raise ValueError(f"{self._server.url} does not serve {self.model!r}, but {self._server.public(others)}")
        return served[self.model]


def _shut(loop: RequestLoop, server: JSONServer) -> None:
    loop.cancel()
    loop.wait_for(server.close())
    loop.close()


def _find_tokenizer(
    model: str, card: Mapping[str, Any], served: Mapping[str, Mapping[str, Any]]
) -> PreTrainedTokenizerBase:
    base: Mapping[str, Any] = served.get(str(card.get("parent")), {})
    places = list(dict.fromkeys(str(place) for place in (card.get("root"), base.get("root"), model) if place))
    for place in places:
        try:
            return load_tokenizer(place)
        except (OSError, ValueError):
            continue
    raise ValueError(
        f"no tokenizer can be loaded from {', '.join(places)}. Pass the tokenizer of {model} as tokenizer="
    )
