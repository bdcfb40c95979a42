"""Rows -> `input_ids`, `labels`, `score_labels`; the collator; what was refused, and why. Knows nothing of models.

`score_labels` runs parallel to `labels`: NaN everywhere except at a score's token, where it holds the gold score in
rubric units. One column carries position and value through shuffling, packing and padding, and a score that
truncation ate is seen to be missing.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from trl_tract.prompts import CompletionFormat, ScoreNotFoundError, annotator_scores, some_scores
from trl_tract.rows.rendering import (
    RenderedRow,
    as_prompt_completion,
    render_row,
    resolve_grid,
    resolve_grid_from_ids,
    tokenise,
    without_rationale,
)
from trl_tract.scores import ScoreGrid, annotator_shares

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
class RowEncoder(OneGridEncoder):
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

    def _encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        row = as_prompt_completion(row)
        if self.drop_rationale:
            row = without_rationale(row, self.marker, self.grid)
        rendered = render_row(self.tokenizer, row, self.marker, self.grid)
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


def find_grid(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Mapping[str, Any]], marker: str, grid: ScoreGrid
) -> tuple[ScoreGrid, CompletionFormat, int]:
    """The grid's tokens, the rows' way of writing a score and the scores a row has, from the first row with a score.

    Raises:
        ValueError: None of the first 1,000 rows has a score that can be found.
    """

    def found_in(row: Mapping[str, Any]) -> tuple[ScoreGrid, CompletionFormat, int]:
        if "input_ids" in row:
            indices = score_indices(row)
            if not indices:
                raise ScoreNotFoundError("no score", "score_labels holds no score")
            return *resolve_grid_from_ids(tokenizer, row["input_ids"], indices[0], marker, grid), len(indices)
        row = as_prompt_completion(row)
        return *resolve_grid(tokenizer, row, marker, grid), len(row.get("scores") or [0])

    return first_found(
        rows,
        found_in,
        f"Write every completion as '<rationale> {marker} <score>', with a score of {some_scores(grid.texts)}; another "
        "marker or grid is set by score_marker and score_values",
    )


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


def check_columns(columns: Sequence[str], needed: Sequence[str], dataset_name: str) -> None:
    """Refuse datasets that cannot hold a judge's rows, and say what would; tokenised ones have the columns `needed`."""
    understood = (
        "rows with `prompt` and `completion` (and `score`, if it is not the one in the completion), or `messages`"
    )
    found = ", ".join(sorted(columns))
    if "input_ids" in columns:
        missing = [column for column in needed if column not in columns]
        if missing:
            raise ValueError(
                f"the {dataset_name} dataset is tokenised (columns: {found}) but lacks {', '.join(missing)}. "
                "score_labels is a float per token: the gold score at the score's token, NaN elsewhere; an annotators_ "
                f"column likewise holds the share of annotators who gave that score. Or pass {understood}"
            )
    elif "messages" not in columns and "conversations" not in columns and not {"prompt", "completion"} <= set(columns):
        raise ValueError(
            f"the {dataset_name} dataset has the columns {found}; TRACT needs to know where the prompt ends and the "
            f"completion begins: pass {understood}"
        )


def prepare_rows(
    dataset: Dataset | IterableDataset,
    encoder: Encoder,
    *,
    invalid_rows: str,
    num_proc: int | None,
    dataset_name: str,
    warn: Callable[[str], None],
) -> Dataset | IterableDataset:
    """Encode every row; refuse or drop, and name, those that cannot be.

    Args:
        dataset: Prompt-completion or `messages` rows.
        encoder: With its grid resolved.
        invalid_rows: `raise`, or `drop` to go on without them.
        num_proc: Processes that encode.
        dataset_name: For messages.
        warn: Told what was dropped.

    Raises:
        ValueError: A row was refused and `invalid_rows` is `raise`, or no row is left.
    """
    columns = get_dataset_column_names(dataset)
    if isinstance(dataset, IterableDataset):
        return _prepare_stream(dataset, encoder, columns, invalid_rows, dataset_name, warn)
    encoded = dataset.map(
        encoder,
        remove_columns=columns,
        features=encoder.features,
        num_proc=num_proc,
        desc=f"Tokenizing {dataset_name} dataset",
    )
    kinds = encoded["refusal_kind"]
    refused = [i for i, kind in enumerate(kinds) if kind]
    if refused:
        summary = refusal_summary(
            [(i, kinds[i], encoded[i]["refusal"], encoded[i]["num_tokens"]) for i in refused],
            len(encoded),
            dataset_name,
            encoder.max_length,
        )
        if invalid_rows == "raise":
            raise ValueError(f"{summary} Or set invalid_rows='drop' to go on without them.")
        kept = [i for i, kind in enumerate(kinds) if not kind]
        if not kept:
            raise ValueError(f"No row is left. {summary}")
        warn(f"Going on without them: {summary}")
        encoded = encoded.select(kept)
    return encoded.select_columns(encoder.columns)


