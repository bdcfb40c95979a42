"""A row -> the text that is tokenised, and the place of its scores in that text.

The completion goes on behind what the model is asked with, as it is given: a chat template writes prompts alone. Knows
characters and templates; nothing of tokens, datasets or models.
"""

import datetime
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational, maybe_convert_to_chatml

from trl_tract.rows.frame import Frame
from trl_tract.rows.row import Prompt, Row
from trl_tract.rows.template import Asked, Template, TemplateSettings
from trl_tract.rows.thinking import own_thinking, scored_text, thought_and_answer, thought_first
from trl_tract.scale.scale import Scale, locate_scores
from trl_tract.scale.text import CompletionFormat, ScoreNotFoundError, ScoreSpan

_LOOKED_AT = 1000  # rows that decide whether a rationale is the thinking
_ROLES = {"human": "user", "gpt": "assistant"}
"""Roles as conversations of `from` and `value` call them -> as chat templates know them."""


@dataclass(frozen=True)
class RenderedScore:
    """A score as it is written, and its first character and one past its last in the row's text."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class RenderedRow:
    """A row as the text that is tokenised, with its scores found.

    Attributes:
        asked: The prompt alone, as the model is asked.
        text: Prompt and completion, with the chat template's or the end-of-sequence text.
        formats: Each score's marker and the whitespace around it; `start` is what stands before its rationale.
        cuts: Where the text is cut before it is tokenised.
    """

    asked: Asked
    text: str
    scores: tuple[RenderedScore, ...]
    formats: tuple[CompletionFormat, ...]
    cuts: tuple[int, ...]

    @property
    def prompt_text(self) -> str:
        """The prompt alone, as the model is asked."""
        return self.asked.text


@dataclass
class _Body:
    """What stands behind the prompt, as it grows."""

    text: str = ""
    scores: list[RenderedScore] = field(default_factory=list)
    real: list[tuple[int, int]] = field(default_factory=list)  # may become control tokens

    def add(self, text: str, *, real: bool = False) -> None:
        if real:
            self.real.append((len(self.text), len(self.text) + len(text)))
        self.text += text

    def add_score(self, text: str) -> None:
        self.scores.append(RenderedScore(text, len(self.text), len(self.text) + len(text)))
        self.text += text

    def add_thinking(self, text: str, frame: Frame) -> None:
        """Add text; the thinking that it may begin with is marked by control tokens."""
        tags, end = own_thinking(text, frame)
        if tags is None or end is None:
            self.add(text)
            return
        opener, closer = tags
        begin = text.index(opener)
        self.add(text[:begin])
        self.add(opener, real=True)
        self.add(text[begin + len(opener) : end - len(closer)])
        self.add(closer, real=True)
        self.add(text[end:])

    def behind(self, asked: Asked, template: Template, formats: Sequence[CompletionFormat]) -> RenderedRow:
        ending = asked.frame.ending
        # Plain text may have been written by hand with all its control tokens, its end included.
        text = self.text + ("" if not asked.literal and self.text.endswith(ending) else ending)
        cuts = template.cuts(self.text, self.real) if asked.literal else ()
        begin = len(asked.text)
        return RenderedRow(
            asked,
            asked.text + text,
            tuple(RenderedScore(score.text, begin + score.start, begin + score.end) for score in self.scores),
            tuple(formats),
            (*asked.cuts, *(begin + cut for cut in cuts)),
        )


def as_prompt_completion(row: Mapping[str, Any]) -> Row:
    """A `messages` row with its last assistant turn as the completion; other rows unchanged.

    One that has a score in a column need not have that turn: it is a row without a completion then.
    """
    if "messages" not in row and "conversations" not in row:
        return dict(row)
    # Copied, since the host renames `from` and `value` in place.
    copied = {name: [dict(turn) for turn in row[name]] for name in ("messages", "conversations") if row.get(name)}
    rest: Row = maybe_convert_to_chatml({**row, **copied})
    given = rest.pop("messages")
    messages = [{**turn, "role": _ROLES.get(turn["role"], turn["role"])} if "role" in turn else turn for turn in given]
    if not messages or messages[-1]["role"] != "assistant":
        if messages and any(rest.get(name) is not None for name in ("score", "scores")):
            return {**rest, "prompt": messages}
        raise ScoreNotFoundError("no completion", "the last message does not have the role assistant")
    return {**rest, "prompt": messages[:-1], "completion": messages[-1:]}


def without_rationales(row: Mapping[str, Any], scales: Sequence[Scale]) -> Row:
    """A prompt-completion row whose completion is markers and scores alone."""
    content = scored_text(row.get("completion"))
    begin, pieces = 0, []
    for span in locate_scores(content, scales):
        before = content[begin : span.marker_start]
        pieces.append(before[: len(before) - len(before.lstrip())] + content[span.marker_start : span.end])
        begin = span.end
    return {**row, **with_completion(row["prompt"], "".join(pieces) + content[begin:])}


def render_row(template: Template, row: Mapping[str, Any], scales: Sequence[Scale]) -> RenderedRow:
    """Write a prompt-completion row as text, and find the score of each scale.

    Raises:
        ScoreNotFoundError: A score is missing, ambiguous or out of order; or the chat template refuses the prompt.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt in (None, []):
        raise ScoreNotFoundError("no prompt", "the prompt is missing")
    if completion in (None, []):
        raise ScoreNotFoundError("empty", "the completion is missing")
    if is_conversational({"prompt": prompt}) != is_conversational({"completion": completion}):
        raise ScoreNotFoundError("mixed types", "prompt and completion must both be text, or both chat messages")
    asked = template.ask(row)
    written = _written(completion, asked.frame, scales, template.thinks)
    body = _Body()
    if written.thought is not None:
        body.add(written.thought)
        body.add(asked.frame.closing, real=True)
    elif not written.answer[:1].isspace():
        body.add(asked.frame.start)
    end = 0
    for span in written.spans:
        marker_end = span.start - len(span.separator)
        before = written.answer[end : span.marker_start]
        if end == 0 and written.thought is None:
            body.add_thinking(before, asked.frame)
        else:
            body.add(before)
        body.add(written.answer[span.marker_start : marker_end], real=True)
        body.add(span.separator)
        body.add_score(span.text)
        end = span.end
    body.add(written.answer[end:])
    return body.behind(asked, template, written.formats)


