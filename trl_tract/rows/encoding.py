"""One row -> the model's columns, or why it has none.

`score_labels` runs parallel to `labels`: NaN everywhere except at a score's first token, where it holds the gold score
in rubric units. One column carries position and value through shuffling, packing and padding, and a score that
truncation ate is seen to be missing. Knows nothing of datasets or models.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from trl_tract.rows.golds import annotator_shares, read_golds
from trl_tract.rows.rendering import RenderedRow, as_prompt_completion, render_row, without_rationales
from trl_tract.rows.row import ROW_NUMBER
from trl_tract.rows.template import NO_SETTINGS, Template, TemplateSettings
from trl_tract.rows.tokens import format_from_ids, tokenise
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import ScoreNotFoundError, some_scores
from trl_tract.scale.trie import ScorePath

MODEL_COLUMNS = ["input_ids", "labels", "score_labels"]
ASPECT_COLUMN = "score_aspects"
"""Where completions have several scores: at each score's first token the number of its scale, NaN elsewhere."""


def annotator_columns(scales: Sequence[Scale]) -> list[str]:
    """Columns that hold, at a score's first token, the share of annotators who gave each score; NaN elsewhere.

    One column a score, because packing keeps flat lists together and would not know what to do with nested ones. They
    are named by the scores; where there are several scales, by the scores' places in each grid, from 0.
    """
    longest = max((scale.grid for scale in scales), key=len)
    return [f"annotators_{name}" for name in (longest.texts if len(scales) == 1 else range(len(longest)))]


def model_columns(scales: Sequence[Scale], *, annotators: bool) -> list[str]:
    """Names of the columns that rows on these scales are trained from."""
    return [
        *MODEL_COLUMNS,
        *(annotator_columns(scales) if annotators else []),
        *([ASPECT_COLUMN] if len(scales) > 1 else []),
    ]


@dataclass(frozen=True)
class Encoder:
    """What both encoders share: the columns they make, and how they refuse a row.

    A refusal is a column, not an exception, so that one pass over the data names every bad row.

    Attributes:
        scales: In the order in which completions have them, their tokens resolved.
        max_length: Tokens a row may have; None: no limit.
        annotators: Whether to make `annotator_columns`.
        tokenizer: Of the model.
        score_in_ce: Whether the scores are left in the cross-entropy.
    """

    scales: tuple[Scale, ...]
    max_length: int | None
    annotators: bool = False
    tokenizer: PreTrainedTokenizerBase = field(kw_only=True)
    score_in_ce: bool = field(default=False, kw_only=True)

    @property
    def columns(self) -> list[str]:
        """Names of the model's columns."""
        return model_columns(self.scales, annotators=self.annotators)

    @property
    def features(self) -> Features:
        """Spelled out, because `map` would guess them from the first rows, which may all be refused and hence empty."""
        return Features(
            input_ids=List(Value("int64")),
            labels=List(Value("int64")),
            **{name: List(Value("float64")) for name in self.columns[2:]},
            num_tokens=Value("int64"),
            refusal_row=Value("int64"),
            refusal_kind=Value("string"),
            refusal=Value("string"),
        )

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The model's columns, `num_tokens`, and a `refusal` that is empty for a good row, with the row's number."""
        kept: dict[str, Any] = {name: [] for name in self.columns}
        num_tokens, kind, message = 0, "", ""
        try:
            columns, last_score = self._encode(row)
        except ScoreNotFoundError as error:
            kind, message = error.kind, str(error)
        else:
            num_tokens = len(columns["input_ids"])
            if self.max_length is not None and last_score >= self.max_length:
                kind = "cut off"
            else:
                kept = {name: columns[name][: self.max_length] for name in self.columns}
        number = row.get(ROW_NUMBER)
        return {**kept, "num_tokens": num_tokens, "refusal_row": number, "refusal_kind": kind, "refusal": message}

    def _encode(self, row: Mapping[str, Any]) -> tuple[dict[str, list[Any]], int]:
        """The columns, uncut, and the index of the last token that a score needs."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RowEncoder(Encoder):
    """Turns one prompt-completion row into the model's columns, or says why it cannot.

    Attributes:
        completion_only: Whether the prompt is left out of the cross-entropy.
    """

    settings: TemplateSettings = NO_SETTINGS
    completion_only: bool = True
    drop_rationale: bool = False

    @functools.cached_property
    def template(self) -> Template:
        """The tokenizer's chat template, with its settings."""
        return Template(self.tokenizer, self.settings)

    def render(self, row: Mapping[str, Any]) -> RenderedRow:
        """The row as the text that is tokenised, with its scores found."""
        row = as_prompt_completion(row)
        return render_row(
            self.template, without_rationales(row, self.scales) if self.drop_rationale else row, self.scales
        )

    def _encode(self, row: Mapping[str, Any]) -> tuple[dict[str, list[Any]], int]:
        rendered = self.render(row)
        golds = read_golds(row, self.scales) or []
        tokens = tokenise(self.template, rendered, self.scales)
        ids = tokens.input_ids
        start = tokens.prompt_length if self.completion_only else 0
        columns: dict[str, list[Any]] = {"input_ids": ids, "labels": [-100] * start + ids[start:]}
        columns |= {name: [math.nan] * len(ids) for name in self.columns[2:]}
        places = zip(self.scales, tokens.score_indices, tokens.score_stops, golds, strict=True)
        for number, (scale, index, stop, annotators) in enumerate(places):
            if not self.score_in_ce:
                columns["labels"][index:stop] = [-100] * (stop - index)
            columns["score_labels"][index] = sum(annotators) / len(annotators)
            if self.annotators:
                shares = annotator_shares(annotators, scale.grid.values)
                # A shorter grid than the longest: nobody gives scores that it does not have.
                for k, name in enumerate(annotator_columns(self.scales)):
                    columns[name][index] = shares[k] if k < len(shares) else 0.0
            if ASPECT_COLUMN in columns:
                columns[ASPECT_COLUMN][index] = float(number)
        return columns, tokens.score_stops[-1] - 1


