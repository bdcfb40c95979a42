"""Rows -> `input_ids`, `labels`, `score_labels`; the collator; what was refused, and why. Knows nothing of models.

`score_labels` runs parallel to `labels`: NaN everywhere except at a score's token, where it holds the gold score in
rubric units. One column carries position and value through shuffling, packing and padding, and a score that
truncation ate is seen to be missing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from trl_tract.prompts import ScoreNotFoundError, gold_score
from trl_tract.rendering import as_prompt_completion, render_row, tokenise
from trl_tract.scores import ScoreGrid

MODEL_COLUMNS = ["input_ids", "labels", "score_labels"]
# Spelled out, because `map` would guess them from the first rows, which may all be refused and hence empty.
_FEATURES = Features(
    input_ids=List(Value("int64")),
    labels=List(Value("int64")),
    score_labels=List(Value("float64")),
    num_tokens=Value("int64"),
    refusal_kind=Value("string"),
    refusal=Value("string"),
)


@dataclass(frozen=True)
class RowEncoder:
    """Turns one prompt-completion row into the three model columns, or says why it cannot.

    A refusal is a column, not an exception, so that one pass over the data names every bad row.
    """

    tokenizer: PreTrainedTokenizerBase
    grid: ScoreGrid
    marker: str
    max_length: int | None
    completion_only: bool
    score_in_ce: bool

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """`input_ids`, `labels`, `score_labels`, `num_tokens`, and a `refusal` that is empty for a good row."""
        try:
            return self._encode(as_prompt_completion(row))
        except ScoreNotFoundError as error:
            return self._refuse(error.kind, str(error))

    def _encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        rendered = render_row(self.tokenizer, row, self.marker, self.grid)
        gold = gold_score(row.get("score", rendered.score_text))
        if not self.grid.in_range(gold):
            low, high = self.grid.texts[0], self.grid.texts[-1]
            raise ScoreNotFoundError("off the range", f"the score {gold:g} is not between {low} and {high}")
        tokens = tokenise(self.tokenizer, rendered, self.grid)
        num_tokens = len(tokens.input_ids)
        if self.max_length is not None and tokens.score_index >= self.max_length:
            return self._refuse("cut off", "", num_tokens)
        ids = tokens.input_ids[: self.max_length]
        start = tokens.prompt_length if self.completion_only else 0
        labels = [-100] * start + ids[start:]
        if not self.score_in_ce:
            labels[tokens.score_index] = -100
        score_labels = [math.nan] * len(ids)
        score_labels[tokens.score_index] = gold
        return {
            "input_ids": ids,
            "labels": labels,
            "score_labels": score_labels,
            "num_tokens": num_tokens,
            "refusal_kind": "",
            "refusal": "",
        }

    def _refuse(self, kind: str, message: str, num_tokens: int = 0) -> dict[str, Any]:
        return {
            "input_ids": [],
            "labels": [],
            "score_labels": [],
            "num_tokens": num_tokens,
            "refusal_kind": kind,
            "refusal": message,
        }


def check_columns(columns: Sequence[str], dataset_name: str) -> None:
    """Refuse datasets that cannot hold a judge's rows, and say what would."""
    understood = (
        "rows with `prompt` and `completion` (and `score`, if it is not the one in the completion), or `messages`"
    )
    found = ", ".join(sorted(columns))
    if "input_ids" in columns:
        missing = [column for column in MODEL_COLUMNS if column not in columns]
        if missing:
            raise ValueError(
                f"the {dataset_name} dataset is tokenised (columns: {found}) but lacks {', '.join(missing)}. "
                "score_labels is a float per token: the gold score at the score's token, NaN elsewhere. Or pass "
                f"{understood}"
            )
    elif "messages" not in columns and "conversations" not in columns and not {"prompt", "completion"} <= set(columns):
        raise ValueError(
            f"the {dataset_name} dataset has the columns {found}; TRACT needs to know where the prompt ends and the "
            f"completion begins: pass {understood}"
        )


def prepare_rows(
    dataset: Dataset | IterableDataset,
    encoder: RowEncoder,
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
        features=_FEATURES,
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
    return encoded.select_columns(MODEL_COLUMNS)


def _prepare_stream(
    dataset: IterableDataset,
    encoder: RowEncoder,
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

    return dataset.map(encoder, remove_columns=columns).filter(keep, with_indices=True).select_columns(MODEL_COLUMNS)


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
    """TRL's collator, with `score_labels` padded or flattened like the labels: float32 `(B, L)`, NaN off the scores."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows of `input_ids`, `labels` and `score_labels`."""
        batch: dict[str, Any] = super().torch_call(examples)
        scores = [torch.tensor(example["score_labels"], dtype=torch.float32) for example in examples]
        if self.padding_free:
            scores = [torch.cat(scores)]
        batch["score_labels"] = pad(
            scores, padding_value=math.nan, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
        )
        return batch
