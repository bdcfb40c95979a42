"""95 % intervals for the metrics of judged items, from a bootstrap of the items or of the groups they belong to.

The bootstrap gives the standard error, on a scale where the metric's errors are nearly symmetric; Student's t gives
the width. Needs numpy and scipy; knows nothing of models, of what is compared, or of tables.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from trl_tract.evaluation.pairs import Floats, Ints

Kind = Literal["correlation", "error", "share", "difference"]
"""What a number is decides its scale: Fisher's z, the logarithm, Wilson's for a share of items, its own."""

KINDS: Mapping[str, Kind] = {
    "pearson": "correlation",
    "spearman": "correlation",
    "kendall": "correlation",
    "rmse": "error",
    "mae": "error",
    "qwk": "correlation",  # it is a concordance correlation of the rounded scores
    "accuracy": "share",
}
_FARTHEST: Mapping[Kind, float] = {"correlation": 2.0, "share": 1.0, "error": math.inf}
"""How far two judges' metrics can be apart."""

MIN_UNITS = 5
"""Fewer items or groups than this have no interval: of four groups, that of a difference is as wide as the scale."""

UNDEFINED_SHARE = 0.05
"""With a larger share of resamples in which a metric is undefined, its 95 % interval cannot be placed."""

_CHUNK = 2**18  # counts held at once: 2 MiB, about a core's cache
_STILL = 1e-9  # resampled values that differ by less are one value and floating-point noise
_END = 14.0  # atanh(1 - 1e-12) and -log(1e-6): beyond it, a resampled correlation is 1 and an error is 0


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval; NaN where undefined.

    Example:
        >>> print(Interval(0.6501, 0.6, 0.7))
        0.650 [0.600, 0.700]
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "undefined"
        if np.isnan(self.low):
            return f"{self.value:.3f} [no interval]"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float | None]:
        """`value`, `low` and `high`, None where undefined."""
        fields = {"value": self.value, "low": self.low, "high": self.high}
        return {name: None if np.isnan(number) else number for name, number in fields.items()}


