"""A rendered row -> its token ids and the place of its scores in them; a grid's tokens, as a row writes its scores.

Training and judging share these functions: a judge is asked with exactly the token prefix that a training row with the
same rationale has before its score. Knows nothing of datasets or models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from trl_tract.rows.rendering import (
    RenderedRow,
    RenderedScore,
    prompt_text,
    render_aspects,
    render_row,
    with_completion,
)
from trl_tract.rows.row import Prompt
from trl_tract.scale.grid import ScoreGrid, tokens_covering
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import CompletionFormat, ScoreNotFoundError, some_scores, span_at
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


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids that a prompt is asked with, the same that SFTTrainer trains on."""
    text, add_special_tokens = prompt_text(tokenizer, prompt)
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


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
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], aspects: Sequence[Scale]
) -> tuple[Scale, ...]:
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
    aspects: Sequence[Scale],
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
