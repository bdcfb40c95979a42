"""A row -> the text that is tokenised, its token ids, and the place of its scores in both.

Training and judging share these functions: a judge is asked with exactly the token prefix that a training row with the
same rationale has before its score. Knows nothing of datasets or models.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length, is_conversational, maybe_convert_to_chatml

from trl_tract.grids.aspects import Aspect, locate_aspects
from trl_tract.grids.trie import ScorePath
from trl_tract.prompts import (
    CompletionFormat,
    Prompt,
    Row,
    ScoreNotFoundError,
    ScoreSpan,
    locate_score,
    locate_scores,
    some_scores,
    span_at,
)
from trl_tract.scores import ScoreGrid, tokens_covering


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
        text: Prompt and completion, with the chat template's or the end-of-sequence text.
        prompt_text: The prompt alone, as the model is asked.
        scores: Its scores in their order: one, or one for each entry of `scores`.
        formats: Each score's marker and the whitespace around it; `start` is what stands before its rationale.
        add_special_tokens: Whether the tokenizer adds its own: True for plain text, False after a chat template.
    """

    text: str
    prompt_text: str
    scores: tuple[RenderedScore, ...]
    formats: tuple[CompletionFormat, ...]
    add_special_tokens: bool

    @property
    def format(self) -> CompletionFormat:
        """The last score's format, with the whitespace that the completion begins with."""
        return replace(self.formats[-1], start=self.formats[0].start)


@dataclass(frozen=True)
class TokenisedRow:
    """A row's token ids, where its completion starts, and where its scores stand.

    Attributes:
        input_ids: Of the whole row.
        prompt_length: Tokens before the completion.
        score_indices: The first token of each score. In a grid of several tokens a score, where its path begins.
        score_stops: One past the last token of each score.
    """

    input_ids: list[int]
    prompt_length: int
    score_indices: tuple[int, ...]
    score_stops: tuple[int, ...]


def as_prompt_completion(row: Mapping[str, Any]) -> Row:
    """A `messages` row with its last assistant turn as the completion; other rows unchanged."""
    if "messages" not in row and "conversations" not in row:
        return dict(row)
    rest: Row = maybe_convert_to_chatml(dict(row))
    messages = list(rest.pop("messages"))
    if not messages or messages[-1]["role"] != "assistant":
        raise ScoreNotFoundError("no completion", "the last message is not the assistant's")
    return {**rest, "prompt": messages[:-1], "completion": messages[-1:]}


