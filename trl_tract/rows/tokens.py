"""A rendered row -> its token ids and the place of its scores in them; a grid's tokens, as a row writes its scores.

Training and judging share these functions: a judge is asked with exactly the token prefix that a training row with the
same rationale has before its score, and a row's first tokens are exactly those that its prompt is asked with. Knows
nothing of datasets or models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_tract.rows.messages import whole_characters
from trl_tract.rows.rendering import RenderedRow, render_pieces, render_row
from trl_tract.rows.row import Prompt
from trl_tract.rows.segments import Segments, segment
from trl_tract.rows.template import NO_SETTINGS, Asked, Template, TemplateSettings
from trl_tract.scale.grid import ScoreGrid, tokens_covering
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import CompletionFormat, ScoreNotFoundError, ScoreSpan, some_scores, span_at
from trl_tract.scale.trie import ScorePath


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


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, settings: TemplateSettings = NO_SETTINGS
) -> list[int]:
    """Token ids that a prompt is asked with: those that every row with it begins with in training."""
    template = Template(tokenizer, settings)
    return asked_ids(template, template.ask({"prompt": prompt}))


def asked_ids(template: Template, asked: Asked) -> list[int]:
    """Token ids of a prompt as the model is asked."""
    special = asked.add_special_tokens
    return segment(template.tokenizer, asked.text, asked.cuts, add_special_tokens=special).ids


def encode(template: Template, rendered: RenderedRow) -> tuple[Segments, int]:
    """The tokens of a row, and how many of them are those that its prompt is asked with."""
    tokenizer, asked = template.tokenizer, rendered.asked
    whole_characters(rendered.text)
    begin = asked_ids(template, asked)
    whole = segment(tokenizer, rendered.text, rendered.cuts, add_special_tokens=asked.add_special_tokens)
    if whole.ids[: len(begin)] != begin:
        # The first word would melt into the prompt's last token, which the judge is asked with.
        cuts = sorted({*rendered.cuts, len(asked.text)})
        whole = segment(tokenizer, rendered.text, cuts, add_special_tokens=asked.add_special_tokens)
    return whole, len(begin)


def tokenise(
    template: Template, rendered: RenderedRow, scales: Sequence[Scale], *, check_ends: bool = True
) -> TokenisedRow:
    """Tokenise a rendered row once and find the tokens of each score by the characters they cover.

    Args:
        check_ends: Whether what follows a score has to be what follows it in the grid's paths.

    Raises:
        ScoreNotFoundError: A score has other tokens than in the grid, because the row writes it in another way, or,
            unless `check_ends` is off, is followed by something else where the grid's paths hold what follows.
    """
    whole, prompt_length = encode(template, rendered)
    indices, stops = [], []
    for score, scale in zip(rendered.scores, scales, strict=True):
        covering = tokens_covering(whole.offsets, score.start, score.end)
        start = _score_start(template.tokenizer, whole.ids, covering, score.text, scale.grid, check_ends)
        indices.append(start)
        stops.append(covering[-1] + 1)
    return TokenisedRow(whole.ids, prompt_length, tuple(indices), tuple(stops))


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
            f"score {text!r} is the token(s) {tokenizer.convert_ids_to_tokens(found)} here and {first!r} in the first "
            "row. Write marker and score the same way in all rows",
        )
    behind = ids[start + len(expected) : start + len(path.token_ids)]
    if check_ends and behind != list(path.token_ids[len(expected) :]):
        wanted = tokenizer.decode(path.token_ids[len(expected) :])
        raise ScoreNotFoundError(
            "other end",
            f"score {text!r} is followed by {tokenizer.decode(behind)!r} here and by {wanted!r} in the first row. "
            "Another score starts with the same text, so only the text after the score tells them apart. Write the "
            "same text after every score, such as a newline, or give all scores the same number of characters (01, "
            "10)",
        )
    return start


def resolve_scales(
    template: Template | PreTrainedTokenizerBase, row: Mapping[str, Any], scales: Sequence[Scale]
) -> tuple[Scale, ...]:
    """Find each scale's tokens where `row` writes its score, and the way it writes it."""
    template = Template.of(template)
    rendered = render_row(template, row, scales)
    found = resolved_at(template, rendered, scales)
    return tuple(replace(scale, format=written) for scale, written in zip(found, rendered.formats, strict=True))


def resolve_asked(template: Template, row: Mapping[str, Any], scales: Sequence[Scale]) -> tuple[Scale, ...]:
    """Find each scale's tokens behind the prompt of `row`, written as the scales say."""
    pieces = [("", scale.grid.texts[0]) for scale in scales]
    return resolved_at(template, render_pieces(template, template.ask(row), scales, pieces), scales)


