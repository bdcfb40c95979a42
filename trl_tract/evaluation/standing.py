"""How a judge stands beside always predicting the mean of the gold scores, and beside people who rate the same items.

Numbers alone: `verdict.py` has the words. Knows nothing of models, files or tables.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from trl_tract.evaluation.intervals import Interval, Kind, intervals
from trl_tract.evaluation.metrics import spread as _spread_beside
from trl_tract.evaluation.pairs import Floats, Ints, JudgedPairs


@dataclass(frozen=True, kw_only=True)
class Raters:
    """Agreement of people with each other, on the items that several of them rated: a ceiling for the judge.

    Each rater is compared with the mean of the others of the same item, and so is the judge, because a mean of fewer
    raters is a noisier aim.

    Attributes:
        n: Items with several raters and a prediction.
        rater: `pearson`, `rmse` and `mae` of a rater against the mean of the others, each item counting once.
        judge: The same of the judge.
        minus_rater: The judge's RMSE minus a rater's, rubric units.
    """

    n: int
    rater: dict[str, float]
    judge: dict[str, float]
    minus_rater: Interval


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a verdict needs beside a report's metrics.

    Attributes:
        mean: `rmse`, `mae` and `accuracy` of always predicting the mean of the gold scores.
        minus_mean: The judge's RMSE minus that one's, rubric units, on the same resamples.
        shift: Mean of prediction minus gold score, rubric units.
        spread: Standard deviation of the predictions over that of the gold scores; NaN where those are all the same.
        rationales: Rationales that there are; None where nothing is known of them.
        distinct: How many of them differ.
        raters: Agreement of people with each other; None where no item has several raters.
    """

    mean: dict[str, float]
    minus_mean: Interval
    shift: Interval
    spread: float
    rationales: int | None = None
    distinct: int | None = None
    raters: Raters | None = None


def standing(
    predicted: Floats,
    gold: Floats,
    *,
    codes: Ints | None,
    n_bootstrap: int,
    seed: int,
    grid: Iterable[float] | None = None,
    rationales: Iterable[Hashable] | None = None,
    raters: Sequence[Sequence[float] | None] | None = None,
) -> Standing:
    """A judge beside the mean and the raters.

    Args:
        predicted: Scores, rubric units, `(n,)`, finite, n at least 1.
        gold: Gold scores, rubric units, `(n,)`.
        codes: Each item's group, as in `bootstrap`.
        n_bootstrap: Resamples behind each interval.
        seed: Of the resampling.
        grid: Admissible scores, as in `score_report`.
        rationales: What was written, in any order; anything that is equal where rationales are.
        raters: Each item's scores by people; None, or fewer than two, where there are not several.
    """
    error, centred = predicted - gold, gold - gold.mean()
    several = np.array([scores is not None and len(scores) > 1 for scores in raters or [None] * len(gold)])
    pooled = None if raters is None or not several.any() else _pooled(predicted, raters, several)

    def statistics(counts: Floats) -> dict[str, Floats]:
        n = counts.sum(axis=1)
        # The mean that is always predicted is the resample's own: another sample would have had another.
        spread = np.maximum(counts @ centred**2 / n - (counts @ centred / n) ** 2, 0)
        found = {"minus_mean": np.sqrt(counts @ error**2 / n) - np.sqrt(spread), "shift": counts @ error / n}
        if pooled is not None:
            rated = counts @ several
            with np.errstate(invalid="ignore"):  # a resample without such an item
                found["minus_rater"] = np.sqrt(counts @ pooled.judge / rated) - np.sqrt(counts @ pooled.rater / rated)
        return found

    kinds: dict[str, Kind] = dict.fromkeys(("minus_mean", "shift", "minus_rater"), "difference")
    found = intervals(statistics, len(gold), codes, n_bootstrap, seed, kinds)
    written = None if rationales is None else list(rationales)
    return Standing(
        mean=_point(
            JudgedPairs(np.full_like(gold, gold.mean()), gold, grid), np.ones_like(gold), ("rmse", "mae", "accuracy")
        ),
        minus_mean=found["minus_mean"],
        shift=found["shift"],
        spread=_spread_beside(predicted, gold),
        rationales=len(written) if written else None,
        distinct=len(set(written)) if written else None,
        raters=None
        if pooled is None
        else Raters(
            n=int(several.sum()),
            rater=_weighted(pooled.scores, pooled),
            judge=_weighted(pooled.predicted, pooled),
            minus_rater=found["minus_rater"],
        ),
    )


@dataclass(frozen=True)
class _Pooled:
    scores: Floats  # (P,) each rater of each item that has several
    others: Floats  # (P,) mean of the item's other raters
    predicted: Floats  # (P,) the judge's score of the item
    weights: Floats  # (P,) one over the item's raters
    judge: Floats  # (n,) mean squared difference of the judge from the others, 0 where there are not several
    rater: Floats  # (n,) the same of the raters


def _pooled(predicted: Floats, raters: Sequence[Sequence[float] | None], several: Ints) -> _Pooled:
    rated = np.flatnonzero(several)
    given = [np.asarray(raters[item], dtype=np.float64) for item in rated]
    counts = np.array([len(scores) for scores in given])
    scores = np.concatenate(given)
    items = np.repeat(rated, counts)
    weights = np.repeat(1 / counts, counts)
    others = (np.repeat([each.sum() for each in given], counts) - scores) / np.repeat(counts - 1, counts)
    judge, rater = np.zeros((2, len(predicted)))
    np.add.at(judge, items, weights * (predicted[items] - others) ** 2)
    np.add.at(rater, items, weights * (scores - others) ** 2)
    return _Pooled(scores, others, predicted[items], weights, judge, rater)


def _weighted(scores: Floats, pooled: _Pooled) -> dict[str, float]:
    # Ranks and pairs are of whole items: what is a mean can be weighted.
    return _point(JudgedPairs(scores, pooled.others), pooled.weights, ("pearson", "rmse", "mae"))


def _point(pairs: JudgedPairs, weights: Floats, names: Sequence[str]) -> dict[str, float]:
    return {name: float(value[0]) for name, value in pairs(weights[None], names).items()}