def without_rationale(row: Mapping[str, Any], marker: str, grid: ScoreGrid) -> Row:
    """A prompt-completion row whose completion is marker and score alone."""
    if row.get("scores") is not None:
        raise ScoreNotFoundError("several scores", "a completion with several `scores` needs what stands between them")
    content = completion_text(row.get("completion"))
    start = content[: len(content) - len(content.lstrip())]
    bare = start + content[locate_score(content, marker, grid.texts).marker_start :]
    return {**row, **with_completion(row["prompt"], bare)}


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, **template: Any) -> tuple[str, bool]:
    """A prompt as the text that the model is asked with, and whether the tokenizer adds special tokens to it."""
    if isinstance(prompt, str):
        return prompt, True
    if not tokenizer.chat_template:
        raise ValueError(
            "the rows are chat messages, but this tokenizer has no chat template. Give the prompts as plain text, or "
            "set chat_template_path"
        )
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **template)), False


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids that a prompt is asked with, the same that SFTTrainer trains on."""
    text, add_special_tokens = prompt_text(tokenizer, prompt)
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def render_row(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], marker: str, grid: ScoreGrid) -> RenderedRow:
    """Write a prompt-completion row as text, as SFTTrainer would, and find its score.

    A row with a list of gold `scores` has one score behind each marker; any other row has a single one.

    Raises:
        ScoreNotFoundError: The completion has no score, or another number of them.
    """

    def find(content: str) -> tuple[ScoreSpan, ...]:
        golds = row.get("scores")
        if golds is None:
            return (locate_score(content, marker, grid.texts),)
        if isinstance(golds, list | tuple) and golds:
            return locate_scores(content, marker, grid.texts, len(golds))
        named = " For a gold score by aspect, set `aspects`" if isinstance(golds, Mapping) else ""
        raise ScoreNotFoundError(
            "not a list", f"`scores` is {golds!r}, not a list of gold scores in their order{named}"
        )

    return _render(tokenizer, row, find)


def render_aspects(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], aspects: Sequence[Aspect]
) -> RenderedRow:
    """Like `render_row`, for a completion that has a score for each aspect.

    Raises:
        ScoreNotFoundError: An aspect's score is missing, ambiguous or out of order.
    """
    return _render(tokenizer, row, lambda content: locate_aspects(content, aspects))


def _render(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], find: Callable[[str], tuple[ScoreSpan, ...]]
) -> RenderedRow:
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None:
        raise ScoreNotFoundError("no prompt", "the prompt is missing")
    if completion is None:
        raise ScoreNotFoundError("empty", "the completion is missing")
    chat = is_conversational({"prompt": prompt})
    if chat != is_conversational({"completion": completion}):
        raise ScoreNotFoundError("mixed types", "prompt and completion must both be text, or both chat messages")
    template: dict[str, Any] = dict(row.get("chat_template_kwargs") or {})
    if row.get("tools"):
        template.setdefault("tools", json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"])
    before, add_special_tokens = prompt_text(tokenizer, prompt, **template)
    if chat:
        text = str(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False, **template))
    else:
        text = before + completion
        eos = tokenizer.eos_token or ""
        text += "" if text.endswith(eos) else eos
    content = completion_text(completion)
    spans = find(content)
    # The template may strip or rewrite the rationale, so markers and scores are looked up in what it rendered, last
    # one first, and only behind the prompt, which may hold a forged marker of its own.
    rendered_from, rendered_to = common_prefix_length(before, text), len(text)
    scores: list[RenderedScore] = []
    for span in reversed(spans):
        written = content[span.marker_start : span.end]
        at = text.rfind(written, rendered_from, rendered_to)
        if at < 0:
            raise ScoreNotFoundError(
                "rewritten", f"the chat template rewrites {written!r}, so the score cannot be found"
            )
        scores.insert(0, RenderedScore(span.text, at + span.start - span.marker_start, at + len(written)))
        rendered_to = at
    ends = [0, *(span.end for span in spans)]
    return RenderedRow(
        text=text,
        prompt_text=before,
        scores=tuple(scores),
        formats=tuple(_format(content, end, span) for end, span in zip(ends, spans, strict=False)),
        add_special_tokens=add_special_tokens,
    )


def _format(content: str, begin: int, span: ScoreSpan) -> CompletionFormat:
    """How the score at `span` is written behind its rationale, which begins at `begin`."""
    before, rest = content[begin : span.marker_start], content[begin:]
    return CompletionFormat(
        content[span.marker_start : span.start - len(span.separator)],
        # Without a rationale there is nothing that the marker follows.
        lead=span.lead if before.strip() else " ",
        separator=span.separator,
        start=rest[: len(rest) - len(rest.lstrip())],
    )


def with_completion(prompt: Prompt, completion: str) -> Row:
    """A prompt-completion row of the prompt's own type, text or chat."""
    return {
        "prompt": prompt,
        "completion": completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}],
    }


