"""Who writes rationales for a bootstrap, and says what score each comes to: a model whose tokens are known, or a chat.

Knows how each is asked; nothing of which rationales are kept.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_tract.backends import Backend, Generation, Sampling, Stop
from trl_tract.backends.grid_scores import grid_probabilities
from trl_tract.distill.asking import asked_row
from trl_tract.distill.failures import before_markup, before_score, rationale_failure, stated_score, whole_sentences
from trl_tract.distill.leaks import gives_away
from trl_tract.files.journal import seed_of
from trl_tract.rows.frame import Frame
from trl_tract.rows.messages import json_cell
from trl_tract.rows.row import Row
from trl_tract.rows.template import Asked, Template
from trl_tract.rows.thinking import answered, may_end, own_thinking, read_rationale, stop_rules
from trl_tract.rows.tokens import asked_ids, prefix_ids
from trl_tract.scale.scale import Scale, locate_scores, scored_within
from trl_tract.scale.text import ScoreNotFoundError

if TYPE_CHECKING:
    from trl_tract.backends import ChatBackend


@dataclass(frozen=True)
class Candidate:
    """One rationale that was written.

    Attributes:
        score: What it comes to: the expected score behind it, or the one that its author wrote, rubric units; NaN where
            that is not known.
    """

    rationale: str
    score: float
    failure: str | None
    tokens: int


@dataclass(frozen=True)
class Draft:
    """What is written of one row so far.

    Attributes:
        asked: Its own prompt, as a model whose template is known is asked; None for a chat.
        golds: Gold scores, one for each scale, rubric units.
        pieces: Rationale and score text of each scale that is done.
        sources: How each came about: `blind` or `shown`.
    """

    number: int
    row: Row
    asked: Asked | None
    golds: Sequence[float]
    texts: Sequence[str]
    pieces: tuple[tuple[str, str], ...] = ()
    scores: tuple[float, ...] = ()
    sources: tuple[str, ...] = field(default=())


class Author(ABC):
    """Who writes the rationales."""

    def __init__(self, scales: tuple[Scale, ...], sampling: Sampling) -> None:
        self.scales = scales
        self.sampling = sampling

    @abstractmethod
    def write(
        self, drafts: Sequence[Draft], n: int, seed: Sequence[Any], *, shown: bool, on_progress: Callable[[int], None]
    ) -> list[list[Candidate]]:
        """`n` candidates for the next rationale of each draft.

        Args:
            shown: Whether the gold score is shown.
        """

    @abstractmethod
    def prompt_tokens(self, row: Row) -> int:
        """Tokens of a row's prompt as it is asked, or about as many."""

    def _settings(self, seed: Sequence[Any]) -> dict[str, Any]:
        return {**asdict(self.sampling), "seed": seed_of(*seed)}

    def _placed(self, draft: Draft, text: str) -> str:
        """A rationale as it goes on behind its prompt: text that ends in a letter is not gone on with at once."""
        prompt, start = draft.row["prompt"], self.scales[len(draft.pieces)].format.start
        joins = isinstance(prompt, str) and not draft.pieces and not start and not prompt[-1:].isspace()
        return f" {text}" if joins and text and not text[0].isspace() else text

    def _fault(self, text: str, draft: Draft, scale: Scale, shown: bool) -> str | None:
        """What a reader of a rationale would find wrong with it."""
        failure = rationale_failure(text, "stop", stated_score(scale.grid.texts))
        if failure is None and scored_within(text, self.scales) is not None:
            failure = "leak"
        if failure is None and shown and gives_away(text, draft.texts[len(draft.pieces)], scale.grid.texts):
            failure = "leak"
        return failure


