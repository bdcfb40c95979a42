"""Rows whose completions have a score for each aspect -> the model's columns, and which aspect each score is of.

Knows nothing of models.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_tract.rows.encoding import (
    ASPECT_COLUMN,
    MODEL_COLUMNS,
    Encoder,
    TextEncoder,
    check_range,
    check_score_tokens,
    equal_lengths,
    first_found,
    score_indices,
)
from trl_tract.rows.golds import annotator_scores, aspect_scores
from trl_tract.rows.rendering import RenderedRow, as_prompt_completion, render_aspects
from trl_tract.rows.tokens import resolve_aspects, resolve_grid_from_ids, tokenise
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import ScoreNotFoundError


class AspectEncoder(Encoder):
    """What both encoders share."""

    aspects: tuple[Scale, ...]

    @property
    def columns(self) -> list[str]:
        """Names of the model's columns."""
        return [*MODEL_COLUMNS, ASPECT_COLUMN]

    def _check(self, golds: Sequence[Sequence[float]]) -> None:
        for aspect, annotators in zip(self.aspects, golds, strict=True):
            for gold in annotators:
                try:
                    check_range(gold, aspect.grid)
                except ScoreNotFoundError as error:
                    raise ScoreNotFoundError(error.kind, f"aspect {aspect.name!r}: {error}") from error


@dataclass(frozen=True)
class AspectRowEncoder(AspectEncoder, TextEncoder):
    """Turns one prompt-completion row with a score for each aspect into the model's columns, or says why it cannot.

    Attributes:
        tokenizer: A fast one.
        aspects: In the order in which completions have them, their tokens resolved.
        max_length: Tokens a row may have; None: no limit.
        completion_only: Whether the prompt is left out of the cross-entropy.
        score_in_ce: Whether the scores are left in it.
    """

    tokenizer: PreTrainedTokenizerBase
    aspects: tuple[Scale, ...]
    max_length: int | None
    completion_only: bool
    score_in_ce: bool

    def grids_of(self, rendered: RenderedRow) -> tuple[ScoreGrid, ...]:
        """Each aspect's."""
        return tuple(aspect.grid for aspect in self.aspects)

    def render(self, row: Mapping[str, Any]) -> RenderedRow:
        """The row as text, with the score of each aspect found."""
        return render_aspects(self.tokenizer, as_prompt_completion(row), self.aspects)

    def _encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        rendered = self.render(row)
        golds = _golds(row, rendered, self.aspects)
        self._check(golds)
        tokens = tokenise(self.tokenizer, rendered, [aspect.grid for aspect in self.aspects])
        ids = tokens.input_ids
        start = tokens.prompt_length if self.completion_only else 0
        columns: dict[str, list[Any]] = {"input_ids": ids, "labels": [-100] * start + ids[start:]}
        columns |= {name: [math.nan] * len(ids) for name in self.columns[2:]}
        for number, (index, stop) in enumerate(zip(tokens.score_indices, tokens.score_stops, strict=True)):
            if not self.score_in_ce:
                columns["labels"][index:stop] = [-100] * (stop - index)
            columns["score_labels"][index] = sum(golds[number]) / len(golds[number])
            columns[ASPECT_COLUMN][index] = float(number)
        return self._accept(columns, tokens.score_stops[-1] - 1)


def _golds(row: Mapping[str, Any], rendered: RenderedRow, aspects: Sequence[Scale]) -> list[list[float]]:
    """The annotators' scores of each aspect: those of `scores`, or the ones that the completion has."""
    if row.get("score") is not None:
        raise ScoreNotFoundError(
            "score and aspects", "the row has a `score`; with aspects it needs `scores`, a mapping with one for each"
        )
    given = aspect_scores(row.get("scores"), aspects)
    if given is None:
        given = [aspect.grid.value_of(score.text) for aspect, score in zip(aspects, rendered.scores, strict=True)]
    golds = []
    for aspect, gold in zip(aspects, given, strict=True):
        try:
            golds.append(annotator_scores(gold))
        except ScoreNotFoundError as error:
            raise ScoreNotFoundError(error.kind, f"aspect {aspect.name!r}: {error}") from error
    return golds


@dataclass(frozen=True)
class TokenisedAspectEncoder(AspectEncoder):
    """Checks a row that came as `input_ids`, `labels`, `score_labels` and `score_aspects`, and cuts it."""

    aspects: tuple[Scale, ...]
    max_length: int | None

    def _encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        equal_lengths(row, self.columns)
        indices = _aspect_indices(row, self.aspects)
        self._check([[row["score_labels"][index]] for index in indices])
        for aspect, index in zip(self.aspects, indices, strict=True):
            check_score_tokens(row["input_ids"], index, aspect.grid)
        return self._accept({name: list(row[name]) for name in self.columns}, indices[-1])


def _aspect_indices(row: Mapping[str, Any], aspects: Sequence[Scale]) -> list[int]:
    """Where a tokenised row has the score of each aspect."""
    indices = score_indices(row)
    marked = [row[ASPECT_COLUMN][index] for index in indices]
    if marked != list(range(len(aspects))):
        raise ScoreNotFoundError(
            "order of aspects",
            f"score_aspects names the aspects {marked} at its scores; each of the {len(aspects)} has to be there once, "
            f"as {', '.join(f'{number} ({aspect.name})' for number, aspect in enumerate(aspects))}",
        )
    return indices


def find_aspects(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Mapping[str, Any]], aspects: tuple[Scale, ...]
) -> tuple[Scale, ...]:
    """The aspects with their tokens and the rows' way of writing them, from the first row that has all of them.

    Raises:
        ValueError: None of the first 1,000 rows has them.
    """

    def found_in(row: Mapping[str, Any]) -> tuple[Scale, ...]:
        if "input_ids" not in row:
            return resolve_aspects(tokenizer, as_prompt_completion(row), aspects)
        resolved: list[Scale] = []
        for aspect, index in zip(aspects, _aspect_indices(row, aspects), strict=True):
            grid, written = resolve_grid_from_ids(tokenizer, row["input_ids"], index, aspect.marker, aspect.grid)
            # What stands before a rationale cannot be told from tokens; the default of the configuration is a space.
            start = aspect.format.start if resolved else written.start
            resolved.append(replace(aspect, grid=grid, format=replace(written, start=start)))
        return tuple(resolved)

    pattern = " ".join(f"<rationale> {aspect.marker} <score>" for aspect in aspects)
    return first_found(rows, found_in, f"Write every completion as '{pattern}'; markers and grids are set by aspects")