def completion_text(completion: str | Sequence[Mapping[str, Any]] | None) -> str:
    """What the judge writes: a text completion itself, or the content of the assistant's last turn."""
    if isinstance(completion, str):
        return completion
    if not completion:
        raise ScoreNotFoundError("empty", "the completion is empty")
    content = completion[-1].get("content")
    if not isinstance(content, str):
        raise ScoreNotFoundError("not text", f"the completion's content is {type(content).__name__}, not text")
    return content


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    rendered: RenderedRow,
    grid: ScoreGrid | Sequence[ScoreGrid],
    *,
    check_ends: bool = True,
) -> TokenisedRow:
    """Tokenise a rendered row once and find the tokens of each score by the characters they cover.

    Args:
        tokenizer: A fast one.
        rendered: The row.
        grid: The grid of its scores, or one for each; with tokens.
        check_ends: Whether what follows a score has to be what follows it in the grid's paths.

    Raises:
        ScoreNotFoundError: A score has other tokens than in the grid, because the row writes it in another way, or,
            unless `check_ends` is off, is followed by something else where the grid's paths hold what follows.
    """
    special = rendered.add_special_tokens
    encoded = tokenizer(rendered.text, add_special_tokens=special, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    asked = tokenizer(rendered.prompt_text, add_special_tokens=special)["input_ids"]
    # Some templates render the prompt differently when it stands alone: like SFTTrainer, train where they diverge.
    prompt_length = common_prefix_length(asked, ids)
    grids = [grid] * len(rendered.scores) if isinstance(grid, ScoreGrid) else grid
    indices, stops = [], []
    for score, its_grid in zip(rendered.scores, grids, strict=True):
        covering = tokens_covering(encoded["offset_mapping"], score.start, score.end)
        start = _score_start(tokenizer, ids, covering, score.text, its_grid, check_ends)
        indices.append(start)
        stops.append(covering[-1] + 1)
    return TokenisedRow(ids, prompt_length, tuple(indices), tuple(stops))


def _score_start(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    covering: list[int],
    text: str,
    grid: ScoreGrid,
    check_ends: bool,
) -> int:
    """Where the grid's tokens for the score `text` begin, whose characters the tokens `covering` hold."""
    k = grid.texts.index(text)
    path = grid.paths[k] if grid.paths else ScorePath((grid.token_ids[k],))
    expected = list(path.written)
    start = covering[0] - path.lead if covering else -1
    found = ids[start : covering[-1] + 1] if start >= 0 else [ids[i] for i in covering]
    if found != expected:
        first = tokenizer.convert_ids_to_tokens(expected[0] if len(expected) == 1 else expected)
        raise ScoreNotFoundError(
            "other tokens",
            f"score {text!r} is the token(s) {tokenizer.convert_ids_to_tokens(found)} here and {first!r} "
            "in the first row: write marker and score alike in all rows",
        )
    behind = ids[start + len(expected) : start + len(path.token_ids)]
    if check_ends and behind != list(path.token_ids[len(expected) :]):
        wanted = tokenizer.decode(path.token_ids[len(expected) :])
        raise ScoreNotFoundError(
            "other end",
            f"score {text!r} is followed by {tokenizer.decode(behind)!r} here and by {wanted!r} in the first row. It "
            "is also the beginning of another score, and only what follows tells the two apart: write the same behind "
            "every score, such as a newline, or all scores with as many characters (01, 10)",
        )
    return start


def resolve_grid(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], marker: str, grid: ScoreGrid
) -> tuple[ScoreGrid, CompletionFormat]:
    """Find the grid's tokens where `row` writes its score, and the way it writes it."""
    _check_fast(tokenizer)
    rendered = render_row(tokenizer, row, marker, grid)
    return _resolved_at(tokenizer, rendered, rendered.scores[0], grid), rendered.format


def resolve_aspects(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], aspects: Sequence[Aspect]
) -> tuple[Aspect, ...]:
    """Find each aspect's tokens where `row` writes its score, and the way it writes it."""
    _check_fast(tokenizer)
    rendered = render_aspects(tokenizer, row, aspects)
    return tuple(
        replace(aspect, grid=_resolved_at(tokenizer, rendered, score, aspect.grid), format=written)
        for aspect, score, written in zip(aspects, rendered.scores, rendered.formats, strict=True)
    )


def _check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, which finding the score needs. Load the fast "
            "tokenizer of this model"
        )


def _resolved_at(
    tokenizer: PreTrainedTokenizerBase, rendered: RenderedRow, score: RenderedScore, grid: ScoreGrid
) -> ScoreGrid:
    return grid.resolve(
        tokenizer,
        rendered.text[: score.start],
        rendered.text[score.end :],
        add_special_tokens=rendered.add_special_tokens,
    )


