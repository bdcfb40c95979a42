"""How well scores agree with gold scores: the point estimates, as pure functions of two 1-D arrays.

Every number is a function of how often each item counts, so that a bootstrap resample is a vector of counts and nothing
is sorted twice; `JudgedPairs` holds that form, and the functions are its value with every item counted once. A number
that does not exist (a constant has no correlation) is NaN, never 0. Needs numpy alone; knows nothing of models,
training, resampling or tables.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

METRICS = ("pearson", "spearman", "kendall", "rmse", "mae", "qwk", "accuracy")
"""What `JudgedPairs` computes, in the order in which tables show it."""

MIN_ITEMS = 3
"""Two points always lie on a line: with fewer items than this a correlation is undefined."""


def as_scores(values: npt.ArrayLike, name: str) -> Floats:
    """`values` as a 1-D float64 array; None becomes NaN.

    Args:
        values: Scores in rubric units, `(n,)`.
        name: What the caller calls them, for the error.

    Raises:
        ValueError: Something in `values` is not a number, or they are not one-dimensional.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} holds something that is not a number ({error}). Pass one float per item.") from error
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}, not (n,). Pass a flat sequence with one float per item.")
    return array


def as_pairs(predictions: npt.ArrayLike, references: npt.ArrayLike, name: str = "predictions") -> tuple[Floats, Floats]:
    """Both sides as equally long float64 arrays, every gold score finite; predictions may be NaN.

    Args:
        predictions: A judge's scores, rubric units, `(n,)`; NaN (or None) where it gave none.
        references: Gold scores, rubric units, `(n,)`.
        name: What the caller calls the predictions, for the error.

    Raises:
        ValueError: The lengths differ, a gold score is NaN or infinite, or either side is not a flat list of numbers.

    Example:
        >>> as_pairs([1, 2], [1, 3])
        (array([1., 2.]), array([1., 3.]))
    """
    predicted, gold = as_scores(predictions, name), as_scores(references, "references")
    if len(predicted) != len(gold):
        raise ValueError(
            f"{name} has {len(predicted)} items and references has {len(gold)}. Pass one prediction for every gold "
            "score, NaN where the judge failed."
        )
    bad = np.flatnonzero(~np.isfinite(gold))
    if bad.size:
        raise ValueError(
            f"{bad.size} of {len(gold)} references are not finite (first: references[{bad[0]}] is {gold[bad[0]]}). "
            "Remove these items or give them a gold score; only predictions may be NaN."
        )
    return predicted, gold


def round_to_grid(scores: npt.ArrayLike, grid: Iterable[float] | None = None) -> Floats:
    """Each score's nearest grid value; halfway between two, the higher one.

    Args:
        scores: Finite scores, rubric units, `(n,)`.
        grid: The admissible scores, rubric units, any order. None: all integers.

    Returns:
        float64 `(n,)`, rubric units.

    Raises:
        ValueError: `grid` is empty or holds a value that is not finite.

    Example:
        >>> round_to_grid([1.4, 2.5, 9.0], grid=[1, 2, 3, 4, 5])
        array([1., 3., 5.])
    """
    array = as_scores(scores, "scores")
    if grid is None:
        below = np.floor(array)
        return np.where(array - below < 0.5, below, below + 1)  # floor(x + 0.5) would round 0.49999999999999994 up
    values = np.unique(as_scores(list(grid), "grid"))
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"grid is {values.tolist()}. Pass at least one value, all finite, such as [1, 2, 3, 4, 5].")
    return values[np.searchsorted((values[1:] + values[:-1]) / 2, array, side="right")]


class _Levels:
    """The distinct values of one variable, and which unit takes which. U units, K distinct values."""

    def __init__(self, values: Floats) -> None:
        distinct, codes = np.unique(values, return_inverse=True)
        self.codes: Ints = codes.reshape(-1).astype(np.int64)  # (U,)
        self.count = len(distinct)
        self._order = None if (np.diff(self.codes) >= 0).all() else np.argsort(self.codes, kind="stable")
        self._starts = np.concatenate(([0], np.cumsum(np.bincount(self.codes))[:-1]))

    def totals(self, weights: Floats) -> Floats:
        """How often each distinct value occurs: `(B, U)` -> `(B, K)`."""
        ordered = weights if self._order is None else np.take(weights, self._order, axis=1)
        return ordered if self.count == ordered.shape[1] else np.add.reduceat(ordered, self._starts, axis=1)


