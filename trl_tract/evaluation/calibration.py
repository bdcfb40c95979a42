"""Whether a judge's score distribution means what it says: reliability, ranked probability score, spread against error.

Works on arrays; knows nothing of models, of how probabilities came about, or of what can be done about it
(`recalibration.py`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from trl_tract.evaluation.pairs import Floats, as_pairs, as_scores, round_to_grid

Event = Literal["point", "cumulative"]


def as_distributions(probs: npt.ArrayLike, values: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Score probabilities, renormalised on the grid, and the grid, both float64.

    Args:
        probs: Probabilities of the grid's scores, `(n, K)`; of several rationales give the mean.
        values: The grid, rubric units, increasing, `(K,)`.

    Raises:
        ValueError: Unequal K, a grid that does not increase, or a row without probability or with a negative one.
    """
    table, grid = np.asarray(probs, dtype=np.float64), as_scores(values, "values")
    if table.ndim != 2 or table.shape[1] != len(grid):
        raise ValueError(f"probs has shape {table.shape}; with {len(grid)} values it must be (n, {len(grid)})")
    if not (np.diff(grid) > 0).all():
        raise ValueError(f"values={grid.tolist()} must increase from each value to the next")
    bad = np.flatnonzero(~((table >= 0).all(axis=1) & (table.sum(axis=1) > 0) & np.isfinite(table).all(axis=1)))
    if bad.size:
        raise ValueError(
            f"{bad.size} of {len(table)} rows of probs are not distributions (first: probs[{bad[0]}] is "
            f"{table[bad[0]].tolist()}). Leave out the judgements that failed"
        )
    return table / table.sum(axis=1, keepdims=True), grid


def ranked_probability_score(probs: npt.ArrayLike, references: npt.ArrayLike, values: npt.ArrayLike) -> Floats:
    """How far each score distribution is from its gold score: the CRPS, rubric units, 0 is perfect.

    `E|X - y| - E|X - X'| / 2`: the absolute error of a distribution, and just that where all probability is on one
    score. It rewards a spread that is honest: no other distribution than the true one has a lower mean.

    Args:
        probs: Probabilities of the grid's scores, `(n, K)`.
        references: Gold scores, rubric units, on the grid or not, `(n,)`.
        values: The grid, rubric units, `(K,)`.

    Returns:
        float64 `(n,)`. On a grid with steps of 1 and gold scores on it: the sum over the grid of the squared
        difference between the cumulative distribution and the step at the gold score.

    Raises:
        ValueError: As in `as_distributions`, or unequal n.

    Source: Gneiting and Raftery 2007, https://doi.org/10.1198/016214506000001437, equation 21.

    Example:
        >>> ranked_probability_score([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], [1, 1], [1, 2, 3])
        array([0.25, 2.  ])
    """
    table, grid = as_distributions(probs, values)
    gold = _gold(references, table)
    to_gold = np.einsum("nk,nk->n", table, np.abs(grid - gold[:, None]))
    among = np.einsum("ni,ij,nj->n", table, np.abs(grid[:, None] - grid), table)
    crps: Floats = to_gold - among / 2
    return crps


class Bin(NamedTuple):
    """Items whose forecast of one event is about equal.

    Attributes:
        event: The score that the event is about.
        predicted: Mean forecast probability.
        observed: Share of the items for which the event came true.
        n: Items.
    """

    event: float
    predicted: float
    observed: float
    n: int


def reliability(
    probs: npt.ArrayLike, references: npt.ArrayLike, values: npt.ArrayLike, *, event: Event = "point", bins: int = 10
) -> list[Bin]:
    """Forecast against observed frequency: of the items given about 30 % for a score of 4, do 30 % have it?

    Args:
        probs: Probabilities of the grid's scores, `(n, K)`.
        references: Gold scores, rubric units, `(n,)`.
        values: The grid, rubric units, `(K,)`.
        event: `point`: the gold score, rounded to the grid, is this score. `cumulative`: it is this score or less;
            fractions need no rounding then.
        bins: Equally wide bins of the forecast, from 0 to 1.

    Returns:
        One `Bin` for every score and every bin that has items, by score, then by forecast. The last score has no
        cumulative event: it always comes true.

    Raises:
        ValueError: As in `as_distributions`, unequal n, an unknown `event`, or no bins.

    Example:
        >>> found = reliability([[0.8, 0.2], [0.8, 0.2]], [1, 2], [1, 2])
        >>> [(bin.event, round(bin.predicted, 2), bin.observed, bin.n) for bin in found]
        [(1.0, 0.8, 0.5, 2), (2.0, 0.2, 0.5, 2)]
    """
    table, grid = as_distributions(probs, values)
    gold = _gold(references, table)
    if event not in ("point", "cumulative"):
        raise ValueError(f"event={event!r} is unknown: choose 'point' or 'cumulative'")
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    if event == "point":
        forecasts, true = table, round_to_grid(gold, grid.tolist())[:, None] == grid
    else:
        forecasts, true = table.cumsum(axis=1)[:, :-1], gold[:, None] <= grid[:-1]
    found = []
    for column in range(forecasts.shape[1]):
        places = np.clip((forecasts[:, column] * bins).astype(np.int64), 0, bins - 1)
        for place in np.unique(places):
            mine = places == place
            mean, share = forecasts[mine, column].mean(), true[mine, column].mean()
            found.append(Bin(float(grid[column]), float(mean), float(share), int(mine.sum())))
    return found