# Tokens around a score that are read back as text: enough to hold the marker and what decides the score's token.
_WINDOW, _BEHIND = 24, 4


def resolve_grid_from_ids(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], score_index: int, marker: str, grid: ScoreGrid
) -> tuple[ScoreGrid, CompletionFormat]:
    """Like `resolve_grid`, for a row that came as tokens: the text around its score is read back from them.

    Raises:
        ScoreNotFoundError: There is no admissible score at `score_index`, or no marker before it.
    """
    start = max(0, score_index - _WINDOW)

    def read(stop: int) -> str:
        return str(tokenizer.decode(input_ids[start:stop], clean_up_tokenization_spaces=False))

    token = tokenizer.convert_ids_to_tokens(input_ids[score_index])
    until = read(score_index + 1)
    marker_start = until.rfind(marker)
    # A token holds a byte or more.
    whole = read(score_index + max(len(text.encode()) for text in grid.texts) + _BEHIND)
    try:
        if marker_start < 0 or not whole.startswith(until.rstrip("\ufffd")):
            raise ScoreNotFoundError("no marker", "")
        span = span_at(whole, marker_start, marker, grid.texts)
    except ScoreNotFoundError:
        text = next((text for text in sorted(grid.texts, key=len, reverse=True) if until.rstrip().endswith(text)), None)
        if text is None:
            raise ScoreNotFoundError(
                "other tokens",
                f"score_labels marks token {score_index} ({token!r}), which is none of the scores "
                f"{some_scores(grid.texts)}",
            ) from None
        before = until.rstrip()[: -len(text)]
        raise ScoreNotFoundError(
            "no marker", f"token {score_index} is the score {text!r}, but {before[-40:]!r} stands before it"
        ) from None
    resolved = grid.resolve(tokenizer, whole[: span.start], whole[span.end :])
    k = grid.texts.index(span.text)
    expected = resolved.paths[k].written if resolved.paths else (resolved.token_ids[k],)
    if tuple(input_ids[score_index : score_index + len(expected)]) != expected:
        raise ScoreNotFoundError("other tokens", f"this tokenizer does not write the score {span.text!r} as {token!r}")
    lead = span.lead if whole[: span.marker_start].strip() else " "
    return resolved, CompletionFormat(marker, lead=lead, separator=span.separator)


def score_prefix_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    rationale: str,
    completion_format: CompletionFormat,
    grid: ScoreGrid,
) -> list[int]:
    """Token ids up to a score, exactly those that a training row with this rationale has before its score.

    The whole completion is tokenised with a score in place and cut before it: text that ends in the marker alone may
    be tokenised in another way.
    """
    completion = completion_format.join(rationale, grid.texts[0])
    rendered = render_row(tokenizer, with_completion(prompt, completion), completion_format.marker, grid)
    # A training row may go on behind its score; this one ends there.
    tokens = tokenise(tokenizer, rendered, grid, check_ends=False)
    return tokens.input_ids[: tokens.score_indices[-1]]


def aspect_prefix_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    aspects: Sequence[Aspect],
    done: Sequence[tuple[str, str]],
    rationale: str | None = None,
) -> list[int]:
    """Token ids up to an aspect's score, or, without a `rationale`, up to where its rationale begins.

    Args:
        tokenizer: A fast one.
        prompt: Written like the training rows' prompts.
        aspects: With tokens.
        done: Rationale and score text of the aspects before it: one or more, or with a `rationale` none.
        rationale: Its own rationale, without the marker.
    """
    asked = aspects[: len(done) + 1]
    pieces = [*done, (rationale or "", asked[-1].grid.texts[0])]
    completion = "".join(aspect.format.join(*piece) for aspect, piece in zip(asked, pieces, strict=True))
    rendered = render_aspects(tokenizer, with_completion(prompt, completion), asked)
    tokens = tokenise(tokenizer, rendered, [aspect.grid for aspect in asked], check_ends=False)
    if rationale is None:
        return tokens.input_ids[: tokens.score_stops[-2]]
    return tokens.input_ids[: tokens.score_indices[-1]]
