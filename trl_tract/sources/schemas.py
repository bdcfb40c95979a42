"""Records -> judge items, recognised by their columns; splitting them by question.

Knows nothing of tokens or models.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_tract.rows.golds import aspect_scores, gold_score
from trl_tract.rows.rendering import as_prompt_completion, with_completion
from trl_tract.rows.row import Row
from trl_tract.rows.thinking import scored_text
from trl_tract.scale.scale import Scale, locate_scores
from trl_tract.scale.scales import Scales
from trl_tract.scale.text import locate_score
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.files import read_records
from trl_tract.sources.preferences import is_pair, pair_rows
from trl_tract.sources.prompts import from_feedback_collection, from_prometheus_eval, prometheus_eval_reference

UNDERSTOOD = (
    "prompt, completion and score (text or chat messages); "
    "messages; "
    "orig_instruction, orig_response, orig_criteria, orig_score1_description to orig_score5_description, orig_feedback "
    "and orig_score (Feedback Collection, Feedback Bench); "
    "instruction, gpt4_score and gpt4_feedback (prometheus-eval benchmark JSON); "
    "any others with --columns and --rubric"
)


@dataclass(frozen=True)
class Item:
    """One judged response.

    Attributes:
        group: Items that share it, such as all answers to one question, belong on one side of a split.
        training: Its training rows, one for each annotated rationale; empty if it has none.
        reference: Its evaluation row: `prompt`, `score` (the mean over its annotations) and `group`.
        converted: Whether the prompt was made from another schema, as plain text.
    """

    group: str
    training: tuple[Row, ...]
    reference: Row
    converted: bool = False


def load_items(source: str, scales: Scales, own: OwnColumns | None = None, *, only_trained: bool = False) -> list[Item]:
    """Read judge items from a file or a hub dataset: see `sources.read_records`.

    Args:
        source: The file or hub id.
        scales: How its rows write their scores.
        own: The user's rubric and column names; None: a schema that is known.
        only_trained: Whether nothing will be generated for them: then they may have several scores behind one marker.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A row cannot be understood; it is named, with the columns that were found.
    """
    items: list[Item] = []
    for number, found in enumerate(try_items(source, scales, own, only_trained=only_trained)):
        if isinstance(found, ValueError):
            raise ValueError(f"{source}, row {number}: {found}") from found
        items.append(found)
    if not items:
        raise ValueError(f"{source} holds no rows")
    return items


def try_items(
    source: str, scales: Scales, own: OwnColumns | None = None, *, only_trained: bool = False
) -> Iterator[Item | ValueError]:
    """Each record's item, or why there is none: for whoever wants to hear of every bad row."""
    for record in read_records(source):
        try:
            yield read_item(record, scales, own, only_trained=only_trained)
        except (KeyError, TypeError) as error:
            yield ValueError(f"column {error} is missing" if isinstance(error, KeyError) else str(error))
        except ValueError as error:
            yield error


def read_item(
    record: Mapping[str, Any],
    scales: Scales,
    own: OwnColumns | None = None,
    *,
    only_trained: bool = False,
) -> Item:
    """Turn a record of any schema that is understood into an item; see `load_items`."""
    if own is not None:
        record = own.convert(record, scales)
    columns = set(record)
    if is_pair(record):
        raise ValueError(
            "this is a pair of responses (chosen, rejected), and says which is better but not how good either is: "
            "TRACT trains on scores. Score the responses one by one, with a rationale each, and train on those rows. "
            "With pairs a finished judge can be tested: trl-tract judge --data PAIRS --rubric RUBRIC"
        )
    if scales.aspects:
        return _read_aspect_item(record, scales.aspects)
    grid, marker = scales.grid, scales.marker
    if {"instruction", "gpt4_score"} <= columns:
        reference = prometheus_eval_reference(record)
        annotated = from_prometheus_eval(record, marker=marker) if record.get("gpt4_feedback") else []
        return Item(reference["group"], tuple(annotated), reference, converted=True)
    if {"orig_instruction", "orig_score"} <= columns:
        row = from_feedback_collection(record, marker=marker)
        reference = {name: row[name] for name in ("prompt", "score", "group")}
        return Item(row["group"], (row,), reference, converted=True)
    if columns & {"messages", "conversations"} or "prompt" in columns:
        row = as_prompt_completion(record)
        completion = row.get("completion")
        if row.get("scores") is not None:
            return _read_several(row, only_trained)
        if completion is None and "score" not in row:
            raise ValueError("the row has a prompt, but neither a completion nor a score")
        if "score" in row:
            score = gold_score(grid.in_numbers(row["score"]))
        else:
            score = grid.value_of(locate_score(scored_text(completion), marker, grid.texts).text)
        group = str(row.get("group") or json.dumps(row["prompt"]))
        reference = {**{name: row[name] for name in row if name != "completion"}, "score": score, "group": group}
        return Item(group, () if completion is None else (row,), reference, converted=_was_written(own))
    raise ValueError(
        f"the columns {', '.join(sorted(map(str, columns)))} are not understood. Understood are: {UNDERSTOOD}"
    )


