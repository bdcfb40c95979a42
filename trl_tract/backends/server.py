"""Generation and exact log-probabilities from a server with vLLM's OpenAI-compatible completions.

Knows the requests and how answers are taken apart; `http.py` sends and repeats them.
"""

import json
import math
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_tract.backends.base import Sampling
from trl_tract.backends.http import JSONServer, Refused
from trl_tract.backends.loading import load_tokenizer
from trl_tract.backends.request_loop import RequestLoop
from trl_tract.backends.requests import RequestBackend, Written

_PROBE = "Score the reply from 1 to 5."
_UPGRADE = (
    "it must give exact log-probabilities of chosen tokens (`logprob_token_ids`) and token ids (`return_token_ids`) on "
    "/v1/completions, as vLLM 0.32 does: upgrade it with pip install -U vllm"
)
_START_SECONDS = 30.0
# The last is what vLLM says to a prompt that fills the window to the last token.
_TOO_LONG = re.compile(
    r"context (length|window)|max(imum)?[_ ]model[_ ]len|max_tokens must be at least 1, got 0", re.IGNORECASE
)
_NO_PROBABILITY = -9999.0  # How vLLM writes minus infinity, which JSON lacks.


class ServerBackend(RequestBackend):
    """A model behind a server that speaks vLLM's dialect of the OpenAI API.

    Start one, in an environment of its own if need be, with

        vllm serve MODEL --port 8000

    and for an adapter, under a name that is then the `model` here,

        vllm serve BASE --enable-lora --lora-modules NAME=DIRECTORY --max-lora-rank RANK

    Requests are repeated while the server is away, overloaded or answers nonsense. A prompt is sent as token ids, and
    an answer counts only if it says that it belongs to as many.

    Attributes:
        name: `"server"`.
        model_id: What the server says that it loaded, or else `model`.
        model: The name under which the server offers the model.
    """

    name = "server"

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
        for setting, value in (
            ("max_concurrency", max_concurrency),
            ("timeout", timeout),
            ("retry_delay", retry_delay),
        ):
            if not value > 0:
                raise ValueError(f"{setting}={value} must be above 0")
        if retry_seconds < 0:
            raise ValueError(f"retry_seconds={retry_seconds} must be 0 (never repeat a request) or more")
        self.model = model
        self._retry_seconds = retry_seconds
        self._server = JSONServer(base_url, key_variable=api_key_env, timeout=timeout, retry_delay=retry_delay)
        loop = RequestLoop(max_concurrency)
        self._closing = weakref.finalize(self, _shut, loop, self._server)
        try:
            served = loop.wait_for(self._ask_once("GET", "/models", None, _served_models))
            card = _card(served, model, self._server.url)
            context_length = context_length or _context_length(card, served)
            if context_length is None:
                raise ValueError(f"{self._server.url} does not say how long {model}'s context is: pass context_length=")
            tokenizer = tokenizer or _find_tokenizer(model, card, served)
            super().__init__(
                str(card.get("root") or model),
                tokenizer,
                loop,
                context_length=context_length,
                vocabulary=len(tokenizer),
                concurrency=max_concurrency,
                request_seeds=request_seeds,
            )
            loop.wait_for(self._check_server())
        except BaseException:
            self._closing()
            raise

    def close(self) -> None:
        """Close the connections. Calls under way end with a RuntimeError; more than once does no harm."""
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
        read = partial(_read_written, prompt, n, settings.max_new_tokens)
        written: list[Written] | None = await self._complete(body, read)
        return written

    async def _score(self, prompt: list[int], token_ids: list[int]) -> Mapping[int, float] | None:
        read = partial(_read_scores, prompt, token_ids)
        scores: dict[int, float] | None = await self._complete(self._scoring(prompt, token_ids), read)
        return scores

    async def _complete(self, body: Mapping[str, Any], read: Callable[[Any], Any]) -> Any:
        try:
            return await self._server.ask("POST", "/completions", body, read, retry_seconds=self._retry_seconds)
        except Refused as refused:
            if refused.status == 400 and _TOO_LONG.search(refused.reason):
                return None
            raise

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
        return await self._server.ask(method, path, body, read, retry_seconds=min(_START_SECONDS, self._retry_seconds))

    async def _check_server(self) -> None:
        """Refuse a server whose log-probabilities cannot be relied on, or whose tokens are others."""
        expected = self.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        chosen = sorted({0, len(self.tokenizer) // 2, len(self.tokenizer) - 1})
        body = {**self._scoring(_PROBE, chosen), "add_special_tokens": False}
        try:
            answer = await self._ask_once("POST", "/completions", body, _is_json_object)
            choice = answer["choices"][0]
            seen, (written,) = choice["prompt_token_ids"], choice["token_ids"]
            (best,) = choice["logprobs"]["token_logprobs"]
            scores = _read_scores(seen, chosen, answer)
        except Refused as refused:
            if refused.status not in (400, 422):
                raise
            raise ValueError(f"{refused}: {_UPGRADE}") from None
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._server.url} answers a probe without what a judge needs ({error!r}): {_UPGRADE}"
            ) from None
        # The likeliest token has at least the mean probability, and no token more: logits rarely look like that.
        if not -math.log(len(self.tokenizer)) - 1 <= best <= 1e-3 or max(scores.values()) > best + 1e-3:
            raise ValueError(
                f"{self._server.url} reports {best} for the likeliest token ({written}): that is no log-probability. "
                "Start it with --logprobs-mode raw_logprobs, vLLM's default"
            )
        if seen != expected:
            raise ValueError(
                f"{self._server.url} reads {_PROBE!r} as the tokens {seen}, the tokenizer here as {expected}: pass "
                f"tokenizer=, the one that {self.model} was trained with, and serve the model with it"
            )


