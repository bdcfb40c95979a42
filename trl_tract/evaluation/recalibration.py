"""What held-out gold scores can improve: an affine map of the scores, and intervals with a guaranteed coverage.

Works on arrays; knows nothing of models or of how scores came about.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trl_tract.evaluation.pairs import Floats, as_pairs, as_scores, numbered

FILE_NAME = "tract_calibration.json"
MIN_FIT = 10
"""Fewer held-out judgements than this do not carry two fitted numbers."""


@dataclass(frozen=True)
class Recalibration:
    """An affine map of a judge's scores, fitted on held-out judgements: `slope * score + intercept`, kept in the range.

    Judges that were trained on few rows give scores that are too extreme or too timid, or all a little high: two
    numbers correct that. The slope is never negative, so no two items change their order, and the rank correlations
    stay (but for ties at the ends of the range). An isotonic map could bend, but needs more rows and makes many ties.

    Attributes:
        slope: At least 0.
        intercept: Rubric units.
        low: The grid's lower end, rubric units.
        high: Its upper end.
        n: Judgements that it was fitted on.
        rmse: Error of the raw scores on them, rubric units.
        rmse_cross_validated: Error of scores that were recalibrated by a fit to the other items (five parts, whole
            groups). Not below `rmse`: leave the recalibration alone.
    """

    slope: float
    intercept: float
    low: float
    high: float
    n: int
    rmse: float
    rmse_cross_validated: float

    def __call__(self, scores: npt.ArrayLike) -> Floats:
        """The recalibrated scores; NaN stays NaN."""
        return np.clip(self.slope * np.asarray(scores, dtype=np.float64) + self.intercept, self.low, self.high)

    @classmethod
    def fit(
        cls,
        predictions: npt.ArrayLike,
        references: npt.ArrayLike,
        values: npt.ArrayLike,
        *,
        groups: Iterable[Hashable] | None = None,
        seed: int = 0,
        least_spread: float = 0.0,
    ) -> Recalibration:
        """Least squares on judgements of items that the judge was not trained on, and will not be evaluated on.

        Args:
            predictions: The judge's scores, rubric units, `(n,)`; NaN where it failed, which is left out.
            references: Gold scores, rubric units, `(n,)`.
            values: The grid, rubric units.
            groups: What each item belongs to, `(n,)`, for the cross-validation.
            seed: Of the cross-validation's parts.
            least_spread: What the recalibrated scores' standard deviation is at least, in parts of the gold scores', as
                far as the raw scores spread. 0 makes a constant of a judge that ranks no better than chance; 0.15 keeps
                its order, and costs about 1 % of the error if that order means nothing.

        Raises:
            ValueError: Unequal n, or fewer than `MIN_FIT` judgements or five groups.

        Example:
            >>> gold = [1, 2, 3, 4, 5] * 4
            >>> fitted = Recalibration.fit([0.5 * y + 1 for y in gold], gold, [1, 2, 3, 4, 5])
            >>> round(fitted.slope, 3), round(fitted.intercept, 3), fitted(2.5).round(3).tolist()
            (2.0, -2.0, 3.0)
        """
        predicted, gold = as_pairs(predictions, references)
        listed = list(range(len(gold)) if groups is None else groups)
        if len(listed) != len(gold):
            raise ValueError(f"groups has {len(listed)} items and references has {len(gold)}. Pass one group per item")
        given = np.flatnonzero(np.isfinite(predicted))
        codes = numbered([listed[i] for i in given])
        if len(given) < MIN_FIT or codes.max() < 4:
            raise ValueError(
                f"{len(given)} judgements with a score, in {codes.max(initial=-1) + 1} groups, are too few to fit a "
                f"recalibration. At least {MIN_FIT} in 5 groups are needed; 100 are better"
            )
        predicted, gold = predicted[given], gold[given]
        grid = as_scores(values, "values")
        low, high = float(grid.min()), float(grid.max())
        parts = np.random.default_rng(seed).permutation(np.arange(codes.max() + 1) % 5)[codes]
        crossed = np.empty(len(gold))
        for part in range(5):
            slope, intercept = _least_squares(predicted[parts != part], gold[parts != part], least_spread)
            crossed[parts == part] = np.clip(slope * predicted[parts == part] + intercept, low, high)
        errors = [float(np.sqrt(np.square(scores - gold).mean())) for scores in (predicted, crossed)]
        return cls(*_least_squares(predicted, gold, least_spread), low, high, len(gold), *errors)

    def save(self, directory: str | Path, *, scale: str = "", always: bool = False) -> Path:
        """Write `tract_calibration.json` beside the judge.

        Args:
            directory: The judge's.
            scale: The aspect that it is for; those of other aspects stay. Empty for a judge of one score.
            always: Whether the judge applies it where nothing else is said; else only where it is asked to.
        """
        file = Path(directory) / FILE_NAME
        content: dict[str, Any] = asdict(self)
        if scale:
            others = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            content = {"aspects": {**others.get("aspects", {}), scale: content}}
        if always:
            content["always"] = True
        if file.is_symlink():
            file.unlink()  # written beside the judge, not where a link leads
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return file

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None, *, scale: str = "") -> Recalibration:
        """Read the recalibration of a judge's directory or hub id, there at `revision`.

        Raises:
            FileNotFoundError: There is none: nobody has fitted and saved one.
            OSError: The hub cannot be reached.
            ValueError: It cannot be read, or has none for the aspect `scale`.
        """
        file = _find(path, revision)
        if file is None:
            raise FileNotFoundError(
                f"no {FILE_NAME} at {path}. Fit one on held-out judgements and save it there: "
                "Recalibration.fit(...).save(directory)"
            )
        try:
            saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            saved.pop("always", None)
            if scale:
                saved = saved["aspects"][scale]
            count = int(saved.pop("n"))
            found = cls(**{name: float(number) for name, number in saved.items()}, n=count)
            if not (found.slope >= 0 and math.isfinite(found.intercept) and found.low < found.high):
                raise ValueError(f"slope {found.slope}, intercept {found.intercept}, range {found.low} to {found.high}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} cannot be read as {FILE_NAME}: {error!r}. Fit and save it again") from error
        return found


def applied_by_default(path: str | Path, revision: str | None = None) -> bool:
    """Whether a judge has a recalibration that it applies where nothing else is said: one that its run has fitted.

    Raises:
        OSError: The hub cannot be reached.
        ValueError: It has one that cannot be read.
    """
    file = _find(path, revision)
    try:
        return file is not None and bool(json.loads(file.read_text(encoding="utf-8")).get("always"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read as {FILE_NAME}: {error!r}. Fit and save it again") from error


@dataclass(frozen=True)
class Conformal:
    """Intervals that hold the gold score of a new item with a chosen probability, whatever the judge is worth.

    Attributes:
        quantile: Half the width, rubric units; of normalised intervals, per unit of `std + floor`.
        level: The chosen probability.
        low: The grid's lower end: no interval goes beyond it, since no gold score does.
        high: Its upper end.
        n: Held-out items that it rests on; with groups, one of each.
        normalized: Whether the width follows the spread of the score distribution.
        floor: Added to the spread, rubric units, so that a judge that is sure of itself is not believed wholly.
    """

    quantile: float
    level: float
    low: float
    high: float
    n: int
    normalized: bool = False
    floor: float = 0.0

    @classmethod
    def fit(
        cls,
        predictions: npt.ArrayLike,
        references: npt.ArrayLike,
        values: npt.ArrayLike,
        *,
        level: float = 0.95,
        std: npt.ArrayLike | None = None,
        groups: Iterable[Hashable] | None = None,
        seed: int = 0,
    ) -> Conformal:
        """Split conformal prediction: the ceil((n + 1) * level)-th smallest of n held-out absolute errors.

        A new item from where these came from lies inside with a probability of at least `level`, and of less than
        `level + 1 / (n + 1)` if no errors are tied: over the choice of the held-out items as well, not for each
        choice. The judge must not have been trained, nor its recalibration fitted, on them.

        Args:
            predictions: The judge's scores, rubric units, `(n,)`; NaN where it failed, which is left out.
            references: Gold scores, rubric units, `(n,)`.
            values: The grid, rubric units.
            level: Probability, above 0 and below 1.
            std: Spread of each score distribution, rubric units, `(n,)`: makes intervals wider where it is wider.
            groups: What each item belongs to, `(n,)`. Items of a group are not exchangeable with a new group's, so one
                of each group is drawn and the rest is left out: that keeps the guarantee exact for a new group.
            seed: Of that drawing.

        Raises:
            ValueError: Unequal n, a level outside (0, 1), or too few items for it: 19 for 0.95.

        Sources: Lei et al. 2018, https://doi.org/10.1080/01621459.2017.1307116; groups: Dunn, Wasserman and Ramdas
            2023, https://doi.org/10.1080/01621459.2022.2060112.

        Example:
            >>> rng = np.random.default_rng(0)
            >>> gold = rng.choice([1, 2, 3, 4, 5], 200)
            >>> conformal = Conformal.fit(gold + rng.uniform(-1, 1, 200), gold, [1, 2, 3, 4, 5])
            >>> [end.round(1).tolist() for end in conformal.interval([3.0, 4.5])]
            [[2.0, 3.5], [4.0, 5.0]]
        """
        predicted, gold = as_pairs(predictions, references)
        if not 0 < level < 1:
            raise ValueError(f"level={level} must be above 0 and below 1, such as 0.95")
        grid = as_scores(values, "values")
        low, high = float(grid.min()), float(grid.max())
        floor = 0.0 if std is None else 0.02 * (high - low)
        width = np.ones(len(gold)) if std is None else as_scores(std, "std") + floor
        listed = list(range(len(gold)) if groups is None else groups)
        for name, length in (("std", len(width)), ("groups", len(listed))):
            if length != len(gold):
                raise ValueError(f"{name} has {length} items and references has {len(gold)}. Pass one per item")
        given = np.flatnonzero(np.isfinite(predicted))
        if not (width[given] >= floor).all():
            raise ValueError("std holds a spread that is negative or NaN for an item that has a score")
        shuffled = np.random.default_rng(seed).permutation(given)
        _, first = np.unique(numbered([listed[i] for i in shuffled]), return_index=True)
        kept = shuffled[first]
        # 1e-9: (n + 1) * level may come out a rounding error above a whole number.
        rank = math.ceil((len(kept) + 1) * level - 1e-9)
        if rank > len(kept):
            needed = math.ceil(level / (1 - level) - 1e-9)
            raise ValueError(
                f"{len(kept)} held-out items (one for each group) are too few for intervals at level {level:g}: "
                f"{needed} are needed"
            )
        errors = np.sort(np.abs(predicted[kept] - gold[kept]) / width[kept])
        return cls(float(errors[rank - 1]), level, low, high, len(kept), std is not None, floor)

    def interval(self, scores: npt.ArrayLike, std: npt.ArrayLike | None = None) -> tuple[Floats, Floats]:
        """The ends of the intervals of new scores, rubric units, each of the shape of `scores`; NaN where it is NaN.

        Raises:
            ValueError: `std` is given or missing against how it was fitted.
        """
        if (std is not None) != self.normalized:
            raise ValueError(
                "these intervals were fitted "
                + ("with std: pass the new items' std too" if self.normalized else "without std: do not pass it")
            )
        centre = np.asarray(scores, dtype=np.float64)
        half = self.quantile * (np.ones_like(centre) if std is None else np.asarray(std, dtype=np.float64) + self.floor)
        return np.clip(centre - half, self.low, self.high), np.clip(centre + half, self.low, self.high)


def _least_squares(predicted: Floats, gold: Floats, least_spread: float = 0.0) -> tuple[float, float]:
    """Slope, at least 0, and intercept; a constant judge, or one that is right the wrong way round, gets the mean."""
    centred = predicted - predicted.mean()
    square = float(centred @ centred)
    if square <= 1e-12:
        return 0.0, float(gold.mean())
    # Scores that hardly spread are not blown up: that would be their noise.
    least = min(least_spread * float(np.std(gold) / np.std(predicted)), 1.0)
    slope = max(least, float(centred @ (gold - gold.mean())) / square)
    return slope, float(gold.mean() - slope * predicted.mean())


def _find(path: str | Path, revision: str | None) -> Path | None:
    """The recalibration of a judge's directory or hub id; None where there is none."""
    if Path(path).is_dir():
        file = Path(path) / FILE_NAME
        return file if file.is_file() else None
    from transformers.utils.hub import cached_file, is_offline_mode

    found = cached_file(
        str(path),
        FILE_NAME,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        # Without a network, what is not in the cache is not known to be there either.
        _raise_exceptions_for_connection_errors=not is_offline_mode(),
    )
    return None if found is None else Path(str(found))
