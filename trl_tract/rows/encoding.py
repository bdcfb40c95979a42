"""One row -> the model's columns, or why it has none.

`score_labels` runs parallel to `labels`: NaN everywhere except at a score's token, where it holds the gold score in
rubric units. One column carries position and value through shuffling, packing and padding, and a score that
truncation ate is seen to be missing. Knows nothing of datasets or models.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from trl_tract.rows.golds import annotator_scores, annotator_shares
from trl_tract.rows.rendering import RenderedRow, as_prompt_completion, render_row, without_rationale
from trl_tract.rows.tokens import tokenise
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.text import ScoreNotFoundError, some_scores

MODEL_COLUMNS = ["input_ids", "labels", "score_labels"]
ASPECT_COLUMN = "score_aspects"
"""Where completions have several aspects: at each score's token the number of its aspect, NaN elsewhere."""


def annotator_columns(grid: ScoreGrid) -> list[str]:
    """Columns that hold, at a score's token, the share of annotators who gave each score of the grid; NaN elsewhere.

    One column a score, because packing keeps flat lists together and would not know what to do with nested ones.
    """
    return [f"annotators_{text}" for text in grid.texts]


class Encoder:
    """What all encoders share: the columns they make, and how they refuse a row.

    A refusal is a column, not an exception, so that one pass over the data names every bad row.
    """

    max_length: int | None

    @property
    def columns(self) -> list[str]:
        """Names of the model's columns."""
        raise NotImplementedError

    @property
    def features(self) -> Features:
        """Spelled out, because `map` would guess them from the first rows, which may all be refused and hence empty."""
        return Features(
            input_ids=List(Value("int64")),
            labels=List(Value("int64")),
            **{name: List(Value("float64")) for name in self.columns[2:]},
            num_tokens=Value("int64"),
            refusal_kind=Value("string"),
            refusal=Value("string"),
        )

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The model's columns, `num_tokens`, and a `refusal` that is empty for a good row."""
        try:
            return self._encode(row)
        except ScoreNotFoundError as error:
            return self._refuse(error.kind, str(error))

    def _encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _accept(self, columns: dict[str, list[Any]], last_score: int) -> dict[str, Any]:
        num_tokens = len(columns["input_ids"])
        if self.max_length is not None and last_score >= self.max_length:
            return self._refuse("cut off", "", num_tokens)
        kept = {name: columns[name][: self.max_length] for name in self.columns}
        return {**kept, "num_tokens": num_tokens, "refusal_kind": "", "refusal": ""}

    def _refuse(self, kind: str, message: str, num_tokens: int = 0) -> dict[str, Any]:
        empty: dict[str, Any] = {name: [] for name in self.columns}
        return {**empty, "num_tokens": num_tokens, "refusal_kind": kind, "refusal": message}


class TextEncoder(Encoder):
    """What the encoders of rows of text share: what is encoded can be looked at first."""

    tokenizer: PreTrainedTokenizerBase

    def grids_of(self, rendered: RenderedRow) -> tuple[ScoreGrid, ...]:
        """The grid of each of a row's scores, its tokens resolved."""
        raise NotImplementedError

    def render(self, row: Mapping[str, Any]) -> RenderedRow:
        """The row as the text that is tokenised, with its scores found.

        Raises:
            ScoreNotFoundError: A score is missing.
        """
        raise NotImplementedError


class OneGridEncoder(Encoder):
    """What the encoders of rows on one grid share."""

    grid: ScoreGrid
    annotators: bool

    @property
    def columns(self) -> list[str]:
        """Names of the model's columns."""
        return [*MODEL_COLUMNS, *(annotator_columns(self.grid) if self.annotators else [])]


def check_range(score: float, grid: ScoreGrid) -> None:
    """Refuse a gold score that the grid's two ends do not hold between them.

    Raises:
        ScoreNotFoundError: It lies outside.
    """
    if not grid.in_range(score):
        low, high = grid.texts[0], grid.texts[-1]
        raise ScoreNotFoundError("off the range", f"the score {score:g} is not between {low} and {high}")