def _prepare_stream(
    dataset: IterableDataset,
    encoder: Encoder,
    columns: list[str],
    invalid_rows: str,
    dataset_name: str,
    warn: Callable[[str], None],
) -> IterableDataset:
    """Encode a stream: its rows cannot be looked at beforehand, so each bad one is met when its turn comes."""
    dropped = 0

    def keep(row: Mapping[str, Any], index: int) -> bool:
        nonlocal dropped
        if not row["refusal_kind"]:
            return True
        detail = [(index, row["refusal_kind"], row["refusal"], row["num_tokens"])]
        summary = refusal_summary(detail, None, dataset_name, encoder.max_length)
        if invalid_rows == "raise":
            raise ValueError(f"{summary} Or set invalid_rows='drop' to go on without such rows.")
        dropped += 1
        if dropped & (dropped - 1) == 0:  # at 1, 2, 4, 8, ...: counted without flooding the log
            warn(f"Dropped {dropped} row(s) of the stream so far, the last one: {summary}")
        return False

    return dataset.map(encoder, remove_columns=columns).filter(keep, with_indices=True).select_columns(encoder.columns)


def refusal_summary(
    refused: Sequence[tuple[int, str, str, int]], total: int | None, dataset_name: str, max_length: int | None
) -> str:
    """One sentence for each reason: how many rows, which is the first, and what to do.

    Args:
        refused: `(row number, kind, message, number of tokens)` of each refused row.
        total: Rows in the dataset; None for a stream.
        dataset_name: Such as `train`.
        max_length: Tokens a row may have.
    """
    sentences = []
    for kind in dict.fromkeys(kind for _, kind, _, _ in refused):
        rows = [row for row in refused if row[1] == kind]
        number, _, message, num_tokens = rows[0]
        count = f"{len(rows)} of {total} {dataset_name} rows" if total is not None else f"{dataset_name} row {number}"
        if kind != "cut off":
            where = f"{kind}; first: row {number}" if total is not None else kind
            sentences.append(f"{count} refused ({where}): {message}. Mend what is wrong there.")
        elif total is None:
            sentences.append(
                f"{count} loses its score at max_length={max_length}: it has {num_tokens:,} tokens. Set max_length to "
                f"{num_tokens} or more."
            )
        else:
            longest = max(row[3] for row in rows)
            sentences.append(
                f"{count} lose their score at max_length={max_length} (first: row {number}, {num_tokens:,} tokens; "
                f"longest: {longest:,}). Set max_length to {longest} or more."
            )
    return " ".join(sentences)


@dataclass
class ScoreCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with the score columns padded or flattened like the labels, NaN off the scores.

    Adds `score_labels`, float32 `(B, L)`; if it is told of annotator columns, `annotator_labels`, float32 `(B, L, K)`;
    and, if the rows have them, `score_aspects`, int64 `(B, L)`: the number of each score's aspect, -1 elsewhere.
    """

    annotator_columns: Sequence[str] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows of `input_ids`, `labels`, `score_labels` and the annotator columns."""
        batch: dict[str, Any] = super().torch_call(examples)
        batch["score_labels"] = self._floats(examples, "score_labels")
        if self.annotator_columns:
            columns = [self._floats(examples, name) for name in self.annotator_columns]
            batch["annotator_labels"] = torch.stack(columns, dim=-1)
        if ASPECT_COLUMN in examples[0]:
            batch[ASPECT_COLUMN] = self._floats(examples, ASPECT_COLUMN).nan_to_num(-1).long()
        return batch

    def _floats(self, examples: list[dict[str, Any]], column: str) -> torch.Tensor:
        rows = [torch.tensor(example[column], dtype=torch.float32) for example in examples]
        if self.padding_free:
            rows = [torch.cat(rows)]
        return pad(rows, padding_value=math.nan, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)  # type: ignore[no-any-return]