_Step = tuple[Ints, Floats, Ints]


def _inversion_steps(codes: Ints) -> list[_Step]:
    """Splits that meet every inverted pair of `codes` exactly once: at the highest bit in which the two differ.

    The sorting depends on the codes alone, so all resamples share it: Knight's O(n log n) count (1966) with the sort
    taken out. A step is (order, 1 where the bit is set, where each block of codes equal above that bit begins); the
    order is relative to the step before, which keeps the moves of late steps short and in the cache.
    """
    steps = []
    for bit in reversed(range(int(codes.max()).bit_length())):
        order = np.argsort(codes >> (bit + 1), kind="stable")
        codes = codes[order]
        starts = np.flatnonzero(np.diff(codes >> (bit + 1), prepend=-1))
        steps.append((order, (codes >> bit & 1).astype(np.float64), starts))
    return steps


def _inversions(weights: Floats, steps: Iterable[_Step]) -> Floats:
    """Weighted count of pairs whose earlier unit has the larger code: `(B, U)` -> `(B,)`."""
    found = np.zeros(len(weights))
    for order, is_one, starts in steps:
        weights = np.take(weights, order, axis=1)
        ones = weights * is_one
        zeros = weights - ones
        ones_so_far = np.cumsum(ones, axis=1)
        ones_before_block = ones_so_far[:, starts] - ones[:, starts]
        found += np.einsum("bu,bu->b", zeros, ones_so_far)
        found -= np.einsum("bk,bk->b", np.add.reduceat(zeros, starts, axis=1), ones_before_block)
    return found


def _pairs_within(totals: Floats) -> Floats:
    """Pairs of items that share a level: `(B, K)` -> `(B,)`."""
    pairs: Floats = np.einsum("bk,bk->b", totals, totals - 1) / 2
    return pairs


def _ratio(numerator: Floats, denominator: Floats, defined: npt.NDArray[np.bool_]) -> Floats:
    """`numerator / denominator`, NaN where it is not defined."""
    ratio = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=ratio, where=defined & (denominator > 0))
    return ratio


class _Draw(NamedTuple):
    """B resamples: how often each unit and each level is in them."""

    weights: Floats  # (B, U)
    n: Floats  # (B,)
    fine: Floats  # (B, K) of the finer side
    coarse: Floats  # (B, K) of the coarser side
    correlates: npt.NDArray[np.bool_]  # (B,): enough items, and neither side constant

    def mean(self, per_unit: Floats) -> Floats:
        """Mean over the items of each resample: `(U,)` -> `(B,)`."""
        total: Floats = self.weights @ per_unit
        return total / self.n