@dataclass(frozen=True)
class RowEncoder(OneGridEncoder, TextEncoder):
    """Turns one prompt-completion row into the model's columns, or says why it cannot.

    Attributes:
        tokenizer: A fast one.
        grid: The score grid, its tokens resolved.
        marker: Text that stands before every score.
        max_length: Tokens a row may have; None: no limit.
        completion_only: Whether the prompt is left out of the cross-entropy.
        score_in_ce: Whether the score is left in it.
        annotators: Whether to make `annotator_columns`.
        drop_rationale: Whether to leave the rationale out.
    """

    tokenizer: PreTrainedTokenizerBase
    grid: ScoreGrid
    marker: str
    max_length: int | None
    completion_only: bool
    score_in_ce: bool
    annotators: bool = False
    drop_rationale: bool = False

    def grids_of(self, rendered: RenderedRow) -> tuple[ScoreGrid, ...]:
        """The one grid, for each of a row's scores."""
        return (self.grid,) * len(rendered.scores)

    def render(self, row: Mapping[str, Any]) -> RenderedRow:
        """The row as text, without its rationale if that is left out."""
        row = as_prompt_completion(row)
        if self.drop_rationale:
            row = without_rationale(row, self.marker, self.grid)
        return render_row(self.tokenizer, row, self.marker, self.grid)

    def _encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        rendered = self.render(row)
        golds = _golds(row, rendered, self.grid)
        for score in (score for annotators in golds for score in annotators):
            check_range(score, self.grid)
        tokens = tokenise(self.tokenizer, rendered, self.grid)
        ids = tokens.input_ids
        start = tokens.prompt_length if self.completion_only else 0
        columns: dict[str, list[Any]] = {"input_ids": ids, "labels": [-100] * start + ids[start:]}
        columns |= {name: [math.nan] * len(ids) for name in self.columns[2:]}
        for index, stop, annotators in zip(tokens.score_indices, tokens.score_stops, golds, strict=True):
            if not self.score_in_ce:
                columns["labels"][index:stop] = [-100] * (stop - index)
            columns["score_labels"][index] = sum(annotators) / len(annotators)
            for name, share in zip(self.columns[3:], annotator_shares(annotators, self.grid.values), strict=False):
                columns[name][index] = share
        return self._accept(columns, tokens.score_stops[-1] - 1)


def _golds(row: Mapping[str, Any], rendered: RenderedRow, grid: ScoreGrid) -> list[list[float]]:
    """The annotators' scores behind each score of a row."""
    if row.get("scores") is None:
        return [annotator_scores(grid.in_numbers(row.get("score", rendered.scores[0].text)))]
    if row.get("score") is not None:
        raise ScoreNotFoundError("score and scores", "the row has both `score` and `scores`: keep one of them")
    return [annotator_scores(grid.in_numbers(score)) for score in row["scores"]]


@dataclass(frozen=True)
class TokenisedRowEncoder(OneGridEncoder):
    """Checks a row that came as `input_ids`, `labels` and `score_labels`, and cuts it to `max_length`."""

    grid: ScoreGrid
    max_length: int | None
    annotators: bool = False

    def _encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        equal_lengths(row, self.columns)
        indices = score_indices(row)
        for index in indices:
            check_range(row["score_labels"][index], self.grid)
            check_score_tokens(row["input_ids"], index, self.grid)
        return self._accept({name: list(row[name]) for name in self.columns}, max(indices, default=-1))


def check_score_tokens(ids: Sequence[int], index: int, grid: ScoreGrid) -> None:
    """Refuse a tokenised row where no score of the grid begins at `index`.

    Raises:
        ScoreNotFoundError: None does.
    """
    known = [path.token_ids for path in grid.paths] or [(token,) for token in grid.token_ids]
    if not any(tuple(ids[index : index + len(path)]) == path for path in known):
        shown = some_scores([str(path if grid.paths else path[0]) for path in known])
        raise ScoreNotFoundError(
            "other tokens",
            f"score_labels marks token {index} (id {ids[index]}), which is none of the scores' tokens {shown}",
        )


def equal_lengths(row: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Refuse a tokenised row whose columns differ in length.

    Raises:
        ScoreNotFoundError: They do.
    """
    lengths = {name: len(row[name]) for name in columns}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ScoreNotFoundError("unequal lengths", f"its columns have unequal lengths: {shown}")


def score_indices(row: Mapping[str, Any]) -> list[int]:
    """Where a tokenised row has its scores."""
    # A list of floats that went through Arrow may hold None for NaN.
    return [i for i, score in enumerate(row["score_labels"]) if score is not None and not math.isnan(score)]


Found = TypeVar("Found")


def first_found(
    rows: Iterable[Mapping[str, Any]], found_in: Callable[[Mapping[str, Any]], Found], advice: str
) -> Found:
    """What is found in the first row that has it.

    Raises:
        ValueError: None of the first 1,000 rows has it; with the reason of the first, and `advice`.
    """
    problem: ValueError | None = None
    looked_at = 0
    for row in itertools.islice(rows, 1000):
        looked_at += 1
        try:
            return found_in(row)
        except ScoreNotFoundError as error:
            problem = problem or error
    raise ValueError(f"none of the first {looked_at} rows has a score that can be found. Row 0: {problem}. {advice}")
