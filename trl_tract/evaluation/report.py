"""Agreement with gold scores as people publish it: numbers with intervals, two judges compared, and tables of them.

The 95 % intervals are those of `intervals.py`. Knows nothing of models, generation or files: it takes scores.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trl_tract.evaluation.intervals import KINDS, MIN_UNITS, Interval, Kind, intervals
from trl_tract.evaluation.pairs import METRICS, Floats, Ints, JudgedPairs, as_pairs, numbered
from trl_tract.evaluation.standing import Standing, standing
from trl_tract.evaluation.tables import aligned, markdown, number
from trl_tract.evaluation.verdict import Finding, verdict

__all__ = ["Comparison", "Interval", "ScoreReport", "compare", "comparison_table", "score_report"]


@dataclass(frozen=True, kw_only=True)
class _Agreement:
    pearson: Interval
    spearman: Interval
    kendall: Interval
    rmse: Interval
    mae: Interval
    qwk: Interval
    accuracy: Interval
    n: int
    failed: int
    n_groups: int | None
    n_bootstrap: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """All attributes by name, ready for JSON: undefined numbers are None."""
        return {name: _plain(value) for name, value in vars(self).items()}

    @property
    def baselines(self) -> dict[str, dict[str, float]]:
        """Name -> metrics to compare with; there are none for a difference."""
        return {}

    @property
    def resampled(self) -> str:
        """What the intervals come from, or why there are none."""
        if self.n_bootstrap == 0:
            return "no intervals: n_bootstrap is 0"
        count, units = (self.n, "items") if self.n_groups is None else (self.n_groups, "groups")
        if count < MIN_UNITS:
            return f"no intervals: {count} {units}, but {MIN_UNITS} are needed"
        return f"95 % intervals: {self.n_bootstrap} bootstrap resamples of {count} {units}, seed {self.seed}"

    def _lines(self, heading: str) -> str:
        rows = [["metric", heading, "low", "high", *self.baselines]]
        for name in METRICS:
            interval = getattr(self, name)
            others = [baseline.get(name, np.nan) for baseline in self.baselines.values()]
            cells = ("-" if np.isnan(cell) else f"{cell:.3f}" for cell in (interval.low, interval.high, *others))
            rows.append([name, number(interval.value), *cells])
        return f"{aligned(rows)}\n{self.resampled}"


@dataclass(frozen=True, kw_only=True)
class ScoreReport(_Agreement):
    """One judge against the gold scores. Printed, it is a table.

    Attributes:
        pearson, spearman, kendall: Correlations (Kendall: tau-b); undefined for a constant or fewer than three items.
        rmse, mae: Errors, rubric units.
        qwk, accuracy: Quadratic-weighted kappa, and share of equal scores, after rounding to the grid.
        standing: The judge beside always predicting the mean, and beside the raters; None where no item has a score.
        n: Items with a prediction: those behind every number here.
        failed: Items without one (NaN), counted and kept out of everything else.
        n_groups: Groups that were resampled; None: items were.
        n_bootstrap: Resamples behind each interval, all of them for every metric.
        seed: Seed of the resampling.
    """

    standing: Standing | None

    @property
    def spread(self) -> float:
        """Standard deviation of the predictions over that of the gold scores; NaN where those are all the same.

        Near 0 the judge gives every item the same score.
        """
        return np.nan if self.standing is None else self.standing.spread

    @property
    def verdict(self) -> tuple[Finding, ...]:
        """What the numbers mean, in words: the first finding is the headline."""
        return verdict(
            n=self.n,
            failed=self.failed,
            n_groups=self.n_groups,
            rmse=self.rmse,
            pearson=self.pearson,
            standing=self.standing,
        )

    def to_dict(self) -> dict[str, Any]:
        """All attributes by name, ready for JSON: undefined numbers are None."""
        return {**super().to_dict(), "spread": _plain(self.spread), "verdict": [asdict(each) for each in self.verdict]}

    def __str__(self) -> str:
        headline, *others = (finding.text for finding in self.verdict)
        counts = f"{self.n} of {self.n + self.failed} items scored, {self.failed} failed"
        return "\n".join([headline, *(f"- {text}" for text in others), "", counts, self._lines("value")])

    @property
    def baselines(self) -> dict[str, dict[str, float]]:
        """Name -> metrics of always predicting the mean, and of a rater against the mean of the other raters."""
        if self.standing is None:
            return {}
        raters = {} if self.standing.raters is None else {"a rater": self.standing.raters.rater}
        return {"the mean": self.standing.mean, **raters}


@dataclass(frozen=True, kw_only=True)
class Comparison(_Agreement):
    """Judge a minus judge b on the same items. Printed, it is a table.

    An interval that leaves out 0 tells the two apart. For `rmse` and `mae` a negative difference favours a.

    Attributes:
        pearson, spearman, kendall, rmse, mae, qwk, accuracy: Differences, in the units of `ScoreReport`.
        n: Items that both judges scored: those behind every difference.
        failed: Items that a, b or both failed to score, kept out.
        failed_a, failed_b: How many of all items each judge failed to score.
        n_groups, n_bootstrap, seed: As in `ScoreReport`.
    """

    failed_a: int
    failed_b: int

    def __str__(self) -> str:
        counts = f"{self.n} of {self.n + self.failed} items scored by both; a failed {self.failed_a}, b {self.failed_b}"
        return f"{counts}\n{self._lines('a - b')}"


def score_report(
    predictions: npt.ArrayLike,
    references: npt.ArrayLike,
    *,
    groups: Iterable[Hashable] | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    grid: Iterable[float] | None = None,
    rationales: Iterable[Hashable] | None = None,
    raters: Sequence[Sequence[float] | None] | None = None,
) -> ScoreReport:
    """Compute a judge's agreement with gold scores: seven metrics, each with a 95 % bootstrap interval.

    Every metric, including Kendall's tau-b, is computed exactly in every resample, without subsampling. 100,000 items
    take about ten seconds with gold scores on a few levels, or half a minute if both scores are continuous. See
    `intervals.interval` for the method and `docs/evaluation.md` for the coverage of the intervals.

    Args:
        predictions: The judge's scores in rubric units, `(n,)`; NaN for items without a score.
        references: Gold scores, rubric units, `(n,)`.
        groups: Group of each item, such as its question or author, `(n,)`. Items of a group are not independent, so
            whole groups are resampled; otherwise the intervals would be too narrow.
        n_bootstrap: Number of resamples; 0 gives values without intervals.
        seed: The same seed gives the same intervals.
        grid: Possible scores, for `qwk` and `accuracy`. None: the integers.
        rationales: The judge's rationales, in any order. The verdict counts how many are distinct.
        raters: Human scores of each item in rubric units, `(n,)` lists; None for an item without any, and None or NaN
            for a missing rater. The verdict compares the judge with the raters on items with several of them.

    Returns:
        The report. An undefined metric is NaN, with its interval. Only the interval is NaN if it cannot be computed:
        one item or group, a metric that is undefined in more than 5 % of the resamples, or one that does not vary in
        them, as with a judge that never errs.

    Raises:
        ValueError: Unequal lengths, a gold score that is not finite, an infinite prediction, a missing group, or a
            negative `n_bootstrap`.

    Example:
        >>> report = score_report([1, 2, 4, 4, float("nan")], [1, 2, 3, 5, 4], n_bootstrap=200)
        >>> report.n, report.failed, round(report.pearson.value, 3)
        (4, 1, 0.878)
    """
    predicted, gold = as_pairs(predictions, references)
    given = _given(predicted, "predictions")
    codes, n_groups = _group_codes(groups, given)
    values = None if grid is None else list(grid)
    pairs = JudgedPairs(predicted[given], gold[given], values) if given.any() else None
    if raters is not None and len(raters) != len(gold):
        raise ValueError(f"raters has {len(raters)} items and references has {len(gold)}. Pass one list per item.")
    if raters is not None:
        raters = [None if scores is None else [each for each in scores if not _missing(each)] for scores in raters]
    return ScoreReport(
        **_intervals(pairs, KINDS, int(given.sum()), codes, n_bootstrap, seed),
        standing=None
        if pairs is None
        else standing(
            predicted[given],
            gold[given],
            codes=codes,
            n_bootstrap=n_bootstrap,
            seed=seed,
            grid=values,
            rationales=rationales,
            raters=None if raters is None else [scores for scores, kept in zip(raters, given, strict=True) if kept],
        ),
        n=int(given.sum()),
        failed=int((~given).sum()),
        n_groups=n_groups,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )


def _plain(value: Any) -> Any:
    """An attribute as JSON has it."""
    if isinstance(value, Interval):
        return value.to_dict()
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value


def compare(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    references: npt.ArrayLike,
    *,
    groups: Iterable[Hashable] | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    grid: Iterable[float] | None = None,
) -> Comparison:
    """Judge a minus judge b on the same items: seven differences, each with a 95 % bootstrap interval.

    Paired: each resample is drawn once and both judges are measured on it, so what is hard for both cancels. Two
    overlapping intervals of two reports do not say that the judges are equal; this does the comparison.

    Args:
        a: One judge's scores, rubric units, `(n,)`; NaN where it failed.
        b: The other's, for the same items in the same order.
        references: Gold scores, rubric units, `(n,)`.
        groups: As in `score_report`.
        n_bootstrap: As in `score_report`.
        seed: As in `score_report`.
        grid: As in `score_report`.

    Returns:
        The differences, over the items that both judges scored.

    Raises:
        ValueError: As in `score_report`.

    Example:
        >>> difference = compare([1, 2, 3, 5], [2, 2, 4, 4], [1, 2, 3, 5], n_bootstrap=200)
        >>> difference.mae.value
        -0.75
    """
    (scores_a, gold), (scores_b, _) = as_pairs(a, references, "a"), as_pairs(b, references, "b")
    given_a, given_b = _given(scores_a, "a"), _given(scores_b, "b")
    given = given_a & given_b
    codes, n_groups = _group_codes(groups, given)
    values = None if grid is None else list(grid)
    difference: Callable[[Floats], dict[str, Floats]] | None = None
    if given.any():
        of_a, of_b = (JudgedPairs(scores[given], gold[given], values) for scores in (scores_a, scores_b))

        def difference(counts: Floats) -> dict[str, Floats]:
            from_a, from_b = of_a(counts), of_b(counts)
            return {name: from_a[name] - from_b[name] for name in METRICS}

    return Comparison(
        **_intervals(difference, dict.fromkeys(METRICS, "difference"), int(given.sum()), codes, n_bootstrap, seed),
        n=int(given.sum()),
        failed=int((~given).sum()),
        failed_a=int((~given_a).sum()),
        failed_b=int((~given_b).sum()),
        n_groups=n_groups,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Judges side by side: a table that lines up in a terminal and is GitHub Markdown.

    Args:
        rows: One mapping per judge: `judge` (its name), `report` (a `ScoreReport` or its `to_dict()`) and, where known,
            `grid_mass` (mean probability on the grid) and `seconds` (run time). What is not known is shown as "-".

    Raises:
        ValueError: There are no rows, or one lacks `judge` or `report` or has a key that is not understood.

    Example:
        >>> report = score_report([1, 2, 4, 4], [1, 2, 3, 5], n_bootstrap=0)
        >>> print(comparison_table([{"judge": "seed model", "report": report, "seconds": 12}]))
        | judge      |      Pearson [95 %] | Spearman |  RMSE | grid mass | failed | seconds |
        | :--------- | ------------------: | -------: | ----: | --------: | -----: | ------: |
        | seed model | 0.878 [no interval] |    0.949 | 0.707 |         - |      0 |    12.0 |
    """
    if not rows:
        raise ValueError("There are no judges to compare, because rows is empty. Pass at least one.")
    table = [["judge", "Pearson [95 %]", "Spearman", "RMSE", "grid mass", "failed", "seconds"]]
    for index, row in enumerate(rows):
        required, known = {"judge", "report"}, {"judge", "report", "grid_mass", "seconds"}
        if not required <= row.keys() <= known:
            raise ValueError(
                f"rows[{index}] has the keys {sorted(row)}. Required: 'judge' and 'report'. Optional: 'grid_mass' and "
                "'seconds'."
            )
        report = row["report"]
        numbers = report.to_dict() if isinstance(report, ScoreReport) else report
        pearson = Interval(**{name: _nan_if_none(number) for name, number in numbers["pearson"].items()})
        table.append(
            [
                " ".join(str(row["judge"]).split()).replace("|", "\\|"),  # neither may end a cell
                str(pearson),
                number(_nan_if_none(numbers["spearman"]["value"])),
                number(_nan_if_none(numbers["rmse"]["value"])),
                "-" if row.get("grid_mass") is None else number(row["grid_mass"]),
                str(numbers["failed"]),
                "-" if row.get("seconds") is None else f"{row['seconds']:.1f}",
            ]
        )
    return markdown(table)