@dataclass(frozen=True)
class TokenisedRowEncoder(Encoder):
    """Checks a row that came as `input_ids`, `labels`, `score_labels` and the other columns, and cuts it.

    Of its labels, those of the scores alone are set: `score_in_ce` decides on them.
    """

    def _encode(self, row: Mapping[str, Any]) -> tuple[dict[str, list[Any]], int]:
        lengths = {name: len(row[name]) for name in self.columns}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ScoreNotFoundError("unequal lengths", f"its columns have unequal lengths: {shown}")
        ids, columns = row["input_ids"], {name: list(row[name]) for name in self.columns}
        indices = score_indices(row, self.scales)
        for scale, index in zip(self.scales, indices, strict=False):
            score = row["score_labels"][index]
            if not scale.grid.in_range(score):
                low, high = scale.grid.texts[0], scale.grid.texts[-1]
                raise ScoreNotFoundError(
                    "off the range", f"{scale.about}the score {score:g} is not between {low} and {high}"
                )
            written = _written_tokens(ids, index, scale.grid)
            format_from_ids(self.tokenizer, ids, index, scale)  # raises where no marker stands before the score
            columns["labels"][index : index + len(written)] = written if self.score_in_ce else [-100] * len(written)
        return columns, max(indices, default=-1)


def _written_tokens(ids: Sequence[int], index: int, grid: ScoreGrid) -> tuple[int, ...]:
    """The tokens of the score that begins at `index`; refuses a tokenised row where none of the grid does."""
    known: Sequence[ScorePath] = grid.paths or [ScorePath((token,)) for token in grid.token_ids]
    for path in known:
        if tuple(ids[index : index + len(path.token_ids)]) == path.token_ids:
            return path.written
    shown = some_scores([str(path.token_ids if grid.paths else path.token_ids[0]) for path in known])
    raise ScoreNotFoundError(
        "other tokens",
        f"score_labels marks token {index} (id {ids[index]}), which is none of the scores' tokens {shown}",
    )


def score_indices(row: Mapping[str, Any], scales: Sequence[Scale]) -> list[int]:
    """Where a tokenised row has the score of each scale; none for a row that counts for its text alone."""
    # A list of floats that went through Arrow may hold None for NaN.
    indices = [i for i, score in enumerate(row["score_labels"]) if score is not None and not math.isnan(score)]
    if "seq_lengths" in row:
        indices = indices[: len(scales)]  # of several rows that were packed before, the first with scores
    if len(scales) == 1 and len(indices) > 1:
        raise ScoreNotFoundError(
            "two scores",
            f"score_labels holds {len(indices)} scores. If a completion has several scores, name them in `aspects`",
        )
    marked = [row[ASPECT_COLUMN][index] for index in indices] if len(scales) > 1 else [0] * len(indices)
    if indices and marked != list(range(len(scales))):
        raise ScoreNotFoundError(
            "order of aspects",
            f"score_aspects marks the scores with the aspects {marked}. Each of the {len(scales)} aspects must appear "
            f"exactly once: {', '.join(f'{number} ({scale.name})' for number, scale in enumerate(scales))}",
        )
    return indices
