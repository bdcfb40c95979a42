"""Chat endpoints of the OpenAI kind: messages in, text out. No tokens and no log-probabilities, so no `Backend`.

Knows the request; `http.py` sends and repeats it.
"""

import math
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Unpack

from trl_tract.backends.base import FinishReason, Generation, Sampling, SamplingOptions
from trl_tract.backends.http import JSONServer
from trl_tract.backends.request_loop import RequestLoop

_BLOCK = 64  # Prompts that a caller is expected to hand over at a time.
_BYTES_A_TOKEN = 64  # of an answer, at most


class ChatBackend:
    """A model behind `/v1/chat/completions`: it writes rationales for `CoTBootstrap`, and judges nothing.

    Requests are repeated while the endpoint is away, overloaded, or asks to wait.

    Args:
        base_url: Such as `https://api.openai.com/v1` or `http://localhost:11434/v1`.
        model: Name of the model there.
        api_key_env: Environment variable that holds the API key, if there is one.
        options: More fields of each request, such as `{"reasoning_effort": "low"}`; None takes a field out:
            `{"max_tokens": None, "max_completion_tokens": 1000}`.
        max_concurrency: Requests under way at once.
        timeout: Seconds that one request may take.
        retry_seconds: How long a request is repeated without an answer before the call fails.
        retry_delay: Seconds before the first repetition; doubled up to 30.

    Attributes:
        tokenizer: None: what the model's tokens are is not known.

    Raises:
        ValueError: An address or a setting that is none.
    """

    name = "chat"
    tokenizer = None

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        options: Mapping[str, Any] | None = None,
        max_concurrency: int = 16,
        timeout: float = 600.0,
        retry_seconds: float = 900.0,
        retry_delay: float = 1.0,
    ) -> None:
        self.model_id = model
        self.options = dict(options or {})
        self._server = JSONServer(
            base_url, key_variable=api_key_env, timeout=timeout, retry_seconds=retry_seconds, retry_delay=retry_delay
        )
        self._requests = RequestLoop(max_concurrency)
        self.max_calls = 1 + math.ceil(max_concurrency / _BLOCK)
        self._closing = weakref.finalize(self, _shut, self._requests, self._server)

    def write(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        *,
        tools: Sequence[Any] = (),
        n: int = 1,
        seed: int = 0,
        on_progress: Callable[[int], None] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[list[Generation]]:
        """`n` answers to each conversation, each by a request of its own.

        Args:
            conversations: Messages with `role` and `content`.
            tools: Those that each conversation knows of, or None; the model is told not to call them.
            n: Answers to each.
            seed: Sent along, counted on for each answer; endpoints honour it more or less.
            on_progress: Called with the number of conversations that have just been answered.
            **sampling: Fields of `Sampling`. A `repetition_penalty` is no field of this API and is not sent.

        Raises:
            RuntimeError: An answer that cannot be read, or `cancel` or `close` was called.
            ConnectionError: No answer for `retry_seconds`.
        """
        settings = Sampling(**sampling)
        settings.check(n, None)
        requests: list[Callable[[], Awaitable[Generation]]] = []
        for number, messages in enumerate(conversations):
            known = {"tools": tools[number], "tool_choice": "none"} if tools and tools[number] else {}
            for sample in range(n):
                body = {
                    "model": self.model_id,
                    "messages": [dict(message) for message in messages],
                    "max_tokens": settings.max_new_tokens,
                    "temperature": settings.temperature,
                    "top_p": settings.top_p,
                    "seed": (seed + number * n + sample) % 2**31,
                    **known,
                    **self.options,
                }
                body = {name: value for name, value in body.items() if value is not None}
                limit = settings.max_new_tokens * _BYTES_A_TOKEN + 2**20
                requests.append(
                    partial(
                        self._server.ask,
                        "POST",
                        "/chat/completions",
                        body,
                        read_answer,
                        retry_seconds=self._server.retry_seconds,
                        limit=limit,
                    )
                )
        arrived = [0] * len(conversations)

        def note(request: int, _: Generation) -> None:
            arrived[request // n] += 1
            if on_progress is not None and arrived[request // n] == n:
                on_progress(1)

        answers = self._requests.run(requests, note)
        return [answers[start : start + n] for start in range(0, len(answers), n)]

    def fingerprint(self) -> dict[str, str]:
        """What is known of the model's identity: where it is."""
        return {"endpoint": self._server.url, **{f"request {name}": str(value) for name, value in self.options.items()}}

    def cancel(self) -> None:
        """Cancel the requests of all calls under way, such as after Ctrl-C; those calls end with a RuntimeError."""
        self._requests.cancel()

    def close(self) -> None:
        """Close the connections. Calls under way end with a RuntimeError; more than once does no harm."""
        self._closing()


def read_answer(answer: Any) -> Generation:
    """The text of a chat completion."""
    choice = answer["choices"][0]
    text = choice["message"].get("content")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"the content is {type(text).__name__}, not text")
    usage = answer.get("usage") or {}
    reason: FinishReason = "length" if choice.get("finish_reason") == "length" else "eos"
    return Generation(text or "", reason, int(usage.get("completion_tokens") or 0))


def _shut(loop: RequestLoop, server: JSONServer) -> None:
    loop.cancel()
    loop.wait_for(server.close())
    loop.close()
