"""Judged items in the form that resampling needs: every metric as a function of how often each item counts.

A bootstrap resample is then a vector of counts, and nothing is sorted twice. Needs numpy alone; knows nothing of
models, training, how counts are drawn, or tables.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

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
        raise ValueError(f"{name} holds a value that is not a number ({error}). Pass one float per item.") from error
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
            "Remove these items or give them gold scores. Only predictions may be NaN."
        )
    return predicted, gold


def numbered(groups: Iterable[Hashable]) -> Ints:
    """0, 1, ... for each group, in order of appearance, `(n,)`."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


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


class _Step(NamedTuple):
    """One bit of the codes: Z units have it clear, the others have it set."""

    clear: Ints  # (Z,) positions, in the arrangement that the step before left
    is_set: Ints  # (U - Z,) positions
    set_before: Ints  # (Z,): how many with the bit set stand before this one
    set_before_block: Ints  # (Z,): how many of them stand before all codes that equal this one above the bit


def _inversion_steps(codes: Ints) -> list[_Step]:
    """Splits that meet every inverted pair of `codes` exactly once: at the highest bit in which the two differ.

    The sorting depends on the codes alone, so all resamples share it: Knight's O(n log n) count (1966) with the sort
    taken out. Each step leaves the clear units before the set ones, which keeps codes with an equal prefix together.
    """
    steps = []
    for bit in reversed(range(int(codes.max()).bit_length())):
        has_bit = codes >> bit & 1
        clear, is_set = np.flatnonzero(has_bit == 0), np.flatnonzero(has_bit)
        set_before = np.cumsum(has_bit) - has_bit
        block_begins = np.flatnonzero(np.diff(codes >> (bit + 1), prepend=-1))
        lengths = np.diff(block_begins, append=len(codes))
        set_before_block = np.repeat(set_before[block_begins], lengths)
        steps.append(_Step(clear, is_set, set_before[clear], set_before_block[clear]))
        codes = np.concatenate((codes[clear], codes[is_set]))
    return steps


def _inversions(weights: Floats, steps: Iterable[_Step]) -> Floats:
    """Weighted count of pairs whose earlier unit has the larger code: `(B, U)` -> `(B,)`."""
    found = np.zeros(len(weights))
    for step in steps:
        low, high = np.take(weights, step.clear, axis=1), np.take(weights, step.is_set, axis=1)
        running = np.zeros((len(weights), len(step.is_set) + 1))
        np.cumsum(high, axis=1, out=running[:, 1:])
        larger_before = np.take(running, step.set_before, axis=1) - np.take(running, step.set_before_block, axis=1)
        found += np.einsum("bz,bz->b", low, larger_before)
        weights = np.concatenate((low, high), axis=1)
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
        total: Floats = np.einsum("bu,u->b", self.weights, per_unit)  # BLAS would start threads of its own
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
        untied = np.sqrt(np.maximum((pairs - fine) * (pairs - coarse), 0))
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
        return np.clip(1 - _ratio(observed, by_chance, by_chance > 1e-12 * squares), -1, 1)

    def _accuracy(self, draw: _Draw) -> Floats:
        return draw.mean((self._rounded[0] == self._rounded[1]).astype(np.float64))
