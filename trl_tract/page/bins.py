"""How items are grouped for a picture, and the density of the scores in a group. Pure arrays."""

from dataclasses import dataclass

import numpy as np

from trl_tract.evaluation.pairs import Floats, Ints

_LEVELS = 20  # a side with more distinct values than this is continuous
_INTERVALS = 10


@dataclass(frozen=True)
class Bins:
    """Items in groups. G groups, none of them empty.

    Attributes:
        codes: Group of each item, `(n,)`.
        centres: Where each group is drawn, rubric units, `(G,)`, increasing.
        labels: What each is called.
        exact: Whether the items of a group share one value.
    """

    codes: Ints
    centres: Floats
    labels: tuple[str, ...]
    exact: bool

    @property
    def counts(self) -> list[int]:
        """Items in each group."""
        return np.bincount(self.codes, minlength=len(self.centres)).tolist()  # type: ignore[no-any-return]

    @property
    def step(self) -> float:
        """Smallest distance of two groups, rubric units; 1 where there is one group."""
        return float(np.diff(self.centres).min()) if len(self.centres) > 1 else 1.0


def gold_bins(gold: Floats) -> Bins:
    """Gold scores by value where they lie on few levels, otherwise in ten equally wide intervals.

    Args:
        gold: Rubric units, `(n,)`, n >= 1.

    Example:
        >>> gold_bins(np.array([1.0, 3.0, 3.0])).labels
        ('1', '3')
    """
    levels, codes = np.unique(gold, return_inverse=True)
    if len(levels) <= _LEVELS:
        return Bins(codes.astype(np.int64), levels, tuple(f"{level:.3g}" for level in levels), exact=True)
    edges = np.linspace(levels[0], levels[-1], _INTERVALS + 1)
    return _intervals(gold, edges, (edges[1:] + edges[:-1]) / 2)


def prediction_bins(predicted: Floats) -> Bins:
    """Predictions in at most ten groups of about the same size, at least twenty items in each where there are so many.

    Args:
        predicted: Rubric units, `(n,)`, n >= 1.

    Example:
        >>> prediction_bins(np.arange(100.0)).counts
        [20, 20, 20, 20, 20]
    """
    number = int(np.clip(len(predicted) // 20, 1, _INTERVALS))
    edges = np.unique(np.quantile(predicted, np.linspace(0, 1, number + 1)))
    if len(edges) == 1:
        return Bins(np.zeros(len(predicted), dtype=np.int64), edges, (f"{edges[0]:.3g}",), exact=True)
    return _intervals(predicted, edges, (edges[1:] + edges[:-1]) / 2)


def density(values: Floats, low: float, high: float) -> tuple[Floats, Floats]:
    """Gaussian kernel density on 200 places from `low` to `high`, from every value however many there are.

    Binned first, so its cost does not grow with the kernel: a place is a two-hundredth of the range, far less than the
    kernel's width (Silverman's rule).

    Args:
        values: Rubric units, `(n,)`, not all equal.
        low: First place.
        high: Last place.

    Returns:
        Places and densities, both `(200,)`.

    Source: Silverman 1986, Density Estimation, equation 3.31.
    """
    edges = np.linspace(low, high, 201)
    places = (edges[1:] + edges[:-1]) / 2
    counts, _ = np.histogram(values, bins=edges)
    quartiles = np.percentile(values, [25, 75])
    spread = min(values.std(), np.ptp(quartiles) / 1.34) or values.std()
    width = max(0.9 * float(spread) * len(values) ** -0.2, (high - low) / 200)
    kernel = np.exp(-0.5 * ((places[:, None] - places) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    return places, kernel @ counts / len(values)


def _intervals(values: Floats, edges: Floats, centres: Floats) -> Bins:
    codes = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(centres) - 1)
    used, codes = np.unique(codes, return_inverse=True)
    labels = tuple(f"{edges[i]:.3g} to {edges[i + 1]:.3g}" for i in used)
    return Bins(codes.astype(np.int64), centres[used], labels, exact=False)
