"""JSON over HTTP to one server that may be busy, restarting or confused. Knows nothing of models.

A request is repeated until it is answered or its time is used up. Time is the event loop's monotonic clock: a system
clock that jumps changes nothing.
"""

import asyncio
import base64
import html
import json
import logging
import math
import random
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import aiohttp

from trl_tract.text.secrets import key_of

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_TRY_AGAIN = {408, 425, 429}  # and all of 500 to 599
_UNUSABLE_ANSWERS = 4  # After so many the server is confused rather than unlucky.
_LONGEST_DELAY = 30.0  # seconds
_LONGEST_RETRY_AFTER = 300.0  # seconds
_QUIET = 60.0  # seconds between two warnings
_READ = 2**16  # bytes at a time
_QUOTED = 8  # So many letters of a secret in a row are not shown.


class Refused(RuntimeError):
    """The server will not answer this request, now or later."""

    def __init__(self, message: str, status: int, reason: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class JSONServer:
    """One server, its key, and how patiently it is asked.

    Args:
        base_url: Such as `http://localhost:8000/v1`; `/v1` is added where it is missing. A user name and password in
            it are sent as HTTP Basic credentials.
        key_variable: Environment variable with the API key, sent as a bearer token; unset: no key.
        timeout: Seconds for one attempt, from connecting to the last byte.
        retry_seconds: How long after the first failure the last attempt may begin.
        retry_delay: Seconds before the first repetition; doubled each time, up to 30, and shortened at random by up to
            half, so that many requests do not come back all at once. A `Retry-After` of the server goes first.

    Attributes:
        url: Without credentials.
        longest_silence: Seconds of the longest outage since it was set to 0: in a long one, a server may have been
            started again with something else.

    Raises:
        ValueError: An address that is not plain HTTP or HTTPS, or that holds anything else that may be a secret; or a
            time that is none.
    """

    def __init__(
        self, base_url: str, *, key_variable: str, timeout: float, retry_seconds: float, retry_delay: float
    ) -> None:
        for setting, seconds in (("timeout", timeout), ("retry_delay", retry_delay)):
            if not seconds > 0:
                raise ValueError(f"{setting}={seconds} must be above 0")
        if retry_seconds < 0:
            raise ValueError(f"retry_seconds={retry_seconds} must be 0 (never repeat a request) or more")
        try:
            parts = urlsplit(base_url)
            host, port = parts.hostname, parts.port
        except ValueError:
            parts, host, port = urlsplit(""), None, None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            # Not quoted: it may hold a secret.
            raise ValueError(
                f"base_url must look like http://HOST:PORT/v1, without a query. Put the key into {key_variable}"
            )
        path = parts.path.rstrip("/")
        host = f"[{host}]" if ":" in host else host
        path += "" if path.endswith("/v1") else "/v1"
        self.url = f"{parts.scheme}://{host}" + (f":{port}" if port else "") + path
        self.key_variable = key_variable
        self._secrets: list[str] = []
        self._headers: dict[str, str] = {}
        self._authorise(parts.username, parts.password)
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=min(timeout, 30.0))
        self.retry_seconds, self._retry_delay = retry_seconds, retry_delay
        self._session: aiohttp.ClientSession | None = None
        self.longest_silence = 0.0
        self._silent_since: float | None = None
        self._told_at = -math.inf

    def _authorise(self, user: str | None, password: str | None) -> None:
        key = key_of(self.key_variable)
        if user is not None:
            if key:
                raise ValueError(
                    f"base_url contains credentials and {self.key_variable} contains a key. Use only one of the two"
                )
            plain = f"{unquote(user)}:{unquote(password or '')}"
            basic = base64.b64encode(plain.encode()).decode()
            self._keep_secret(basic, plain, password or "", unquote(password or ""))
            self._headers = {"Authorization": f"Basic {basic}"}
        elif key:
            self._keep_secret(key)
            self._headers = {"Authorization": f"Bearer {key}"}

    def _keep_secret(self, *secrets: str) -> None:
        forms = [(text, base64.b64encode(text.encode()).decode(), text.encode().hex()) for text in secrets if text]
        self._secrets = [form for written in forms for form in written]

    async def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        read: Callable[[Any], _T],
        *,
        retry_seconds: float,
        limit: int = 2**20,
    ) -> _T:
        """Send one request, and again while the server is away, overloaded or makes no sense.

        Args:
            read: Takes the answer apart; a ValueError, TypeError or LookupError marks it as unusable.
            retry_seconds: How long after the first failure the last attempt may begin.
            limit: Bytes that an answer may have, unpacked. Of a longer one no more is read.

        Raises:
            Refused: An answer that repetition would not change: HTTP 400, 401, 404 and the like.
            ConnectionError: No answer for `retry_seconds`.
            RuntimeError: Four unusable answers.
        """
        clock = asyncio.get_running_loop().time
        where = f"{method} {self.url}{path}"
        started_failing: float | None = None
        unusable = attempts = 0
        while True:
            attempts += 1
            retry_after = None
            try:
                status, retry_after, text = await self._exchange(method, path, body, limit)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                trouble = self.public(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
            else:
                if status == 200:
                    try:
                        answer = read(json.loads(text))
                    except (ValueError, TypeError, LookupError, RecursionError) as error:
                        unusable += 1
                        trouble = f"an unusable answer, {self.public(str(error))}: {self.public(text)[:200]}"
                        if unusable == _UNUSABLE_ANSWERS:
                            raise RuntimeError(f"{where}: {unusable} times {trouble}") from None
                    else:
                        self._is_well(clock())
                        return answer
                elif status in _TRY_AGAIN or status >= 500:
                    trouble = f"HTTP {status}: {self._reason(text)}"
                else:
                    reason = self._reason(text)
                    hint = f" (the key is read from {self.key_variable})" if status in (401, 403) else ""
                    raise Refused(f"{where}: HTTP {status}: {reason}{hint}", status, reason)
            now = clock()
            started_failing = now if started_failing is None else started_failing
            left = started_failing + retry_seconds - now
            if left <= 0:
                raise ConnectionError(f"{where}: no answer in {attempts} attempts, the last: {trouble}")
            self._is_silent(now, where, trouble, retry_seconds)
            delay = min(_LONGEST_DELAY, self._retry_delay * 2.0 ** min(attempts - 1, 20)) * random.uniform(0.5, 1.0)
            await asyncio.sleep(min(left, delay if retry_after is None else max(delay, retry_after)))

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def public(self, text: str) -> str:
        """Text of the server for an error or the log: one line, no control characters, and no secret in it."""
        text = text[: 2**13]
        for secret in self._secrets:
            text = text.replace(secret, "***")
        bare = _bare(text)
        for secret in map(_bare, self._secrets):
            pieces = {secret[start : start + _QUOTED] for start in range(max(1, len(secret) - _QUOTED + 1))}
            if any(len(piece) > 3 and piece in bare for piece in pieces):
                return "*** (it quotes the key)"
        return " ".join("".join(letter if letter.isprintable() else " " for letter in text[:500]).split())

    async def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, limit: int
    ) -> tuple[int, float | None, str]:
        if self._session is None:
            # The number of connections is the callers' concern. No redirects: the key is for this server. What is
            # packed is unpacked here, where its size is watched.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=self._timeout,
                headers={"Accept-Encoding": "identity", **self._headers},
                auto_decompress=False,
            )
        url = self.url + path
        async with self._session.request(method, url, json=body, allow_redirects=False) as response:
            raw = bytearray()
            while len(raw) <= limit and (part := await response.content.read(_READ)):
                raw += part
            if response.headers.get("Content-Encoding", "identity").lower() in ("gzip", "deflate"):
                raw = bytearray(_unpacked(raw, limit))
            text = raw.decode(errors="replace")
            if len(raw) > limit:
                response.close()  # or the rest would be waited for
                text = f"an answer of more than {limit} bytes: {text[:100]}"
            return response.status, _seconds(response.headers.get("Retry-After")), text

    def _reason(self, text: str) -> str:
        """What an error answer says, wherever it says it."""
        try:
            answer = json.loads(text)
            error = answer.get("error", answer)
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, LookupError, AttributeError, RecursionError):
            pass
        return self.public(text)

    def _is_silent(self, now: float, where: str, trouble: str, retry_seconds: float) -> None:
        if self._silent_since is None:
            self._silent_since = now
        # Once an outage, not once a request: up to a hundred requests meet it together.
        if now - self._told_at >= _QUIET:
            self._told_at = now
            logger.warning("%s: %s; trying again for up to %.0f s", where, trouble, retry_seconds)

    def _is_well(self, now: float) -> None:
        if self._silent_since is not None:
            self.longest_silence = max(self.longest_silence, now - self._silent_since)
            logger.info("%s answers again after %.1f s", self.url, now - self._silent_since)
            self._silent_since = None


def _seconds(retry_after: str | None) -> float | None:
    """Seconds to wait; None for the form with a date, which would need a system clock that is right."""
    try:
        return max(0.0, min(float(retry_after or ""), _LONGEST_RETRY_AFTER))
    except ValueError:
        return None


def _unpacked(raw: bytearray, limit: int) -> bytes:
    try:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(bytes(raw), limit + 1)
    except zlib.error:
        return bytes(raw)  # it will not be JSON


def _bare(text: str) -> str:
    """Letters and digits of a text alone, with what may hide them written out: escapes, entities, cases."""
    for _ in range(3):  # an escape of an escape, and once more
        text = re.sub(r"(?:\\u|\\x|\\U0000|%u00|=)([0-9A-Fa-f]{2,4})", lambda code: chr(int(code[1], 16)), text)
        text = html.unescape(unquote(text))
    return "".join(letter for letter in text if letter.isalnum()).lower()
