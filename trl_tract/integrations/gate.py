"""What every request passes before a served judge sees it: who may ask, how much, for how long.

Plain ASGI. Knows HTTP; knows nothing of judges.
"""

import asyncio
import hmac
import json
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

Send = Callable[[MutableMapping[str, Any]], Any]
OPEN = ("/", "/health")
"""Paths that need no key: the page, which asks for it, and what a load balancer looks at."""

_READ_AWAY = 16
"""How many times the bytes that a body may have are read, and thrown away, before a connection is cut."""

# A page of somebody else's must not read, embed or be read by this one.
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def as_json(content: Any) -> bytes:
    """JSON in ASCII: half a surrogate pair, which models and clients do write, cannot be sent as UTF-8."""
    return json.dumps(content, allow_nan=False).encode("ascii")


def error_body(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error in OpenAI's form, which their clients show."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class Refusal(Exception):
    """An answer other than the one asked for."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})

    @property
    def kind(self) -> str:
        """As OpenAI's errors name it."""
        return "invalid_request_error" if self.status < 500 else "server_error"


class Gate:
    """ASGI middleware. Reads a request's body whole, within limits, and hands it on.

    Args:
        key: What requests have to bring as `Authorization: Bearer KEY`; None: nothing.
        hosts: Names that requests may use for this server; None: any. A page of somebody else's, whose name was
            made to point to this machine, has another one.
        body_seconds: That a body may take to arrive.
        on_answer: Told path, status and seconds of each answer.
    """

    def __init__(
        self,
        app: Any,
        *,
        key: str | None,
        hosts: Sequence[str] | None,
        max_bytes: int,
        body_seconds: float = 30.0,
        on_answer: Callable[[str, int, float], None],
    ) -> None:
        self.app = app
        self.key = key
        self.hosts = hosts
        self.max_bytes = max_bytes
        self.body_seconds = body_seconds
        self.on_answer = on_answer
        self.draining = False
        self.open = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
                if self.draining:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        self.open += 1
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self._check(scope, headers)
            body = await self._body(headers, receive)
            await self.app(scope, _replay(body, receive), sending)
        except Refusal as refusal:
            await refuse(refusal, sending)
        finally:
            self.open -= 1
            self.on_answer(scope["path"], status, time.perf_counter() - began)

    def _check(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> None:
        if self.draining and scope["path"] != "/health":
            raise Refusal(503, "the server is shutting down. Send the request to another server", {"Retry-After": "5"})
        if self.hosts is not None and _name_of(headers.get(b"host", b"").decode("latin-1")) not in self.hosts:
            raise Refusal(
                421,
                f"the Host header does not match {' or '.join(self.hosts)}. To accept other names, "
                "start the server with --host",
            )
        if self.key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.key.encode()):
                told = {"WWW-Authenticate": "Bearer"}
                raise Refusal(401, "the API key is missing or wrong. Send it as `Authorization: Bearer KEY`", told)
        if scope["method"] == "POST":
            # A form of somebody else's page can send other types without asking the browser's permission.
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise Refusal(415, "the body must be JSON, sent with `Content-Type: application/json`")
            if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
                raise Refusal(415, "the body must be sent without Content-Encoding")

    async def _body(self, headers: Mapping[bytes, bytes], receive: Any) -> bytes:
        told = headers.get(b"content-length", b"0")
        too_large = Refusal(413, f"the body is larger than {self.max_bytes:,} bytes. Send fewer items at once")
        # What is a little too large is read to its end: a client that is cut off while it sends sees no answer.
        most = _READ_AWAY * self.max_bytes
        if told.isdigit() and int(told[:20]) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "the body was cut off")
                    size += len(message.get("body", b""))
                    if size <= self.max_bytes:
                        parts.append(message.get("body", b""))
                    if size > most or (size > self.max_bytes and not message.get("more_body")):
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self.body_seconds:g} seconds") from None


def _name_of(host: str) -> str:
    """The name in a `Host` header, without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _replay(body: bytes, receive: Any) -> Any:
    waiting: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return waiting.pop() if waiting else await receive()

    return again


async def refuse(refusal: Refusal, send: Send) -> None:
    """Send a refusal; the connection is closed, since the rest of a body may still be on its way."""
    body = as_json(error_body(refusal.message, refusal.kind))
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refusal.headers}
    if refusal.status in (408, 413):
        headers["Connection"] = "close"
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