def render_pieces(
    template: Template, asked: Asked, scales: Sequence[Scale], pieces: Sequence[tuple[str, str]]
) -> RenderedRow:
    """Rationales and score texts behind a prompt, as a training row with them is written.

    Args:
        scales: One for each piece; more are left for later.
        pieces: What was written, the rationales as by `read_rationale`.
    """
    body = _Body()
    for number, (scale, (rationale, score)) in enumerate(zip(scales, pieces, strict=False)):
        thought, answer = thought_first(asked.frame, rationale) if number == 0 else (None, rationale.rstrip())
        first = answer if thought is None else thought
        own = asked.frame.start if number == 0 and thought is None else ""
        start = "" if first[:1].isspace() else own + scale.format.start
        body.add(start if first or thought is None else "")
        if thought is not None:
            body.add(thought)
            body.add(asked.frame.closing, real=True)
            body.add(answer)
        else:
            body.add_thinking(answer, asked.frame if number == 0 else Frame())
        body.add(scale.format.lead if answer else "")
        body.add(scale.marker, real=True)
        body.add(scale.format.separator)
        body.add_score(score)
    return body.behind(asked, template, [scale.format for scale in scales])


def written_completion(frame: Frame, scales: Sequence[Scale], pieces: Sequence[tuple[str, str]]) -> str:
    """Rationales and score texts as a completion that a row can have; thinking stands in tags.

    Training on such a row is training on what `render_pieces` writes.
    """
    texts = [scale.format.join(*piece) for scale, piece in zip(scales, pieces, strict=True)]
    thought, answer = thought_first(frame, pieces[0][0])
    if thought is None:
        own = frame.start if scales[0].format.start and not answer[:1].isspace() else ""
        return own + "".join(texts)
    opener, closer = next(tags for tags in reversed(frame.tags) if tags[1] not in thought)
    rest = scales[0].format.join(answer, pieces[0][1]).removeprefix(scales[0].format.start)
    start = "" if thought[:1].isspace() else scales[0].format.start
    return "".join([f"{opener}\n{start}{thought}\n{closer}\n\n{rest}", *texts[1:]])


def written_formats(
    template: Template, row: Mapping[str, Any], scales: Sequence[Scale]
) -> tuple[CompletionFormat, ...]:
    """How a prompt-completion row writes the score of each scale.

    Raises:
        ScoreNotFoundError: A score is missing, ambiguous or out of order.
    """
    frame = Frame() if isinstance(row.get("prompt"), str) else template.frame(row)
    return _written(row.get("completion"), frame, scales, template.thinks).formats