def judged_rows(record: Mapping[str, Any], scales: Scales, own: OwnColumns | None = None) -> list[Item]:
    """What a judge is asked of a record: one prompt, whether or not its score is known, or the two of a pair.

    Raises:
        ValueError: The record cannot be understood.
    """
    converted = record if own is None else own.convert(record, scales)
    if is_pair(converted):
        rows = pair_rows(converted, None if own is None else own.rubric, scales)
        return [Item(row["group"], (), row, converted=True) for row in rows]
    if "prompt" in converted and all(converted.get(name) is None for name in ("completion", "score", "scores")):
        row = {name: value for name, value in converted.items() if name not in ("completion", "score", "scores")}
        return [Item(str(row.get("group") or json.dumps(row["prompt"])), (), row, converted=_was_written(own))]
    return [read_item(record, scales, own)]


def _was_written(own: OwnColumns | None) -> bool:
    """Whether the prompts are ours, and may become chat messages: a user's own prompts stay as they are."""
    return own is not None and own.rubric is not None


def _read_several(row: Row, only_trained: bool) -> Item:
    """An item with several scores behind one marker; what they are is the encoder's to find."""
    if not only_trained:
        raise ValueError(
            "the row has `scores`. Completions with several scores behind one marker can be trained on (trl-tract "
            "train), but generation stops at the first score: name the scores in `aspects`, each with its own marker"
        )
    group = str(row.get("group") or json.dumps(row["prompt"]))
    reference = {**{name: row[name] for name in row if name != "completion"}, "group": group}
    return Item(group, () if row.get("completion") is None else (row,), reference)


def _read_aspect_item(record: Mapping[str, Any], aspects: Sequence[Scale]) -> Item:
    """An item whose gold scores are one for each aspect: those in `scores`, or in its completion."""
    if not set(record) & {"prompt", "messages", "conversations"}:
        raise ValueError(
            f"the columns {', '.join(sorted(record))} are not understood with several aspects: give prompt, completion "
            "and scores"
        )
    row = as_prompt_completion(record)
    completion = row.get("completion")
    golds = aspect_scores(row.get("scores"), aspects)
    if golds is None:
        if completion is None:
            raise ValueError("the row has a prompt, but neither a completion nor scores")
        spans = locate_scores(scored_text(completion), aspects)
        golds = [aspect.grid.value_of(span.text) for aspect, span in zip(aspects, spans, strict=True)]
    scores = {aspect.name: gold_score(gold) for aspect, gold in zip(aspects, golds, strict=True)}
    group = str(row.get("group") or json.dumps(row["prompt"]))
    reference = {**{name: row[name] for name in row if name != "completion"}, "scores": scores, "group": group}
    return Item(group, () if completion is None else (row,), reference)


def split_items(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Hold out about `fraction` of the groups; a group is never split.

    Raises:
        ValueError: There are too few groups for both sides to have one.
    """
    groups = list(dict.fromkeys(item.group for item in items))
    held_out = round(len(groups) * fraction)
    if not 0 < held_out < len(groups):
        raise ValueError(
            f"holding out {fraction:g} of {len(groups)} group(s) leaves one side empty: give an evaluation file, or "
            "another fraction"
        )
    random.Random(seed).shuffle(groups)
    evaluation = set(groups[:held_out])
    return [item for item in items if item.group not in evaluation], [i for i in items if i.group in evaluation]


def as_chat(row: Row) -> Row:
    """A plain-text row as chat messages."""
    if not isinstance(row["prompt"], str):
        return row
    chat = {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
    if "completion" in row:
        chat["completion"] = with_completion([], row["completion"])["completion"]
    return chat


def written_rows(items: Iterable[Item], select: Callable[[Item], Iterable[Row]], *, chat: bool) -> list[Row]:
    """The rows of items, converted prompts as chat messages if the model's tokenizer has a template."""
    return [as_chat(row) if chat and item.converted else row for item in items for row in select(item)]