class ModelAuthor(Author):
    """A model whose tokens are known: its score is the expected one, whether or not it wrote any.

    A rationale that was cut at `max_new_tokens` ends with its last whole sentence, and one that goes on to name a score
    in words ends before.
    """

    def __init__(self, backend: Backend, template: Template, scales: tuple[Scale, ...], sampling: Sampling) -> None:
        super().__init__(scales, sampling)
        self.backend = backend
        self.template = template

    def prompt_tokens(self, row: Row) -> int:
        """See `Author`."""
        try:
            return len(asked_ids(self.template, self.template.ask(asked_row(row, self.scales, 0))))
        except ScoreNotFoundError:
            return 0

    def write(
        self, drafts: Sequence[Draft], n: int, seed: Sequence[Any], *, shown: bool, on_progress: Callable[[int], None]
    ) -> list[list[Candidate]]:
        """See `Author.write`."""
        number = len(drafts[0].pieces)
        scale = self.scales[number]
        asked: dict[int, Asked] = {}
        ids: dict[int, list[int]] = {}
        for place, draft in enumerate(drafts):
            told = draft.texts[number] if shown else None
            try:
                asked[place] = self.template.ask(asked_row(draft.row, self.scales, number, shown=told))
                ids[place] = prefix_ids(self.template, asked[place], self.scales, draft.pieces)
            except ScoreNotFoundError:
                on_progress(1)
        frames = [asked[place].frame if number == 0 else Frame() for place in ids]
        rules = stop_rules(frames)
        stop = Stop(scale.marker, counts=rules["counts"], shows=rules["shows"]) if shown else Stop.at(scale, **rules)
        settings = self._settings(seed)
        sampled = self.backend.generate(list(ids.values()), n=n, stop=stop, on_progress=on_progress, **settings)
        read: dict[int, list[tuple[str, str | None, int]]] = {}
        for place, frame, generations in zip(ids, frames, sampled, strict=True):
            read[place] = [self._read(drafts[place], frame, scale, one, shown) for one in generations]
        scores = self._expected(drafts, number, scale, read)
        refused: list[Candidate] = [Candidate("", np.nan, "prompt refused", 0)] * n
        return [
            [_candidate(*one, scores.get((place, sample))) for sample, one in enumerate(read[place])]
            if place in read
            else refused
            for place in range(len(drafts))
        ]

    def _read(
        self, draft: Draft, frame: Frame, scale: Scale, generation: Generation, shown: bool
    ) -> tuple[str, str | None, int]:
        """The rationale in what was written, what is wrong with it, and its tokens."""
        if generation.finish_reason == "prompt_too_long":
            return "", "prompt too long", 0
        written = generation.text
        if generation.finish_reason != "stop":
            written = written.partition(scale.marker)[0]
        if generation.finish_reason == "length":
            written = whole_sentences(written)
        text = read_rationale(frame, written)
        if not frame.closing:
            text = self._placed(draft, before_score(before_markup(text), scale.grid.texts))
        thinks = frame.block is not None and not frame.closing and own_thinking(text, frame)[0] is not None
        failure = self._fault(answered(frame, text) if not frame.closing else text, draft, scale, shown)
        if failure is None and (thinks or not may_end(frame, written)):
            failure = "thinking"
        return text, failure, generation.num_tokens

    def _expected(
        self,
        drafts: Sequence[Draft],
        number: int,
        scale: Scale,
        read: Mapping[int, Sequence[tuple[str, str | None, int]]],
    ) -> dict[tuple[int, int], float]:
        """The expected score behind each rationale and the row's own prompt, on the grid alone; NaN without room."""
        prefixes: dict[tuple[int, int], list[int]] = {}
        for place, texts in read.items():
            own = drafts[place].asked
            for sample, (text, failure, _) in enumerate(texts):
                if failure is None and own is not None:
                    # A row that cannot hold this rationale cannot be trained on it.
                    try:
                        prefixes[place, sample] = prefix_ids(
                            self.template, own, self.scales, drafts[place].pieces, text
                        )
                    except ScoreNotFoundError:
                        continue
        if not prefixes:
            return {}
        probs = grid_probabilities(self.backend, scale.grid, list(prefixes.values())).probs
        # An untrained model puts little probability on scores at all.
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = probs @ np.array(scale.grid.values) / probs.sum(axis=1)
        return dict(zip(prefixes, expected.tolist(), strict=True))


