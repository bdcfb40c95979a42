"""Answers of a server of vLLM's dialect, taken apart: each belongs to its request, or is a ValueError.

Knows the fields; knows nothing of HTTP.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from trl_tract.backends.requests import Written

NO_PROBABILITY = -9999.0  # How vLLM writes minus infinity, which JSON lacks.


def json_object(answer: Any) -> dict[str, Any]:
    """An answer that is one."""
    if not isinstance(answer, dict):
        raise ValueError("not a JSON object")
    return answer


def served_models(answer: Any) -> dict[str, dict[str, Any]]:
    """Name of a model -> what the server says of it."""
    return {str(card["id"]): card for card in answer["data"]}


def context_length_of(card: Mapping[str, Any], served: Mapping[str, Mapping[str, Any]]) -> int | None:
    """Tokens of the context window; an adapter's card leaves it to its base's. None: it is not said."""
    base: Mapping[str, Any] = served.get(str(card.get("parent")), {})
    length = card.get("max_model_len") or base.get("max_model_len")
    return length if type(length) is int and length > 0 else None


def _choices(prompt: list[int], n: int, model: str, answer: Any) -> list[Any]:
    """The continuations of an answer that belongs to its request: the model, the prompt, their number."""
    read = answer["usage"]["prompt_tokens"]
    if read != len(prompt):
        raise ValueError(f"it read only {read} tokens of a prompt of {len(prompt)} tokens")
    if answer.get("model", model) != model:
        raise ValueError(f"it is an answer of the model {answer['model']!r}, not of {model!r}")
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(n)):
        raise ValueError(f"it holds {len(choices)} continuations instead of {n}")
    if any(choice["prompt_token_ids"] != prompt for choice in choices):
        raise ValueError("it is an answer to another prompt: its prompt_token_ids are not the ones sent")
    return choices


def read_written(prompt: list[int], n: int, limit: int, size: int, model: str, answer: Any) -> list[Written]:
    """The `n` continuations of a prompt, each of at most `limit` tokens of a vocabulary of `size`."""
    written = []
    for choice in _choices(prompt, n, model, answer):
        one = Written(choice["token_ids"], choice["text"], choice["finish_reason"], choice.get("stop_reason"))
        if one.finish_reason not in ("stop", "length") or not isinstance(one.text, str):
            raise ValueError(f"a continuation ended with {json.dumps(one.finish_reason)}")
        one.text.encode()  # a ValueError for half a character
        if not 0 < len(one.token_ids) <= limit:
            raise ValueError(f"a continuation has {len(one.token_ids)} tokens, more than the limit of {limit}")
        wrong = [token for token in one.token_ids if type(token) is not int or not 0 <= token < size]
        if wrong:
            raise ValueError(f"a continuation holds the token {wrong[0]!r}, outside the vocabulary of {size}")
        if type(one.stop_reason) is int and one.stop_reason != one.token_ids[-1]:
            raise ValueError(f"a continuation ended with token {one.token_ids[-1]}, for the token {one.stop_reason}")
        written.append(one)
    return written


def read_scores(prompt: list[int], token_ids: list[int], model: str, answer: Any) -> dict[int, float]:
    """Log-probabilities of the tokens that were asked for."""
    (choice,) = _choices(prompt, 1, model, answer)
    (shown,) = choice["logprobs"]["top_logprobs"]
    scores = {token: float(shown[f"token_id:{token}"]) for token in token_ids}
    for token, logprob in scores.items():
        if not logprob <= 1e-3:  # Also true of NaN.
            raise ValueError(f"token {token} has the log-probability {logprob}")
    return {token: -math.inf if logprob <= NO_PROBABILITY else min(logprob, 0.0) for token, logprob in scores.items()}