@dataclass(frozen=True)
class _Written:
    """A completion as its author wrote it.

    Attributes:
        thought: What stands inside the thinking block; None where nothing does.
    """

    thought: str | None
    answer: str
    spans: tuple[ScoreSpan, ...]
    formats: tuple[CompletionFormat, ...]


def _written(completion: Any, frame: Frame, scales: Sequence[Scale], thinks: bool) -> _Written:
    thought, answer = thought_and_answer(completion, frame)
    if thought and not frame.closing:
        raise ScoreNotFoundError(
            "thinking",
            "the row contains thinking, but thinking is off. Set thinking='rationale', or remove the thinking from the "
            "row"
            if thinks
            else "the row contains thinking, but the chat template has no thinking block. Move the thinking into the "
            "content",
        )
    if thought is None or not frame.closing:  # an empty block is none
        thought, (tags, end) = None, own_thinking(answer, frame)
        if tags is not None and end is None:
            raise ScoreNotFoundError(
                "thinking", f"the completion opens a thinking block with {tags[0]} and never closes it"
            )
        spans = _moved(locate_scores(answer[end or 0 :], scales), end or 0)
        if frame.closing:  # the rationale is the thinking
            marker = spans[0].marker_start
            thought, answer, spans = answer[:marker].rstrip(), answer[marker:], _moved(spans, -marker)
    else:
        spans = locate_scores(answer, scales)
    if thought is not None and frame.closer in thought:
        raise ScoreNotFoundError(
            "thinking", f"the thinking contains {frame.closer!r}, which would end it early. Replace that text"
        )
    formats = []
    begin = 0
    for span in spans:
        before = answer[begin : span.marker_start]
        # What the template writes before an answer is not the rows' own.
        first = answer[begin:] if begin else answer.removeprefix(frame.start) if thought is None else thought
        formats.append(
            CompletionFormat(
                answer[span.marker_start : span.start - len(span.separator)],
                # Without a rationale there is nothing that the marker follows.
                lead=span.lead if before.strip() else " ",
                separator=span.separator,
                start=first[: len(first) - len(first.lstrip())],
            )
        )
        begin = span.end
    return _Written(thought, answer, spans, tuple(formats))


def _moved(spans: Sequence[ScoreSpan], by: int) -> tuple[ScoreSpan, ...]:
    return tuple(
        ScoreSpan(span.start + by, span.end + by, span.text, span.marker_start + by, span.lead, span.separator)
        for span in spans
    )


def with_completion(prompt: Prompt, completion: str) -> Row:
    """A prompt-completion row of the prompt's own type, text or chat."""
    return {
        "prompt": prompt,
        "completion": completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}],
    }


def settled(
    tokenizer: PreTrainedTokenizerBase, settings: TemplateSettings, rows: Iterable[Mapping[str, Any]]
) -> TemplateSettings:
    """What training with these rows renders with, and every later use: `auto` decided, the date set.

    The rationale is the thinking if the template has a place for it and half of the first 1,000 rows or more bring
    thinking of their own; otherwise thinking is off.
    """
    template = Template(tokenizer, settings)
    if settings.thinking == "auto":
        inside = Template(tokenizer, replace(settings, thinking="rationale"))
        looked_at = [_brings(inside, row) for row in itertools.islice(rows, _LOOKED_AT)] if template.thinks else []
        rationale = bool(looked_at) and 2 * sum(looked_at) >= len(looked_at)
        settings = replace(settings, thinking="rationale" if rationale else "off")
    if settings.date is None and template.writes_date:
        settings = replace(settings, date=datetime.date.today().isoformat())
    return settings


def asks_in_chat(rows: Iterable[Mapping[str, Any]]) -> bool | None:
    """Whether prompts are chat messages, by the first 1,000 rows; None where they came tokenised, or are both."""
    kinds = {
        None if "input_ids" in row else not isinstance(row.get("prompt"), str)
        for row in itertools.islice(rows, _LOOKED_AT)
        if any(row.get(name) is not None for name in ("prompt", "messages", "conversations", "input_ids"))
    }
    return kinds.pop() if len(kinds) == 1 else None


def _brings(template: Template, row: Mapping[str, Any]) -> bool:
    """Whether a row of chat messages brings thinking of its own."""
    try:
        row = as_prompt_completion(row)
        completion = row.get("completion")
        if isinstance(row.get("prompt"), str) or not completion or isinstance(completion, str):
            return False
        return bool(thought_and_answer(completion, template.frame(row))[0])
    except ScoreNotFoundError:
        return False  # refused by its number later