class ChatAuthor(Author):
    """A chat endpoint that gives text alone: its score is the one that it wrote behind the marker."""

    def __init__(self, backend: "ChatBackend", scales: tuple[Scale, ...], sampling: Sampling) -> None:
        super().__init__(scales, sampling)
        self.backend = backend

    def prompt_tokens(self, row: Row) -> int:
        """See `Author`: a token is about four characters."""
        messages = as_messages(asked_row(row, self.scales, 0)["prompt"])
        return sum(len(str(message["content"])) for message in messages) // 4

    def write(
        self, drafts: Sequence[Draft], n: int, seed: Sequence[Any], *, shown: bool, on_progress: Callable[[int], None]
    ) -> list[list[Candidate]]:
        """See `Author.write`."""
        number = len(drafts[0].pieces)
        conversations = [
            as_messages(
                asked_row(
                    draft.row, self.scales, number, shown=draft.texts[number] if shown else None, done=draft.pieces
                )["prompt"]
            )
            for draft in drafts
        ]
        tools = [json_cell(draft.row, "tools") for draft in drafts]
        written = self.backend.write(conversations, tools=tools, n=n, on_progress=on_progress, **self._settings(seed))
        return [[self._read(draft, one, shown) for one in own] for draft, own in zip(drafts, written, strict=True)]

    def _read(self, draft: Draft, generation: Generation, shown: bool) -> Candidate:
        scale = self.scales[len(draft.pieces)]
        _, end = own_thinking(generation.text, Frame())
        text = generation.text[end or 0 :].strip()
        score = np.nan
        failure: str | None = None
        if shown:
            text = text.partition(scale.marker)[0]
        else:
            try:
                # Chat models write "**[RESULT]:** 4" and "[RESULT] **4**" whatever they are asked for.
                text = re.sub(rf"({re.escape(scale.marker)})[\s:*_`]+", r"\1 ", text)
                (span,) = locate_scores(text, [scale])
                text, score = text[: span.marker_start], scale.grid.value_of(span.text)
            except ScoreNotFoundError as error:
                failure = "length" if generation.finish_reason == "length" else "no marker"
                failure = "leak" if error.kind == "two scores" else failure
        if shown and generation.finish_reason == "length":
            text = whole_sentences(text)
        text = self._placed(draft, before_markup(text))
        failure = failure or self._fault(text, draft, scale, shown)
        return Candidate(text, score, failure, generation.num_tokens)


def _candidate(text: str, failure: str | None, tokens: int, score: float | None) -> Candidate:
    """A rationale with its expected score; None where none can be written behind it, NaN where none has room."""
    if failure is None and score is None:
        return Candidate(text, np.nan, "no marker", tokens)
    if failure is None and np.isnan(score or 0.0):
        return Candidate(text, np.nan, "prompt too long", tokens)
    return Candidate(text, np.nan if score is None else score, failure, tokens)


def as_messages(prompt: Any) -> list[dict[str, Any]]:
    """A prompt as messages of the API: a text is what the user says, and calls of tools have ids and JSON arguments."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt.strip()}]
    sent: list[dict[str, Any]] = []
    unanswered: list[str] = []
    for number, message in enumerate(prompt):
        one = {name: value for name, value in message.items() if value not in (None, [])}
        one["content"] = message.get("content") or ""
        if isinstance(one.get("tool_calls"), list):
            one["tool_calls"] = [_sent(call, f"call_{number}_{place}") for place, call in enumerate(one["tool_calls"])]
            unanswered = [call["id"] for call in one["tool_calls"] if isinstance(call, Mapping) and "id" in call]
        elif one["role"] == "tool" and unanswered:
            one.setdefault("tool_call_id", unanswered.pop(0))
        sent.append(one)
    return sent


def _sent(call: Any, own_id: str) -> Any:
    """A call of a tool as the API has it. Templates also take arguments as a mapping, and no `function` around them."""
    function = (call.get("function") or call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call  # the endpoint says what is wrong with it
    arguments = function.get("arguments") or {}
    if isinstance(arguments, Mapping):  # a table gives every call the arguments of all calls
        arguments = {name: value for name, value in arguments.items() if value is not None}
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, default=str)
    function = {"name": function.get("name"), "arguments": arguments}
    return {"id": call.get("id") or own_id, "type": "function", "function": function}
