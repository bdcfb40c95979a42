"""The routes of a served judge. Knows requests, answers and the queue; knows nothing of sockets or signals."""

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from trl_tract import __version__
from trl_tract.integrations.batcher import Batcher, Closed, QueueFull
from trl_tract.integrations.forms import TAGS, Answer, ChatRequest, Item, OneOrMany, answer
from trl_tract.integrations.gate import Gate, Refusal, as_json, error_body
from trl_tract.judge.judge import CoTRAILJudge, Judgement
from trl_tract.rows.row import Row
from trl_tract.text.display import short

logger = logging.getLogger(__name__)
_ROUTES = "POST /judge, POST /v1/chat/completions, GET /v1/models, /health, /metrics, /openapi.json, and the page at /"
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_MASSES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)


class _Ascii(JSONResponse):
    def render(self, content: Any) -> bytes:
        return as_json(content)


class Metrics:
    """What is counted, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.answers = Counter("trl_tract_answers", "Responses by path and status", ["path", "status"], **own)
        self.seconds = Histogram(
            "trl_tract_answer_seconds", "Time from a request's arrival to its answer", ["path"], buckets=_SECONDS, **own
        )
        self.items = Counter("trl_tract_items", "Items judged: with a score, or with an error", ["outcome"], **own)
        self.batches = Histogram("trl_tract_batch_items", "Items judged together", buckets=_SIZES, **own)
        self.mass = Histogram("trl_tract_grid_mass", "Probability mass on the score grid", buckets=_MASSES, **own)
        self.waiting = Gauge("trl_tract_waiting_items", "Items in the queue", **own)

    def judged(self, judgement: Judgement) -> None:
        """Count one judgement."""
        self.items.labels("error" if judgement.error else "score").inc()
        for own in judgement.aspects.values() if judgement.aspects else [judgement]:
            if not own.error:
                self.mass.observe(own.grid_mass)


class Desk:
    """Takes the items of requests, within limits, has them judged, and counts what comes of them."""

    def __init__(self, judge: CoTRAILJudge, *, max_batch: int, max_queue: int, max_items: int, answer_seconds: float):
        self.judge, self.metrics = judge, Metrics()
        self.max_queue, self.max_items, self.answer_seconds = max_queue, max_items, answer_seconds
        batches = self.metrics.batches
        self.batcher = Batcher(judge, max_batch=max_batch, max_queue=max_queue, on_batch=batches.observe)
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """What is under way is finished before the server ends."""
        yield
        await asyncio.to_thread(self.batcher.close)

    async def judged(self, request: Request, items: Sequence[Any]) -> list[Judgement]:
        """Judge the items of a request.

        Raises:
            Refusal: There are too many of them, they came too late, or none could be judged.
        """
        rows = [_row(item, self.judge) for item in items]
        if len(rows) > self.max_items:
            told = f"{len(rows)} items in one request, but at most {self.max_items} are allowed. Send several requests"
            raise Refusal(413, told)
        try:
            futures = self.batcher.submit(rows, [item.seed for item in items])
        except QueueFull:
            told = (
                f"the queue is full: {self.batcher.waiting} of at most {self.max_queue} items are waiting. Send the "
                "request again later"
            )
            raise Refusal(429, told, {"Retry-After": "1"}) from None
        except Closed:
            raise Refusal(503, "the server is shutting down. Send the request to another server") from None
        outcomes = await _outcomes(futures, request, self.answer_seconds)
        judgements = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                logger.error("an item could not be judged", exc_info=outcome)
                outcome = Judgement(error=f"the judge failed ({type(outcome).__name__}); see the server's log")
            self.metrics.judged(outcome)
            judgements.append(outcome)
        if outcomes and all(isinstance(outcome, BaseException) for outcome in outcomes):
            raise Refusal(500, str(judgements[0].error))
        return judgements


def make_app(
    judge: CoTRAILJudge,
    name: str,
    *,
    key: str | None = None,
    hosts: Sequence[str] | None = None,
    max_batch: int = 32,
    max_queue: int = 256,
    max_items: int = 64,
    max_bytes: int = 2**20,
    answer_seconds: float = 300.0,
) -> Gate:
    """An ASGI application around a judge.

    Args:
        key: What requests have to bring as `Authorization: Bearer KEY`; None: nothing.
        hosts: Names that requests may use for this server; None: any.
        max_queue: Items that may wait; more are refused with 429.
        answer_seconds: Seconds that a request may take; then it leaves the queue and is refused with 504.
    """
    desk = Desk(judge, max_batch=max_batch, max_queue=max_queue, max_items=max_items, answer_seconds=answer_seconds)
    metrics = desk.metrics
    app = FastAPI(
        title="trl-tract judge",
        version=__version__,
        description=f"{name}: scores responses, with a rationale and exact score probabilities.",
        lifespan=desk.lifespan,
        default_response_class=_Ascii,
        exception_handlers=_ERRORS,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )

    @app.post("/judge", response_model=Answer | list[Answer])
    async def judge_items(request: Request, body: OneOrMany) -> Any:
        """Judge one response, or a list of them: an answer for one, a list in the same order for a list."""
        judgements = await desk.judged(request, body if isinstance(body, list) else [body])
        answers = [answer(each, judge.scales).model_dump() for each in judgements]
        return _Ascii(answers if isinstance(body, list) else answers[0])

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Any:
        """The same in the form of OpenAI's chat completions; the judgement's numbers are in `judgement`."""
        if body.model != name:
            raise Refusal(404, f"there is no model {short(body.model, 100)!r} here; this judge is called {name!r}")
        (judgement,) = await desk.judged(request, [body])
        if judgement.error:
            raise Refusal(422, f"no score: {judgement.error}")
        return _Ascii(body.completion(judgement, judge.scales))

    @app.get("/v1/models")
    async def models() -> Any:
        """The judge's name, as clients of OpenAI's ask for it."""
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "trl-tract"}]}

    @app.get("/health")
    async def health() -> Any:
        """Whether items are taken."""
        well = desk.batcher.alive and not gate.draining
        return _Ascii({"status": "ok" if well else "stopping", "model": name}, 200 if well else 503)

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Any:
        """Counters for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    page, policy = _page(key is not None, judge.rubric is not None)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def form() -> Any:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    paths = {getattr(route, "path", "") for route in app.routes}

    def count(path: str, status: int, seconds: float) -> None:
        known = path if path in paths else "other"  # anything can be asked for, and each label is kept
        metrics.answers.labels(known, status).inc()
        metrics.seconds.labels(known).observe(seconds)

    gate = Gate(app, key=key, hosts=hosts, max_bytes=max_bytes, on_answer=count)
    return gate


