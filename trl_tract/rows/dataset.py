"""A dataset of rows -> the model's columns; the collator; what was refused, and why. Knows nothing of models."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from trl_tract.rows.encoding import ASPECT_COLUMN, Encoder, score_indices
from trl_tract.rows.golds import check_labels
from trl_tract.rows.refusals import Refusal, kept_of_stream, refuse
from trl_tract.rows.rendering import as_prompt_completion, written_formats
from trl_tract.rows.row import ROW_NUMBER
from trl_tract.rows.template import Template
from trl_tract.rows.tokens import format_from_ids, resolve_from_ids, resolve_scales
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import CompletionFormat, ScoreNotFoundError, some_scores

logger = logging.get_logger(__name__)

_LOOKED_AT = 1000  # rows whose way of writing scores is counted


def find_scales(
    template: Template | PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    scales: tuple[Scale, ...],
    warn: Callable[[str], None] = logger.warning,
) -> tuple[Scale, ...]:
    """The scales with their tokens and the rows' way of writing them: the commonest one of the first 1,000 rows.

    Args:
        rows: Of text, or tokenised.
        warn: Told how many rows write marker and score in another way.

    Raises:
        ValueError: None of these rows has all the scores, or a marker ends the turn.
    """
    template = Template.of(template)
    eos = template.tokenizer.eos_token
    for scale in scales:
        if eos and eos in scale.marker:
            raise ValueError(
                f"the marker {scale.marker!r} contains {eos!r}, which ends the model's turn, so the model would never "
                "write a score. Choose another marker"
            )
    problems: list[tuple[int, ScoreNotFoundError]] = []
    ways: dict[tuple[CompletionFormat, ...], list[tuple[int, Mapping[str, Any]]]] = {}
    count = 0
    for index, row in enumerate(itertools.islice(rows, _LOOKED_AT)):
        count += 1
        number = row.get(ROW_NUMBER, index)
        try:
            ways.setdefault(_formats(template, row, scales), []).append((number, row))
        except ScoreNotFoundError as error:
            problems.append((number, error))
    commonest = sorted(ways, key=lambda way: -len(ways[way]))
    for number, row in itertools.chain.from_iterable(ways[way] for way in commonest):
        try:
            found = _resolved(template, row, scales)
        except ScoreNotFoundError as error:
            problems.append((number, error))
            continue
        _count_ways({way: len(ways[way]) for way in commonest}, found, warn)
        return found
    pattern = " ".join(f"<rationale> {scale.marker} <score>" for scale in scales)
    options = "to change a marker or a grid, set aspects"
    if len(scales) == 1:
        scores = some_scores(scales[0].grid.texts)
        options = f"the score is one of {scores}. For another marker or grid, set score_marker or score_values"
    raise ValueError(
        f"no score was found in any of the first {count} rows. Row {problems[0][0]}: {problems[0][1]}. Write every "
        f"completion as '{pattern}'; {options}"
    )


def _formats(template: Template, row: Mapping[str, Any], scales: tuple[Scale, ...]) -> tuple[CompletionFormat, ...]:
    """How a row writes each of its scores."""
    if "input_ids" in row:
        return tuple(format_from_ids(template.tokenizer, row["input_ids"], *place) for place in _places(row, scales))
    return written_formats(template, as_prompt_completion(row), scales)


def _resolved(template: Template, row: Mapping[str, Any], scales: tuple[Scale, ...]) -> tuple[Scale, ...]:
    """The scales as a row writes them, with their tokens there."""
    if "input_ids" in row:
        return tuple(resolve_from_ids(template.tokenizer, row["input_ids"], *place) for place in _places(row, scales))
    return resolve_scales(template, as_prompt_completion(row), scales)


def _places(row: Mapping[str, Any], scales: Sequence[Scale]) -> Iterator[tuple[int, Scale]]:
    """Where a tokenised row has its scores, and whose they are."""
    indices = score_indices(row, scales)
    if not indices:
        raise ScoreNotFoundError("no score", "score_labels holds no score")
    for number, (index, scale) in enumerate(zip(indices, scales, strict=True)):
        # What stands before the first rationale cannot be told from tokens.
        yield index, scale if number else replace(scale, format=replace(scale.format, start=""))


def _count_ways(
    ways: Mapping[tuple[CompletionFormat, ...], int], found: Sequence[Scale], warn: Callable[[str], None]
) -> None:
    """Say how many rows do not write their scores as the judge will be asked for them."""

    def shown(way: Iterable[CompletionFormat]) -> str:
        return repr("".join(written.join("<rationale>", "<score>") for written in way))

    chosen = tuple(scale.format for scale in found)
    others = {way: count for way, count in ways.items() if way != chosen}
    if others:
        warn(
            f"{sum(others.values())} of the first {sum(ways.values())} rows with a score write marker and score in a "
            f"different way, such as {shown(next(iter(others)))}. The judge will be asked in the most common way, "
            f"{shown(chosen)}. Write all rows this way"
        )


def check_dataset(dataset: Any, dataset_name: str) -> None:
    """Refuse what is no dataset, or an empty one.

    Raises:
        TypeError: It is something else, such as a list of rows, or all splits at once.
        ValueError: It holds no rows.
    """
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(repr, dataset))
        raise TypeError(
            f"the {dataset_name} dataset has several splits. Choose one of {splits}, as in dataset['train']"
        )
    if not isinstance(dataset, Dataset | IterableDataset):
        kind = type(dataset).__name__
        raise TypeError(f"the {dataset_name} dataset is a {kind}. Make it a Dataset, as in Dataset.from_list(rows)")
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"the {dataset_name} dataset is empty")
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"the {dataset_name} dataset has a transform, which would be applied only once, before training. Apply it "
            "with dataset.map(...), or remove it with dataset.reset_format()"
        )
    check_labels(dataset)


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
                "score_labels is a float per token: the gold score at the score's token, NaN elsewhere; an "
                "annotators_ column holds, at the same token, the fraction of annotators who gave that score. Or pass "
                f"{understood}"
            )
        return
    sources = [name for name in ("messages", "conversations", "completion") if name in columns]
    if not sources or (sources == ["completion"] and "prompt" not in columns):
        raise ValueError(
            f"the {dataset_name} dataset has the columns {found}; TRACT needs to know where the prompt ends and the "
            f"completion begins. Pass {understood}"
        )
    if len(sources) > 1:
        raise ValueError(
            f"the {dataset_name} dataset has {' and '.join(f'`{name}`' for name in sources)}, and only one of them can "
            "be what the judge learns to write. Remove the others with dataset.remove_columns(...)"
        )


def check_scored(rows: Dataset | IterableDataset, scales: Sequence[Scale]) -> None:
    """Refuse prepared rows whose predictions could not be told apart: packed ones, and one that has no score."""
    for number, row in enumerate(rows):
        if "seq_lengths" in row:
            raise ValueError("the test dataset is packed, which changes the order of rows. Pass the rows themselves")
        if not score_indices(row, scales):
            raise ValueError(
                f"row {number} of the test dataset has no score in score_labels, so nothing is predicted for it, and "
                "later predictions would be those of other rows. Remove such rows"
            )


def prepare_rows(
    dataset: Dataset | IterableDataset,
    encoder: Encoder,
    *,
    invalid_rows: str,
    num_proc: int | None,
    dataset_name: str,
    warn: Callable[[str], None],
) -> tuple[Dataset | IterableDataset, list[int] | None]:
    """Encode every row; refuse or drop, and name, those that cannot be.

    Returns:
        The encoded rows, and the places that they had in `dataset`; None for those of a stream.

    Raises:
        ValueError: A row was refused and `invalid_rows` is `raise`, or no row is left.
    """
    columns = get_dataset_column_names(dataset)
    told: dict[str, Any] = {"invalid_rows": invalid_rows, "say": warn, "max_length": encoder.max_length}
    if isinstance(dataset, IterableDataset):
        keep = kept_of_stream(_refusal, dataset_name, **told)
        encoded = dataset.map(encoder, remove_columns=columns).filter(keep, with_indices=True)
        return encoded.select_columns(encoder.columns), None
    encoded = dataset.map(
        encoder,
        remove_columns=columns,
        features=encoder.features,
        num_proc=num_proc,
        desc=f"Tokenizing {dataset_name} dataset",
    )
    kinds = encoded["refusal_kind"]
    kept = [number for number, kind in enumerate(kinds) if not kind]
    if len(kept) < len(kinds):
        refused = (_refusal(encoded[number], number) for number, kind in enumerate(kinds) if kind)
        refuse(list(filter(None, refused)), len(kinds), dataset_name, **told)
        encoded = encoded.select(kept)
    return encoded.select_columns(encoder.columns), kept


def _refusal(encoded: Mapping[str, Any], index: int) -> Refusal | None:
    """Why an encoded row is refused; its number is the one in its file, where that is known."""
    if not encoded["refusal_kind"]:
        return None
    number = encoded["refusal_row"]
    number = index if number is None else number
    return Refusal(number, encoded["refusal_kind"], encoded["refusal"], encoded["num_tokens"])


@dataclass
class ScoreCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with the score columns padded or flattened like the labels, NaN off the scores.

    Adds `score_labels`, float32 `(B, L)`; if it is told of annotator columns, `annotator_labels`, float32 `(B, L, K)`;
    and, if the rows have them, `score_aspects`, int64 `(B, L)`: the number of each score's aspect, -1 elsewhere.
    """

    annotator_columns: Sequence[str] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows of `input_ids`, `labels`, `score_labels` and the annotator columns."""
        if "seq_lengths" in examples[0] and not self.padding_free:
            # Packed for evaluation alone: padded, the rows of a pack would see each other.
            return replace(self, padding_free=True).torch_call(examples)  # type: ignore[call-arg]
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


def score_mask(batch: dict[str, Any], also: Sequence[str] = ()) -> torch.Tensor:
    """Where the batch's scores stand, bool `(B, L - 1)`, aligned with labels that are shifted by one.

    Args:
        also: What else the loss needs of a batch.
    """
    for name in ("score_labels", *also):
        if name not in batch:
            raise ValueError(
                f"the batch has no {name}, so the score loss cannot be computed. Leave data_collator out, or make it "
                "return what trl_tract.rows.dataset.ScoreCollator returns"
            )
    return ~batch["score_labels"][:, 1:].isnan()  # type: ignore[no-any-return]
