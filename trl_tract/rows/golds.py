"""The gold scores of a row: THE reader of score columns. Knows nothing of tokens or models."""

import bisect
import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from trl_tract.rows.rendering import as_prompt_completion
from trl_tract.rows.thinking import scored_text
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale, locate_scores
from trl_tract.scale.text import ScoreNotFoundError, some_scores

# As Python and pandas write a missing score in a list; a word in quotes is none, and stays.
_NOTHING = re.compile(r"""("[^"]*"|'[^']*')|\b(?:None|nan)\b|<NA>""")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, empty text, or `nan` and `<NA>`, the texts that tables write for it.

    "None" is none of them: it is a word, and may be one of a grid.

    Example:
        >>> is_missing(float("nan")), is_missing(" "), is_missing("NaN"), is_missing(0), is_missing([])
        (True, True, True, False, False)
    """
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan", "<na>")
    if value is None or hasattr(value, "__len__"):
        return value is None
    try:
        return bool(value != value)  # NaN of any kind, NaT included
    except TypeError:  # pandas.NA is neither equal to itself nor different
        return True


def label_columns(dataset: Any) -> list[str]:
    """The columns of a dataset whose numbers are places in a list of names: 0 may stand for the score 1."""
    features = getattr(dataset, "features", None) or {}
    return [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]


def check_labels(dataset: Any) -> None:
    """Refuse gold scores that are places in a list of names.

    Raises:
        ValueError: They are.
    """
    if "score" in label_columns(dataset):
        raise ValueError(
            "the column score is a ClassLabel: its numbers are indices into a list of names, not scores. Replace them "
            'with the names: names = dataset.features["score"].names, scores = [names[place] for place in '
            'dataset["score"]], dataset.remove_columns("score").add_column("score", scores)'
        )


def read_golds(row: Mapping[str, Any], scales: Sequence[Scale]) -> list[list[float]] | None:
    """The gold scores of a row: for each scale those of its annotators, rubric units.

    They are those of the column `score`, or of the mapping `scores` where there are several scales: a number, text of a
    number, a text of the grid, a list of them or the text of a JSON list, one for each annotator. Where the column
    holds nothing, they are the scores that the completion has.

    Args:
        row: `messages`, or `prompt` and `completion`, of which this reads the scores alone.
        scales: One whose name is empty, or several with names.

    Returns:
        None where the row has neither gold scores nor a completion.

    Raises:
        ScoreNotFoundError: A score is missing, no score, off the range, or ambiguous.

    Example:
        >>> from trl_tract.scale.scale import read_scales
        >>> read_golds({"score": "[4, 3]"}, read_scales({})), read_golds({"completion": "[RESULT] 4"}, read_scales({}))
        ([[4.0, 3.0]], [[4.0]])
    """
    given = _given(row, scales)
    if given is None:
        completion = as_prompt_completion(row).get("completion")
        if is_missing(completion):
            return None
        spans = locate_scores(scored_text(completion), scales)
        return [[scale.grid.value_of(span.text)] for scale, span in zip(scales, spans, strict=True)]
    golds = []
    for scale, value in zip(scales, given, strict=True):
        try:
            golds.append(_annotators(value, scale.grid))
        except ScoreNotFoundError as error:
            raise ScoreNotFoundError(error.kind, f"{scale.about}{error}") from error
    return golds


def mean_golds(row: Mapping[str, Any], scales: Sequence[Scale]) -> list[float] | None:
    """Like `read_golds`, the mean over the annotators of each scale."""
    golds = read_golds(row, scales)
    return None if golds is None else [sum(scores) / len(scores) for scores in golds]


def _given(row: Mapping[str, Any], scales: Sequence[Scale]) -> list[Any] | None:
    """What the row's column has for each scale, as it stands there; None where it holds nothing."""
    score, scores = row.get("score"), row.get("scores")
    names = [scale.name for scale in scales]
    if isinstance(scores, str) and scores.lstrip().startswith("{"):
        scores = _json(scores, "a mapping")
    if isinstance(scores, Mapping) and all(map(is_missing, scores.values())):
        scores = None  # a table gives every row the keys of all rows
    if not names[0]:
        if not is_missing(scores):
            raise ScoreNotFoundError(
                "several scores",
                f"the row has `scores` ({scores!r}), but this judge gives one score. Put the scores of several "
                "annotators as a list in `score`, or name several scores in `aspects`, each with its own marker",
            )
        return None if is_missing(score) else [score]
    if not is_missing(score):
        raise ScoreNotFoundError(
            "score and aspects",
            "the row has `score`, but with aspects it needs `scores`, a mapping with one gold score for each aspect",
        )
    if is_missing(scores):
        return None
    if not isinstance(scores, Mapping):
        raise ScoreNotFoundError(
            "not a mapping", f"`scores` is {scores!r}, not a mapping of the aspects {', '.join(names)} to gold scores"
        )
    missing = [name for name in names if is_missing(scores.get(name))]
    if missing:
        raise ScoreNotFoundError("aspect missing", f"`scores` has no gold score for aspect {missing[0]!r}")
    unknown = sorted(str(name) for name, value in scores.items() if not is_missing(value) and name not in names)
    if unknown:
        raise ScoreNotFoundError(
            "unknown aspect", f"`scores` names {unknown[0]!r}, which is not one of the aspects {', '.join(names)}"
        )
    return [scores[name] for name in names]