def bootstrap(
    statistics: Callable[[Floats], dict[str, Floats]], n: int, codes: Ints | None, n_bootstrap: int, seed: int
) -> dict[str, Floats]:
    """Each metric in every one of `n_bootstrap` resamples: of the items, or of whole groups where there are codes.

    Args:
        statistics: Numbers by name, `(B,)` each, as a function of how often each item counts, `(B, n)`.
        n: Items.
        codes: Each item's group, 0, 1, ... without gaps, `(n,)`; None: each item is drawn by itself.
        n_bootstrap: Resamples.
        seed: The same seed draws the same resamples, however many threads there are.

    Returns:
        For each name that `statistics` gives, float64 `(n_bootstrap,)`, NaN where it is undefined in a resample; empty
        without resamples.
    """
    n_units = n if codes is None else int(codes.max()) + 1
    per_chunk = max(1, _CHUNK // n)
    sizes = [min(per_chunk, n_bootstrap - start) for start in range(0, n_bootstrap, per_chunk)]

    def resample(size: int, stream: np.random.SeedSequence) -> dict[str, Floats]:
        drawn = np.random.default_rng(stream).integers(0, n_units, size=(size, n_units))
        drawn += np.arange(size)[:, None] * n_units
        counts = np.bincount(drawn.ravel(), minlength=size * n_units).reshape(size, n_units).astype(np.float64)
        return statistics(counts if codes is None else np.take(counts, codes, axis=1))

    if not sizes:
        return {name: np.empty(0) for name in statistics(np.ones((1, n)))}
    # Each chunk has its own random stream: the result does not depend on how many threads share the work.
    streams = np.random.SeedSequence(seed).spawn(len(sizes))
    if len(sizes) > 1:
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            chunks = list(pool.map(resample, sizes, streams))
    else:
        chunks = [resample(size, stream) for size, stream in zip(sizes, streams, strict=True)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def intervals(
    statistics: Callable[[Floats], dict[str, Floats]],
    n: int,
    codes: Ints | None,
    n_bootstrap: int,
    seed: int,
    kinds: Mapping[str, Kind],
) -> dict[str, Interval]:
    """Each number of all `n` items, with its interval: see `bootstrap` and, for `kinds`, `interval`."""
    n_units = n if codes is None else int(codes.max()) + 1
    resampled = bootstrap(statistics, n, codes, n_bootstrap if n_units > 1 else 0, seed)
    farthest = {name: _FARTHEST[kind] for name, kind in KINDS.items()}
    return {
        name: interval(float(value[0]), resampled[name], n_units, kinds[name], farthest.get(name, math.inf))
        for name, value in statistics(np.ones((1, n))).items()
    }


def interval(value: float, resampled: Floats, n_units: int, kind: Kind, limit: float = math.inf) -> Interval:
    """The 95 % interval of a metric from its bootstrap: estimate -+ t * standard error, on the scale of its kind.

    The standard error is sqrt(U / (U - 1)) times the standard deviation of the resampled values, for U units that were
    drawn (a bootstrap's own is that much too small), and t is the 97.5 % point of Student's t with U - 1 degrees of
    freedom. A correlation is carried to Fisher's z (atanh) and an error to its logarithm, where their standard errors
    hardly depend on the value; a share of items gets Wilson's interval at the number of independent items that
    has this standard error, so that it stays inside [0, 1] and has a width even at 0 and 1.

    Why not percentiles: of few items they are too narrow and lopsided. `docs/evaluation.md` has the coverage of
    percentile, BCa, studentised and these intervals side by side.

    Args:
        value: The metric of all items.
        resampled: The metric of each resample, `(B,)`, NaN where undefined.
        n_units: Items that were resampled, or groups.
        kind: What the metric is.
        limit: How large a difference can be at most, either way.

    Returns:
        The interval; its ends are NaN where it cannot be placed: an undefined value, fewer than `MIN_UNITS`, more than
        `UNDEFINED_SHARE` of the resamples undefined, or resamples that do not vary (a correlation of exactly 1 or an
        error of exactly 0 among them), whose width of 0 would claim certainty.

    Sources: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 12 and 22; Fisher 1921; Wilson 1927,
        https://doi.org/10.1080/01621459.1927.10502953; Korn and Graubard 1998 (effective number of items).

    Example:
        >>> resampled = np.array([0.4, 0.5, 0.6, 0.7, 0.5])
        >>> print(interval(0.55, resampled, 30, "correlation"))
        0.550 [0.294, 0.732]
    """
    from scipy.special import stdtrit  # here, because it takes a tenth of a second to import

    nowhere = Interval(value, math.nan, math.nan)
    defined = resampled[~np.isnan(resampled)]
    if (
        math.isnan(value)
        or n_units < MIN_UNITS
        or not defined.size
        or len(defined) < (1 - UNDEFINED_SHARE) * len(resampled)
    ):
        return nowhere
    correction = math.sqrt(n_units / (n_units - 1))
    t = float(stdtrit(n_units - 1, 0.975))
    error = correction * float(defined.std())
    still = float(np.ptp(defined)) < _STILL
    if kind == "share" and (not still or value in (0, 1)):
        return Interval(value, *_wilson(value, n_units if still else value * (1 - value) / error**2, t))
    if still:
        return nowhere
    if kind == "difference":
        return Interval(value, max(value - t * error, -limit), min(value + t * error, limit))
    scale = _FISHER if kind == "correlation" else _LOGARITHM
    with np.errstate(divide="ignore"):
        centre, carried = float(scale.forward(value)), scale.forward(defined)
    if abs(centre) > _END:
        return nowhere
    # A resample without the one item that was misjudged is perfect, and infinite on this scale: then the standard error
    # is carried over by the scale's slope. Near the end of the scale the slope may be too steep for that: an interval
    # of -0.98 would reach up to 0.97.
    inside = bool((np.abs(carried) < _END).all())
    sloped = error * scale.slope(value)
    if not inside and kind == "correlation" and t * sloped > abs(centre):
        return Interval(value, max(value - t * error, -1.0), min(value + t * error, 1.0))
    error = correction * float(carried.std()) if inside else sloped
    return Interval(value, float(scale.back(centre - t * error)), float(scale.back(centre + t * error)))


class _Scale(NamedTuple):
    forward: Callable[..., Floats]
    back: Callable[..., Floats]
    slope: Callable[[float], float]


_FISHER = _Scale(np.arctanh, np.tanh, lambda value: 1 / (1 - value**2))
_LOGARITHM = _Scale(np.log, np.exp, lambda value: 1 / value)


def _wilson(share: float, n: float, z: float) -> tuple[float, float]:
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