def _given(predicted: Floats, name: str) -> npt.NDArray[np.bool_]:
    infinite = np.flatnonzero(np.isinf(predicted))
    if infinite.size:
        raise ValueError(
            f"{infinite.size} of {len(predicted)} {name} are infinite (first: {name}[{infinite[0]}] is "
            f"{predicted[infinite[0]]}). Pass NaN for a judgement that failed."
        )
    given: npt.NDArray[np.bool_] = ~np.isnan(predicted)
    return given


def _missing(value: Any) -> bool:
    return bool(value is None or value != value)


def _group_codes(groups: Iterable[Hashable] | None, given: npt.NDArray[np.bool_]) -> tuple[Ints | None, int | None]:
    """0, 1, ... for each group among the given items, in order of appearance, and how many there are."""
    if groups is None:
        return None, None
    listed = list(groups)
    if len(listed) != len(given):
        raise ValueError(f"groups has {len(listed)} items and references has {len(given)}. Pass one group per item.")
    missing = [index for index, group in enumerate(listed) if _missing(group)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(listed)} groups are missing (first: groups[{missing[0]}] is "
            f"{listed[missing[0]]}). Give every item a group. An item without others is its own group."
        )
    codes = numbered(group for group, kept in zip(listed, given, strict=True) if kept)
    return codes, int(codes.max(initial=-1)) + 1


def _intervals(
    statistics: Callable[[Floats], dict[str, Floats]] | None,
    kinds: Mapping[str, Kind],
    n: int,
    codes: Ints | None,
    n_bootstrap: int,
    seed: int,
) -> dict[str, Interval]:
    """Each metric of all `n` items, with its interval."""
    if n_bootstrap < 0:
        raise ValueError(f"n_bootstrap is {n_bootstrap}. Pass 1000 for intervals, or 0 for none.")
    if statistics is None:
        return dict.fromkeys(METRICS, Interval(np.nan, np.nan, np.nan))
    return intervals(statistics, n, codes, n_bootstrap, seed, kinds)


def _nan_if_none(number: float | None) -> float:
    return np.nan if number is None else number