def _shut(loop: RequestLoop, server: JSONServer) -> None:
    loop.cancel()
    loop.wait_for(server.close())
    loop.close()


def _is_json_object(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise ValueError("not a JSON object")
    return answer


def _served_models(answer: Any) -> dict[str, dict[str, Any]]:
    return {str(card["id"]): card for card in answer["data"]}


def _card(served: Mapping[str, dict[str, Any]], model: str, url: str) -> dict[str, Any]:
    if model not in served:
        raise ValueError(f"{url} does not serve {model!r}, but {', '.join(map(repr, served)) or 'nothing'}")
    return served[model]


def _context_length(card: Mapping[str, Any], served: Mapping[str, Mapping[str, Any]]) -> int | None:
    """An adapter's card leaves it to its base's."""
    base: Mapping[str, Any] = served.get(str(card.get("parent")), {})
    return card.get("max_model_len") or base.get("max_model_len")


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
    raise ValueError(f"no tokenizer can be loaded from {', '.join(places)}: pass tokenizer=, the one of {model}")


def _choices(prompt: list[int], n: int, answer: Any) -> list[Any]:
    read = answer["usage"]["prompt_tokens"]
    if read != len(prompt):
        raise ValueError(f"it read {read} tokens of a prompt of {len(prompt)}")
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(n)):
        raise ValueError(f"it holds {len(choices)} continuations of {n}")
    return choices


def _read_written(prompt: list[int], n: int, limit: int, answer: Any) -> list[Written]:
    written = []
    for choice in _choices(prompt, n, answer):
        one = Written(choice["token_ids"], choice["text"], choice["finish_reason"], choice.get("stop_reason"))
        if one.finish_reason not in ("stop", "length") or not isinstance(one.text, str):
            raise ValueError(f"a continuation ended with {json.dumps(one.finish_reason)}")
        if not 0 < len(one.token_ids) <= limit or not all(
            type(token) is int and 0 <= token < 2**31 for token in one.token_ids
        ):
            raise ValueError(f"a continuation has {len(one.token_ids)} tokens of at most {limit}")
        written.append(one)
    return written


def _read_scores(prompt: list[int], token_ids: list[int], answer: Any) -> dict[int, float]:
    (choice,) = _choices(prompt, 1, answer)
    (shown,) = choice["logprobs"]["top_logprobs"]
    scores = {token: float(shown[f"token_id:{token}"]) for token in token_ids}
    for token, logprob in scores.items():
        if not logprob <= 1e-3:  # Also true of NaN.
            raise ValueError(f"token {token} has the log-probability {logprob}")
    return {token: -math.inf if logprob <= _NO_PROBABILITY else min(logprob, 0.0) for token, logprob in scores.items()}
