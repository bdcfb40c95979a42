"""How well scores agree with gold scores: point estimates, as pure functions of two 1-D arrays.

A number that does not exist (a constant has no correlation) is NaN, never 0, and no warning is given. Needs numpy
alone; knows nothing of models, training, intervals or tables. The formulas stand in `pairs.py`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from trl_tract.evaluation.pairs import JudgedPairs, as_pairs, round_to_grid


def _point(
    name: str, predictions: npt.ArrayLike, references: npt.ArrayLike, grid: Iterable[float] | None = None
) -> float:
    predicted, gold = as_pairs(predictions, references)
    if not predicted.size or not np.isfinite(predicted).all():
        return math.nan
    return float(JudgedPairs(predicted, gold, grid)(np.ones((1, len(gold))), [name])[name][0])


def pearson(predictions: npt.ArrayLike, references: npt.ArrayLike) -> float:
    """Pearson's r, in [-1, 1].

    Args:
        predictions: Scores, rubric units, `(n,)`.
        references: Gold scores, rubric units, `(n,)`.

    Returns:
        The correlation; NaN (undefined) where a side is constant, n < 3, or a prediction is NaN.

    Raises:
        ValueError: Unequal lengths, or a gold score that is not finite.

    Example:
        >>> round(pearson([1, 2, 4], [1, 3, 4]), 4)
        0.9286
    """
    return _point("pearson", predictions, references)


def spearman(predictions: npt.ArrayLike, references: npt.ArrayLike) -> float:
    """Spearman's rho: Pearson's r of the ranks, ties at their mean rank.

    Args, returns and errors as in `pearson`.

    Example:
        >>> round(spearman([1, 2, 2, 9], [1, 2, 3, 4]), 4)
        0.9487
    """
    return _point("spearman", predictions, references)


def kendall(predictions: npt.ArrayLike, references: npt.ArrayLike) -> float:
    """Kendall's tau-b, corrected for ties on either side.

    Args, returns and errors as in `pearson`. Exact, O(n log n).

    Source: Knight 1966, https://doi.org/10.1080/01621459.1966.10480879

    Example:
        >>> round(kendall([1, 2, 2, 9], [1, 2, 3, 4]), 4)
        0.9129
    """
    return _point("kendall", predictions, references)


def rmse(predictions: npt.ArrayLike, references: npt.ArrayLike) -> float:
    """Root of the mean squared error, rubric units.

    Args and errors as in `pearson`; NaN where a prediction is NaN or there are no items.

    Example:
        >>> round(rmse([1, 2], [1, 4]), 4)
        1.4142
    """
    return _point("rmse", predictions, references)


def mae(predictions: npt.ArrayLike, references: npt.ArrayLike) -> float:
    """Mean absolute error, rubric units.

    Args, returns and errors as in `rmse`.

    Example:
        >>> mae([1, 2], [1, 4])
        1.0
    """
    return _point("mae", predictions, references)


def spread(predictions: npt.ArrayLike, references: npt.ArrayLike) -> float:
    """Standard deviation of the predictions over that of the gold scores: near 0, all predictions are the same.

    Args and errors as in `pearson`; NaN where all gold scores are the same, or a prediction is NaN.

    Example:
        >>> spread([2, 3, 4], [1, 3, 5])
        0.5
    """
    predicted, gold = as_pairs(predictions, references)
    return float(np.std(predicted) / np.std(gold)) if len(gold) > 1 and np.ptp(gold) else math.nan


def qwk(predictions: npt.ArrayLike, references: npt.ArrayLike, *, grid: Iterable[float] | None = None) -> float:
    """Quadratic-weighted kappa after rounding both sides to the grid: 1 - squared disagreement / that by chance.

    Disagreement is measured in rubric units, not in grid steps: on an evenly spaced grid that is scikit-learn's
    `cohen_kappa_score(weights="quadratic", labels=grid)`, and grid points that nobody uses change nothing.

    Args:
        predictions: Scores, rubric units, `(n,)`.
        references: Gold scores, rubric units, `(n,)`.
        grid: Admissible scores; None: the integers that span both sides.

    Returns:
        Kappa, at most 1; NaN where both sides round to one and the same value, a prediction is NaN, or n = 0.

    Raises:
        ValueError: As in `pearson`, or an unusable grid.

    Example:
        >>> round(qwk([1.2, 2.6, 3.1], [1, 2, 3]), 4)
        0.8
    """
    return _point("qwk", predictions, references, grid)


def accuracy(predictions: npt.ArrayLike, references: npt.ArrayLike, *, grid: Iterable[float] | None = None) -> float:
    """Share of items whose two sides round to the same grid value, in [0, 1].

    Args and errors as in `qwk`; NaN where a prediction is NaN or there are no items.

    Example:
        >>> accuracy([1.2, 2.6], [1, 2])
        0.5
    """
    return _point("accuracy", predictions, references, grid)


def calibration_error(
    predictions: npt.ArrayLike, references: npt.ArrayLike, *, grid: Iterable[float] | None = None
) -> float:
    """How far mean predictions are from mean gold scores, rubric units: sum over bins of n_bin / n * |difference|.

    A bin holds the predictions with the same nearest grid value: of the items judged about 3, is the mean gold score
    about 3? 0 is perfect. Chance alone makes it positive, the more so the fewer items a bin has.

    Args and errors as in `qwk`; NaN where a prediction is NaN or there are no items.

    Example:
        >>> round(calibration_error([1.0, 1.2, 4.8], [1, 2, 5]), 4)  # (|2.2 - 3| + |4.8 - 5|) / 3
        0.3333
    """
    predicted, gold = as_pairs(predictions, references)
    if not predicted.size or not np.isfinite(predicted).all():
        return math.nan
    _, bins = np.unique(round_to_grid(predicted, grid), return_inverse=True)
    return float(np.abs(np.bincount(bins, weights=predicted - gold)).sum() / len(gold))


_FUNCTIONS: tuple[Callable[..., float], ...] = (pearson, spearman, kendall, rmse, mae)
_ROUNDING_FUNCTIONS: tuple[Callable[..., float], ...] = (qwk, accuracy, calibration_error)


@cache
def _score_metric_class() -> Any:
    try:
        evaluate, datasets = importlib.import_module("evaluate"), importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError('ScoreMetric needs Hugging Face Evaluate: pip install "trl-tract[metric]"') from error

    def info(self: Any) -> Any:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Agreement of scores with gold scores; NaN predictions are counted as failed and kept out.",
            citation="",
            inputs_description="predictions, references: scores in rubric units; grid: the admissible scores.",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def compute(self: Any, predictions: Any, references: Any, grid: Iterable[float] | None = None) -> dict[str, Any]:
        predicted, gold = as_pairs(predictions, references)
        given, values = ~np.isnan(predicted), None if grid is None else list(grid)
        result: dict[str, Any] = {f.__name__: f(predicted[given], gold[given]) for f in _FUNCTIONS}
        result |= {f.__name__: f(predicted[given], gold[given], grid=values) for f in _ROUNDING_FUNCTIONS}
        return result | {"n": int(given.sum()), "failed": int((~given).sum())}

    return type("ScoreMetric", (evaluate.Metric,), {"_info": info, "_compute": compute, "__module__": __name__})


def __getattr__(name: str) -> Any:
    # evaluate takes seconds to import and is optional: `ScoreMetric`, the functions above as one `evaluate.Metric` that
    # needs no network, comes into being at first use.
    if name == "ScoreMetric":
        return _score_metric_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
