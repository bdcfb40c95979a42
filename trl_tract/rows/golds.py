"""The gold scores of a row: a number, several annotators, several aspects. Knows nothing of tokens or models."""

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trl_tract.scale.scale import (
    Scale,
)
from trl_tract.scale.text import (
    ScoreNotFoundError,
)


def annotator_scores(value: Any) -> list[float]:
    """The scores behind a gold score: a number alone, or one for each annotator.

    Raises:
        ScoreNotFoundError: Not a number, NaN, infinite, or an empty list.

    Example:
        >>> annotator_scores(4), annotator_scores([3, 4])
        ([4.0], [3.0, 4.0])
    """
    if isinstance(value, list | tuple):
        if not value:
            raise ScoreNotFoundError("no score", "the score is an empty list")
        return [number for item in value for number in annotator_scores(item)]
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ScoreNotFoundError("not a number", f"the score is {value!r}, not a number") from None
    if not math.isfinite(number):
        raise ScoreNotFoundError("not a number", f"the score is {number}")
    return [number]


def gold_score(value: Any) -> float:
    """Read the gold score of a row: a number, or the mean of a list of them (one per annotator).

    Raises:
        ScoreNotFoundError: Not a number, NaN, infinite, or an empty list.

    Example:
        >>> gold_score(4), gold_score([3, 4])
        (4.0, 3.5)
    """
    scores = annotator_scores(value)
    return sum(scores) / len(scores)


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


def aspect_scores(scores: Any, aspects: Sequence[Scale]) -> list[Any] | None:
    """The gold scores of a row's `scores`, in the order of the aspects; None where the row has none.

    Raises:
        ScoreNotFoundError: `scores` is no mapping, lacks an aspect, or names one that is not there.
    """
    if scores is None:
        return None
    names = [aspect.name for aspect in aspects]
    if not isinstance(scores, Mapping):
        raise ScoreNotFoundError(
            "not a mapping", f"`scores` is {scores!r}, not a mapping of the aspects {', '.join(names)} to gold scores"
        )
    missing = [name for name in names if scores.get(name) is None]
    if missing:
        raise ScoreNotFoundError("aspect missing", f"`scores` has no gold score for aspect {missing[0]!r}")
    # A table gives every row the keys of all rows: what is None was not written.
    unknown = sorted(name for name, score in scores.items() if score is not None and name not in names)
    if unknown:
        raise ScoreNotFoundError(
            "unknown aspect", f"`scores` names {unknown[0]!r}, which is none of the aspects {', '.join(names)}"
        )
    return [aspect.grid.in_numbers(scores[aspect.name]) for aspect in aspects]