class JudgedPairs:
    """The seven `METRICS` of one judge as functions of how often each item counts.

    Built once per judge: items with the same (prediction, gold score) become one unit, and all sorting happens here.

    Args:
        predictions: Finite scores, rubric units, `(n,)`, n >= 1.
        references: Finite gold scores, rubric units, `(n,)`.
        grid: Where `qwk` and `accuracy` round to; None: the integers.

    Example:
        >>> pairs = JudgedPairs(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 5.0]))
        >>> pairs(np.array([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0]]), ["mae"])["mae"].round(3)  # second row: items 0, 0, 1
        array([1.   , 0.333])
    """

    def __init__(self, predictions: Floats, references: Floats, grid: Iterable[float] | None = None) -> None:
        # All metrics are symmetric. The finer side is sorted (its levels lie together), the coarser side supplies the
        # codes for the inversions: a gold score on five levels then needs three steps however fine the predictions.
        fine, coarse = sorted((predictions, references), key=lambda side: -len(np.unique(side)))
        self._order = np.lexsort((coarse, fine))
        fine, coarse = fine[self._order], coarse[self._order]
        is_new = np.ones(len(fine), dtype=np.bool_)
        is_new[1:] = (np.diff(fine) != 0) | (np.diff(coarse) != 0)
        self._starts = np.flatnonzero(is_new)
        fine, coarse = fine[self._starts], coarse[self._starts]
        self._fine, self._coarse = _Levels(fine), _Levels(coarse)
        self._error = np.abs(fine - coarse)
        # Centred, so that the one-pass variances below do not cancel.
        self._values = (fine - fine.mean(), coarse - coarse.mean())
        values = None if grid is None else list(grid)
        rounded = (round_to_grid(fine, values), round_to_grid(coarse, values))
        self._rounded = (rounded[0] - rounded[0][0], rounded[1] - rounded[0][0])

    @cached_property
    def _steps(self) -> list[_Step]:
        return _inversion_steps(self._coarse.codes)

    def __call__(self, counts: Floats, names: Sequence[str] = METRICS) -> dict[str, Floats]:
        """Each named metric under each row of counts.

        Args:
            counts: How often each item is in a resample, `(B, n)`, whole numbers, at least one positive in each row.
            names: Which of `METRICS`.

        Returns:
            For each name float64 `(B,)`, NaN where the metric is undefined.
        """
        weights = np.take(counts, self._order, axis=1)
        if len(self._starts) < weights.shape[1]:
            weights = np.add.reduceat(weights, self._starts, axis=1)
        n, fine, coarse = weights.sum(axis=1), self._fine.totals(weights), self._coarse.totals(weights)
        # Counts are whole numbers, so "one level holds everything" is exact; a variance of 1e-17 is not.
        correlates = (n >= MIN_ITEMS) & (fine.max(axis=1) < n) & (coarse.max(axis=1) < n)
        draw = _Draw(weights, n, fine, coarse, correlates)
        return {name: getattr(self, f"_{name}")(draw) for name in names}

    def _pearson(self, draw: _Draw) -> Floats:
        x, y = self._values
        mean_x, mean_y, xx, yy, xy = (draw.mean(column) for column in (x, y, x * x, y * y, x * y))
        spread = np.sqrt(np.maximum(xx - mean_x**2, 0) * np.maximum(yy - mean_y**2, 0))
        return np.clip(_ratio(xy - mean_x * mean_y, spread, draw.correlates), -1, 1)

    def _spearman(self, draw: _Draw) -> Floats:
        # Midranks minus their mean (n + 1) / 2, per level.
        fine = np.cumsum(draw.fine, axis=1) - (draw.fine + draw.n[:, None]) / 2
        coarse = np.cumsum(draw.coarse, axis=1) - (draw.coarse + draw.n[:, None]) / 2
        products = np.take(fine, self._fine.codes, axis=1) * np.take(coarse, self._coarse.codes, axis=1)
        covariance = np.einsum("bu,bu->b", draw.weights, products)
        fine_spread = np.einsum("bk,bk,bk->b", draw.fine, fine, fine)
        coarse_spread = np.einsum("bk,bk,bk->b", draw.coarse, coarse, coarse)
        return np.clip(_ratio(covariance, np.sqrt(fine_spread) * np.sqrt(coarse_spread), draw.correlates), -1, 1)

    def _kendall(self, draw: _Draw) -> Floats:
        pairs = draw.n * (draw.n - 1) / 2
        fine, coarse, both = (_pairs_within(totals) for totals in (draw.fine, draw.coarse, draw.weights))
        concordant_minus_discordant = pairs - fine - coarse + both - 2 * _inversions(draw.weights, self._steps)
        untied = np.sqrt(np.maximum(pairs - fine, 0)) * np.sqrt(np.maximum(pairs - coarse, 0))
        return np.clip(_ratio(concordant_minus_discordant, untied, draw.correlates), -1, 1)

    def _rmse(self, draw: _Draw) -> Floats:
        return np.sqrt(draw.mean(self._error**2))

    def _mae(self, draw: _Draw) -> Floats:
        return draw.mean(self._error)

    def _qwk(self, draw: _Draw) -> Floats:
        x, y = self._rounded
        observed, mean_x, mean_y, squares = (draw.mean(column) for column in ((x - y) ** 2, x, y, x * x + y * y))
        by_chance = squares - 2 * mean_x * mean_y
        # Both sides constant at one value: 0 / 0. On a grid of fractions the difference is 1e-17 rather than 0.
        return 1 - _ratio(observed, by_chance, by_chance > 1e-12 * squares)

    def _accuracy(self, draw: _Draw) -> Floats:
        return draw.mean((self._rounded[0] == self._rounded[1]).astype(np.float64))


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