def expected_calibration_error(
    probs: npt.ArrayLike, references: npt.ArrayLike, values: npt.ArrayLike, *, event: Event = "point", bins: int = 10
) -> float:
    """Mean difference between forecast and observed frequency, over all items and events, in [0, 1]; 0 is perfect.

    Chance alone makes it positive, the more so the fewer items a bin has: compare judges on the same items.

    Args, errors and the bins as in `reliability`. NaN where there are no items.

    Example:
        >>> round(expected_calibration_error([[0.8, 0.2], [0.8, 0.2]], [1, 2], [1, 2]), 4)  # |0.8 - 0.5|, |0.2 - 0.5|
        0.3
    """
    found = reliability(probs, references, values, event=event, bins=bins)
    total = sum(bin.n for bin in found)
    return sum(bin.n * abs(bin.predicted - bin.observed) for bin in found) / total if total else math.nan


class SpreadBin(NamedTuple):
    """Items whose score distributions are about equally wide, rubric units.

    Attributes:
        std: Root mean square of their standard deviations; what `rmse` would be if the spread were honest.
        rmse: Root mean square of their errors.
        mae: Mean of their absolute errors.
        n: Items.
    """

    std: float
    rmse: float
    mae: float
    n: int


def spread_against_error(
    std: npt.ArrayLike, predictions: npt.ArrayLike, references: npt.ArrayLike, *, bins: int = 5
) -> list[SpreadBin]:
    """Does the judge err more where it says that it is unsure? Errors by the width of the score distribution.

    Args:
        std: Standard deviation of each score distribution, rubric units, `(n,)`, as in `Judgement.std`.
        predictions: Scores, rubric units, `(n,)`; items without one (NaN) are left out.
        references: Gold scores, rubric units, `(n,)`.
        bins: Equally full bins, narrowest distributions first; fewer where there are fewer items.

    Raises:
        ValueError: Unequal n, a negative spread, or no bins.

    Example:
        >>> for bin in spread_against_error([0.1, 0.2, 1.0, 1.2], [3, 3, 3, 3], [3, 3.2, 5, 1], bins=2):
        ...     print([round(number, 2) for number in bin])
        [0.16, 0.14, 0.1, 2]
        [1.1, 2.0, 2.0, 2]
    """
    predicted, gold = as_pairs(predictions, references)
    width = as_scores(std, "std")
    if len(width) != len(gold):
        raise ValueError(f"std has {len(width)} items and references has {len(gold)}. Pass one spread per item")
    given = np.isfinite(predicted)
    if not (width[given] >= 0).all():
        raise ValueError("std holds a spread that is negative or NaN for an item that has a score")
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    width, error = width[given], np.abs(predicted - gold)[given]
    found = []
    for mine in np.array_split(np.argsort(width, kind="stable"), min(bins, len(width)) or 1):
        if mine.size:
            spread, rmse = (math.sqrt(np.square(column[mine]).mean()) for column in (width, error))
            found.append(SpreadBin(spread, rmse, float(error[mine].mean()), len(mine)))
    return found


def held_out(groups: Sequence[Hashable], fraction: float, *, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Which items to fit a calibration on: about `fraction` of the groups, whole ones, so that none is on both sides.

    Args:
        groups: What each item belongs to, such as its question, `(n,)`.
        fraction: Share of the groups, above 0 and below 1.
        seed: The same seed chooses the same groups.

    Returns:
        bool `(n,)`.

    Raises:
        ValueError: One side would be empty.

    Example:
        >>> chosen = held_out(["a", "a", "b", "b"], 0.5)
        >>> bool(chosen[0] == chosen[1] != chosen[2] == chosen[3])
        True
    """
    names = list(dict.fromkeys(groups))
    count = round(len(names) * fraction)
    if not 0 < count < len(names):
        raise ValueError(f"{fraction:g} of {len(names)} group(s) leaves one side empty. Give another fraction")
    chosen = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}
    return np.array([group in chosen for group in groups])


def _gold(references: npt.ArrayLike, table: Floats) -> Floats:
    gold = as_scores(references, "references")
    if len(gold) != len(table) or not np.isfinite(gold).all():
        raise ValueError(f"references must hold {len(table)} finite gold scores, one for each row of probs")
    return gold
