"""A record of any schema that is understood -> a judge item. Knows nothing of files, tokens or models."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_tract.rows.frame import REASONING
from trl_tract.rows.golds import is_missing, mean_golds, read_golds
from trl_tract.rows.messages import no_spelled_messages
from trl_tract.rows.rendering import as_prompt_completion, with_completion
from trl_tract.rows.row import RENDERED_WITH, Row
from trl_tract.rows.thinking import completion_text, scored_text
from trl_tract.scale.scale import Scale, locate_scores
from trl_tract.scale.text import ScoreNotFoundError
from trl_tract.sources.columns import ROLES, OwnColumns
from trl_tract.sources.files import plain
from trl_tract.sources.preferences import is_pair, pair_rows
from trl_tract.sources.prompts import (
    feedback_collection_reference,
    from_feedback_collection,
    from_prometheus_eval,
    prometheus_eval_reference,
)

UNDERSTOOD = (
    "prompt, completion and score (text or chat messages); "
    "messages; "
    "orig_instruction, orig_response, orig_criteria, orig_score1_description to orig_score5_description, orig_feedback "
    "and orig_score (Feedback Collection, Feedback Bench); "
    "instruction, gpt4_score and gpt4_feedback (prometheus-eval benchmark JSON); "
    "any others with --columns and --rubric"
)
_FEEDBACK = ("instruction", "response", "criteria", *(f"score{score}_description" for score in range(1, 6)), "score")
KNOWN = {
    *ROLES,
    *("scores", "messages", "conversations", *RENDERED_WITH, "gpt4_score", "gpt4_feedback"),
    *(f"orig_{name}" for name in (*_FEEDBACK, "feedback", "reference_answer")),
    *("chosen_instruction", "rejected_instruction"),
}
"""Columns whose meaning is known: what stands in them is read, or the row is refused."""
TOKENS = ("input_ids", "labels", "score_labels", "score_aspects")


@dataclass(frozen=True)
class Item:
    """One judged response.

    Attributes:
        group: Items that share it, such as all answers to one question, belong on one side of a split.
        training: Its training rows, one for each annotated rationale; empty if it has none.
        reference: Its row without a completion: `prompt`, `score` (a list where several people gave one) and `group`.
        converted: Whether the prompt was made from another schema, as plain text.
        bare: Whether its training row is a gold score alone, without a rationale.
    """

    group: str
    training: tuple[Row, ...]
    reference: Row
    converted: bool = False
    bare: bool = False


def read_items(
    record: Mapping[str, Any], scales: Sequence[Scale], own: OwnColumns | None = None, *, judged: bool = False
) -> list[Item]:
    """What a record holds: one item, or the two sides of a pair.

    Args:
        record: Columns as a file has them.
        scales: How its rows write their scores.
        own: The user's rubric and column names; None: a schema that is known.
        judged: Whether it is only to be judged: then it may be a pair, and need not have a gold score.

    Raises:
        ValueError, KeyError, TypeError: It cannot be understood; a ScoreNotFoundError says of what kind the fault is.
    """
    row = _cleaned(record, KNOWN if own is None else KNOWN.union(*(name.split(",") for name in own.columns.values())))
    if own is not None:
        row = own.convert(row, scales, judged=judged)
    if is_pair(row):
        if not judged:
            raise ScoreNotFoundError(
                "pair",
                "this is a pair of responses (chosen, rejected). TRACT trains on scores, and a pair has none. Train on "
                "rows with one scored response each, and use pairs to test a finished judge: trl-tract judge --data "
                "PAIRS --rubric RUBRIC",
            )
        try:
            sides = pair_rows(row, None if own is None else own.rubric, scales[0].marker)
        except (ValueError, TypeError, LookupError) as error:
            raise ScoreNotFoundError("pair", str(error)) from error
        return [Item(side["group"], (), side, converted=True) for side in sides]
    if "input_ids" in row and not judged:
        return [Item("", (row,), {})]
    if not scales[0].name and {"instruction", "gpt4_score"} <= row.keys():
        _need(row, ["instruction", "gpt4_score"])
        _check_texts(row, ["instruction"])
        reference = prometheus_eval_reference(row)
        annotated = from_prometheus_eval(row, marker=scales[0].marker) if row.get("gpt4_feedback") else []
        return [Item(reference["group"], tuple(annotated), reference, converted=True)]
    if not scales[0].name and {"orig_instruction", "orig_score"} <= row.keys():
        _need(row, [f"orig_{name}" for name in _FEEDBACK])
        _check_texts(row, [f"orig_{name}" for name in ("instruction", "response", "criteria", "reference_answer")])
        reference = feedback_collection_reference(row, marker=scales[0].marker)
        written = row.get("orig_feedback") is not None
        training = (from_feedback_collection(row, marker=scales[0].marker),) if written else ()
        return [Item(reference["group"], training, reference, converted=True)]
    return [_read_item(row, scales, judged, converted=own is not None and own.rubric is not None)]


def _read_item(row: Row, scales: Sequence[Scale], judged: bool, converted: bool) -> Item:
    if not row.keys() & {"prompt", "messages", "conversations"}:
        kinds = (
            ("rows with several aspects need the columns prompt, completion and scores")
            if scales[0].name
            else UNDERSTOOD
        )
        raise ScoreNotFoundError(
            "not understood",
            f"the columns {', '.join(sorted(map(str, row)))} are not known. Known layouts: {kinds}",
        )
    row = {name: cell for name, cell in row.items() if name not in _CHATS or cell is not None}
    for name in _CHATS & row.keys():
        if not isinstance(row[name], list) or not all(isinstance(message, Mapping) for message in row[name]):
            raise ScoreNotFoundError("not text", f"the {name} are not a list of chat messages: {row[name]!r:.80}")
    row = as_prompt_completion(row)
    _check_chat(row)
    golds = read_golds(row, scales)
    if golds is None and not judged:
        raise ScoreNotFoundError("no score", "the row has a prompt, but neither a completion nor a score")
    missing = {name for name in ("id", "group", "subset") if row.get(name) is None}
    scored: Row = {}
    if golds is not None:
        each = [list(scores) if len(scores) > 1 else scores[0] for scores in golds]
        several = dict(zip([scale.name for scale in scales], each, strict=True))
        scored = {"scores": several} if scales[0].name else {"score": each[0]}
    left_out = {"completion", "score", "scores"} - scored.keys() | missing
    given = {name: cell for name, cell in row.items() if name not in left_out} | scored
    if judged:
        return Item("", (), given, converted)
    given["group"] = json.dumps(row["prompt"]) if "group" in missing else str(row["group"])
    return Item(given["group"], () if row.get("completion") is None else (row,), given, converted)


_CHATS = {"messages", "conversations"}


def _cleaned(record: Mapping[str, Any], used: Collection[str]) -> Row:
    """A record as JSON has it; a column that nobody uses and that JSON cannot hold is left out."""
    row: Row = {}
    for name, cell in record.items():
        if name in TOKENS:
            row[name] = cell
            continue
        try:
            value = plain(cell)
        except TypeError as error:
            if name in used:
                raise ScoreNotFoundError(
                    "unreadable", f"the column {name} {error}, which is not text, a number or a list"
                ) from error
            continue
        if name in used:
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise ScoreNotFoundError(
                    "no Unicode",
                    f"the column {name} holds half a character ({error.object[error.start]!r}), as if the text had "
                    "been cut in the middle of an emoji",
                ) from error
            value = None if is_missing(value) else value
        row[str(name)] = value
    return row


def _need(row: Row, names: Iterable[str]) -> None:
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise ScoreNotFoundError("empty column", f"the column {missing[0]} is empty or missing")


def _check_texts(row: Row, names: Iterable[str]) -> None:
    for name in names:
        if not isinstance(row.get(name) or "", str):
            raise ScoreNotFoundError("not text", f"the column {name} is {type(row[name]).__name__}, not text")


def _check_chat(row: Row) -> None:
    """Refuse a prompt or completion that is neither text nor chat messages, and options that no template can read."""
    if row.get("prompt") is None:
        raise ScoreNotFoundError("no prompt", "the prompt is missing")
    for name in ("prompt", "completion"):
        value = row.get(name)
        if isinstance(value, str):
            no_spelled_messages(name, value)
        if value is None or isinstance(value, str):
            continue
        if not isinstance(value, list) or not value:
            shown = "an empty list" if value == [] else type(value).__name__
            raise ScoreNotFoundError("not text", f"the {name} is {shown}, not text or a list of chat messages")
        for message in value:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ScoreNotFoundError("not text", f"a chat message of the {name} needs a `role`: {message!r:.80}")
    if row.get("completion") is not None and isinstance(row["prompt"], str) != isinstance(row["completion"], str):
        raise ScoreNotFoundError("mixed types", "prompt and completion must both be text, or both chat messages")
    if row.get("prompt_is_text") not in (None, True, False):
        raise ScoreNotFoundError("unreadable", f"prompt_is_text is {row['prompt_is_text']!r}, not true or false")
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = row.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ScoreNotFoundError("unreadable", f"the column {name} is not JSON: {error}") from error
            if name == "chat_template_kwargs":
                row[name] = value
        if value is not None and not isinstance(value, kind):
            raise ScoreNotFoundError("unreadable", f"the column {name} is {type(value).__name__}, not {kind.__name__}")


def scored_alone(row: Row, scales: Sequence[Scale]) -> Row:
    """A row without a completion as one to train on without a rationale: markers and gold scores alone."""
    golds = mean_golds(row, scales) or []
    pieces = [scale.format.join("", scale.grid.nearest_text(gold)) for scale, gold in zip(scales, golds, strict=True)]
    return {**row, **with_completion(row["prompt"], "".join(pieces))}


def has_rationale(row: Mapping[str, Any], scales: Sequence[Scale]) -> bool:
    """Whether a row's completion says anything before one of its scores, thinking included.

    Raises:
        ScoreNotFoundError: There is a completion, and its scores cannot be found.
    """
    completion = as_prompt_completion(row).get("completion")
    if is_missing(completion) or not completion:
        return False
    content = scored_text(completion)
    spans = locate_scores(content, scales)
    begins = [0, *(span.end for span in spans)]
    if any(content[begin : span.marker_start].strip() for begin, span in zip(begins, spans, strict=False)):
        return True
    beside = [] if isinstance(completion, str) else [completion[-1].get(name) for name in REASONING]
    return content != completion_text(completion) or not all(map(is_missing, beside))


def as_text(row: Row, chat: bool) -> Row:
    """A row whose prompt was made of texts that are judged: no control token comes of what they spell.

    As chat messages, which are text, or as plain text that says that it is.
    """
    if not isinstance(row["prompt"], str):
        return row
    if not chat:
        return {**row, "prompt_is_text": True}
    completion = with_completion([], row["completion"]) if "completion" in row else {}
    return {**row, **completion, "prompt": [{"role": "user", "content": row["prompt"]}]}