def _annotators(value: Any, grid: ScoreGrid) -> list[float]:
    """The scores of a cell, one for each annotator who gave one."""
    if isinstance(value, str) and value.lstrip().startswith("[") and value.strip() not in grid.texts:
        text = _NOTHING.sub(lambda found: found[1] or "null", value)
        value = _json(text if '"' in text else text.replace("'", '"'), "a list of scores")  # Python quotes with '
    value = value.tolist() if hasattr(value, "tolist") else value  # of numpy
    values = value if isinstance(value, list | tuple) else [value]
    scores = [_score(each, grid) for each in values if not is_missing(each)]
    if not scores:
        raise ScoreNotFoundError("no score", "the list of scores is empty")
    return scores


def _score(value: Any, grid: ScoreGrid) -> float:
    """One gold score: a text of the grid, a number, or text of a number; within the grid's range."""
    if isinstance(value, str):
        text = value.strip()
        if _NUMBER.fullmatch(text) and grid.contradicts_numbers:
            raise ScoreNotFoundError(
                "ambiguous",
                f"the score is {_shown(value)}, as text. Scores are written {some_scores(grid.texts)} and stand for "
                f"{', '.join(f'{each:g}' for each in grid.values[:12])}, so it is ambiguous. Give numbers in rubric "
                "units (JSONL or Parquet), or leave the column out if the completion has the score",
            )
        if text in grid.texts:
            return grid.value_of(text)
        if not _NUMBER.fullmatch(text):
            write = f"Scores are {some_scores(grid.texts)}"
            if re.fullmatch(r"[-+]?\d+,\d+", text):
                write = f"Write {text.replace(',', '.')}"
                if re.fullmatch(r"[-+]?\d{1,3},\d{3}", text):
                    write += f", or {text.replace(',', '')} if the comma separates thousands"
            raise ScoreNotFoundError("not a number", f"the score is {_shown(value)}, not a number. {write}")
        value = text
    elif isinstance(value, bool) or not isinstance(value, numbers.Real | Decimal):
        raise ScoreNotFoundError("not a number", f"the score is {_shown(value)}, not a number")
    try:
        number = float(value)
    except (OverflowError, ValueError):  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ScoreNotFoundError("not a number", f"the score is {_shown(value)}, not a finite number")
    low, high = grid.values[0], grid.values[-1]
    kept = min(max(number, low), high)
    if abs(number - kept) > 1e-6 * (high - low):  # 4.3 of 32 bits is a little more than 4.3
        raise ScoreNotFoundError(
            "off the range", f"the score {number:g} is not between {grid.texts[0]} and {grid.texts[-1]}"
        )
    return kept


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ScoreNotFoundError("not a number", f"the score is {_shown(text)}, not {what} as JSON") from None


def _shown(value: Any) -> str:
    """A value for a message, its middle left out where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}…{text[-10:]}"


def annotator_shares(scores: Sequence[float], values: Sequence[float]) -> list[float]:
    """The annotators' histogram on the grid: the share of them at each value, summing to 1.

    A score between two values counts for both, the nearer one more, so the histogram's mean is the annotators' mean.

    Args:
        scores: One score for each annotator, within the grid's range, rubric units.
        values: Grid values, increasing, `K` of them, rubric units.

    Example:
        >>> annotator_shares([1, 3, 2.5], [1, 2, 3])
        [0.3333333333333333, 0.16666666666666666, 0.5]
    """
    shares = [0.0] * len(values)
    for score in scores:
        upper = min(max(bisect.bisect_right(values, score), 1), len(values) - 1)
        part = (score - values[upper - 1]) / (values[upper] - values[upper - 1])
        shares[upper - 1] += (1 - part) / len(scores)
        shares[upper] += part / len(scores)
    return shares