async def _refused(request: Request, refusal: Any) -> Response:
    return _Ascii(error_body(refusal.message, refusal.kind), refusal.status, refusal.headers)


async def _not_understood(request: Request, error: Any) -> Response:
    return _Ascii(error_body(_in_words(error)), 422)


async def _not_there(request: Request, error: Any) -> Response:
    told = {
        404: f"there is nothing at this address. Available: {_ROUTES}",
        405: f"this address does not accept {request.method}. Available: {_ROUTES}",
        400: "the body cannot be read as JSON",
    }
    return _Ascii(error_body(told.get(error.status_code, str(error.detail))), error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return _Ascii(error_body(f"the server failed ({type(error).__name__})", "server_error"), 500)


_ERRORS: dict[int | type[Exception], Any] = {
    Refusal: _refused,
    RequestValidationError: _not_understood,
    HTTPException: _not_there,
    Exception: _failed,
}


def _row(item: Any, judge: CoTRAILJudge) -> Row:
    try:
        row: Row = item.row(judge)
    except ValueError as error:
        raise Refusal(422, str(error)) from None
    return row


async def _outcomes(
    futures: Sequence[Future[Judgement]], request: Request, seconds: float
) -> list[Judgement | BaseException]:
    """What became of the items; those that are not begun leave the queue when nobody waits for them any more."""
    waiting = {asyncio.wrap_future(each) for each in futures}
    try:
        async with asyncio.timeout(seconds):
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=1.0)
                for each in done:
                    each.exception()  # looked at, or asyncio reports it a second time
                if waiting and await request.is_disconnected():
                    raise Refusal(499, "the client went away")
    except TimeoutError:
        told = f"no judgement within {seconds:g} seconds. Send the request again later, or with fewer items"
        raise Refusal(504, told) from None
    finally:
        for item in futures:
            item.cancel()  # no effect on what is done
        for own in waiting:
            own.cancel()
    return [item.exception() or item.result() for item in futures]


def _in_words(error: RequestValidationError) -> str:
    """What is wrong with a request and where, without repeating its text."""
    lines = []
    for one in error.errors()[:3]:
        if one["type"] == "json_invalid":
            return f"the body cannot be read as JSON: {short(str(one['ctx']['error']), 200)}"
        if one["type"] == "missing" and len(one["loc"]) == 1:
            return 'the body is empty. Send JSON, such as {"prompt": "..."}'
        place = [str(part) for part in one["loc"][1:] if part not in TAGS]
        what = str(one["msg"]).removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            what = f"unknown field. An item has {', '.join(Item.model_fields)}"
        lines.append(f"{short('.'.join(place), 100)}: {what}" if place else what)
    more = len(error.errors()) - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more > 0 else "")


def _page(wants_key: bool, has_rubric: bool) -> tuple[str, str]:
    """The page, and the policy that lets it run its own script and style, and ask its own server, and nothing else."""
    text = files("trl_tract.integrations").joinpath("judge.html").read_text(encoding="utf-8")
    text = text.replace("<body>", f'<body data-key="{int(wants_key)}" data-rubric="{int(has_rubric)}">')
    hashes = {
        tag: base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()
        for tag in ("script", "style")
        if (match := re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
    return text, policy
