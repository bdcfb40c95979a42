"""A judge wherever it is: in this process, or behind a server. Knows both; knows no framework."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from trl_tract.integrations.batcher import Batcher
from trl_tract.integrations.forms import Answer, Item, answer
from trl_tract.integrations.serving import KEY_VARIABLE
from trl_tract.judge.judge import CoTRAILJudge
from trl_tract.text.secrets import key_of

Ask = Callable[[Item], Answer]
"""Judges one item, and may be called from many threads at once: what arrives together is judged together."""
_AGAIN = (429, 502, 503, 504)
_loaded: dict[tuple[str, str], Ask] = {}


def reach(judge: CoTRAILJudge | str, *, patience: float = 600.0, **settings: Any) -> Ask:
    """How to ask a judge.

    Args:
        judge: A judge; its directory or hub id, loaded once for each choice of settings; or the address of
            `trl-tract serve`, whose key is that of the environment variable TRL_TRACT_API_KEY.
        patience: Seconds for which a server that is away or busy is asked again.
        **settings: Arguments of `CoTRAILJudge` where it is loaded here.

    Raises:
        ValueError: Settings for a judge that is loaded already.
    """
    if not isinstance(judge, str):
        if settings:
            raise ValueError(f"{', '.join(settings)}: this judge is already loaded. Create it with these settings")
        return _local(judge)
    if judge.startswith(("http://", "https://")):
        if settings:
            raise ValueError(f"{', '.join(settings)}: give these options to trl-tract serve, which starts {judge}")
        return _remote(judge, patience)
    key = (judge, json.dumps(settings, sort_keys=True, default=str))
    if key not in _loaded:
        _loaded[key] = _local(CoTRAILJudge.from_pretrained(judge, **settings))
    return _loaded[key]


def _local(judge: CoTRAILJudge) -> Ask:
    batcher = Batcher(judge, max_queue=2**20, linger=0.02)

    def ask(item: Item) -> Answer:
        (future,) = batcher.submit([item.row(judge)], [item.seed])
        return answer(future.result(), judge.scales)

    return ask


def _remote(url: str, patience: float) -> Ask:
    address = url.rstrip("/").removesuffix("/judge") + "/judge"
    headers = {"Content-Type": "application/json"}
    if key := key_of(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"

    def ask(item: Item) -> Answer:
        body = json.dumps(item.model_dump(exclude_unset=True)).encode()
        until, delay = time.monotonic() + patience, 0.5
        while True:
            try:
                with urllib.request.urlopen(urllib.request.Request(address, body, headers)) as told:
                    return Answer.model_validate_json(told.read())
            except urllib.error.HTTPError as error:
                reason = _reason(error)
                if error.code not in _AGAIN or time.monotonic() > until:
                    raise RuntimeError(f"{address} answers HTTP {error.code}: {reason}") from None
                delay = max(delay, float(error.headers.get("Retry-After") or 0))
            except OSError as error:
                if time.monotonic() > until:
                    raise ConnectionError(f"{address} does not answer: {error}") from error
            time.sleep(delay)
            delay = min(2 * delay, 10.0)

    return ask


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read(2**16))["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return str(error.reason)