def resolved_at(template: Template, rendered: RenderedRow, scales: Sequence[Scale]) -> tuple[Scale, ...]:
    """Find each scale's tokens where a row has its score."""
    if not template.tokenizer.is_fast:
        raise ValueError(
            f"{type(template.tokenizer).__name__} gives no character offsets, which are needed to find the score. Load "
            "the fast tokenizer of this model"
        )

    def encoded(texts: Sequence[str], at: int) -> dict[str, list[Any]]:
        rows = []
        for text in texts:
            moved = len(text) - len(rendered.text)
            cuts = tuple(cut if cut <= at else cut + moved for cut in rendered.cuts)
            rows.append(encode(template, replace(rendered, text=text, cuts=cuts))[0])
        return {"input_ids": [row.ids for row in rows], "offset_mapping": [row.offsets for row in rows]}

    found = []
    for scale, score in zip(scales, rendered.scores, strict=True):
        before, after = rendered.text[: score.start], rendered.text[score.end :]
        grid = scale.grid.resolve(lambda texts, at=score.start, **_: encoded(texts, at), before, after)
        found.append(replace(scale, grid=grid))
    return tuple(found)


# Tokens around a score that are read back as text: enough to hold the marker and what decides the score's token.
_WINDOW, _BEHIND = 24, 4


def resolve_from_ids(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], score_index: int, scale: Scale
) -> Scale:
    """Like `resolve_scales`, for a score of a row that came as tokens: the text around it is read back from them.

    Raises:
        ScoreNotFoundError: There is no admissible score at `score_index`, or no marker before it.
    """
    whole, span = _read_back(tokenizer, input_ids, score_index, scale)
    grid = scale.grid.resolve(tokenizer, whole[: span.start], whole[span.end :])
    k = grid.texts.index(span.text)
    expected = grid.paths[k].written if grid.paths else (grid.token_ids[k],)
    if tuple(input_ids[score_index : score_index + len(expected)]) != expected:
        token = tokenizer.convert_ids_to_tokens(input_ids[score_index])
        raise ScoreNotFoundError("other tokens", f"this tokenizer does not write the score {span.text!r} as {token!r}")
    return replace(scale, grid=grid, format=_format_behind(whole, span, scale))


def format_from_ids(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], score_index: int, scale: Scale
) -> CompletionFormat:
    """How a row that came as tokens writes a score; what stands before its rationale stays as it is in `scale`.

    Raises:
        ScoreNotFoundError: There is no admissible score at `score_index`, or no marker before it.
    """
    return _format_behind(*_read_back(tokenizer, input_ids, score_index, scale), scale)


def _format_behind(whole: str, span: ScoreSpan, scale: Scale) -> CompletionFormat:
    lead = span.lead if whole[: span.marker_start].strip() else " "
    return replace(scale.format, lead=lead, separator=span.separator)


def _read_back(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], score_index: int, scale: Scale
) -> tuple[str, ScoreSpan]:
    """The text around a score, and where the score stands in it."""
    marker, grid = scale.marker, scale.grid
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
        return whole, span_at(whole, marker_start, marker, grid.texts)
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


@dataclass(frozen=True)
class MarkerPrefix:
    """Token ids up to a score, whose marker they hold.

    Attributes:
        ids: As `prefix_ids` gives them.
        prompt_length: Those of the prompt.
        marker_stop: One past the token with the marker's last character.
    """

    ids: list[int]
    prompt_length: int
    marker_stop: int


def marker_prefix(template: Template, asked: Asked, scale: Scale, rationale: str) -> MarkerPrefix:
    """Token ids up to the only score of a completion, and where its marker ends in them.

    Raises:
        ScoreNotFoundError: The score would have other tokens behind this rationale, or the text holds half a character.
    """
    rendered = render_pieces(template, asked, [scale], [(rationale, scale.grid.texts[0])])
    tokens = tokenise(template, rendered, [scale], check_ends=False)
    marker_end = rendered.scores[0].start - len(scale.format.separator)
    offsets = encode(template, rendered)[0].offsets
    stop = tokens_covering(offsets, marker_end - 1, marker_end)[-1] + 1
    return MarkerPrefix(tokens.input_ids[: tokens.score_indices[0]], tokens.prompt_length, stop)


def prefix_ids(
    template: Template | PreTrainedTokenizerBase,
    prompt: Prompt | Asked,
    scales: Sequence[Scale],
    done: Sequence[tuple[str, str]] = (),
    rationale: str | None = None,
) -> list[int]:
    """Token ids up to a score, or, without a `rationale`, up to where the next rationale begins.

    They are exactly those that a training row with these rationales and scores has there. The whole completion is
    tokenised with a score in place and cut before it: text that ends in the marker alone may be tokenised in another
    way.

    Args:
        template: Of the prompt; a fast tokenizer's own, without settings.
        prompt: Written like the training rows' prompts, or as it is asked.
        scales: With tokens.
        done: Rationale and score text of the scales that are written already.
        rationale: Of the scale that is next, without its marker.
    """
    template = Template.of(template)
    asked = prompt if isinstance(prompt, Asked) else template.ask({"prompt": prompt})
    if not done and rationale is None:
        return asked_ids(template, asked)
    pieces = [*done, (rationale or "", scales[len(done)].grid.texts[0])]
    rendered = render_pieces(template, asked, scales, pieces)
    # A training row may go on behind its score; this one ends there.
    tokens = tokenise(template, rendered, scales[: len(pieces)], check_ends=False)
    return tokens.input_ids[: tokens.score_stops[-2] if rationale is None else tokens.score_indices[-1]]
