"""What a report's numbers mean, in words: whether they mean anything, and how good the judge is. Makes no numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trl_tract.evaluation.intervals import MIN_UNITS, Interval
from trl_tract.evaluation.standing import Standing

SAYS_ONE_THING = 0.1
"""Below this spread beside the gold scores', a judge gives every item nearly the same score."""
MANY_FAILED = 0.2
"""A share of items without a score from which on the other figures may be about the easier items."""
_TIMID, _SURE = 0.5, 1.5  # spreads beside the gold scores' that are a finding
_ROUGH = 20  # units below which an interval is there and rough

Kind = Literal[
    "nothing scored",
    "many failed",
    "one score",
    "too few",
    "one gold score",
    "reversed",
    "better",
    "worse",
    "not told apart",
    "no interval",
    "spread",
    "timid",
    "overconfident",
    "shifted",
    "one rationale",
    "rationales",
    "below raters",
    "at raters",
    "above raters",
    "raters",
    "groups",
]


@dataclass(frozen=True)
class Finding:
    """One sentence or two of a verdict."""

    kind: Kind
    text: str


def verdict(
    *, n: int, failed: int, n_groups: int | None, rmse: Interval, pearson: Interval, standing: Standing | None
) -> tuple[Finding, ...]:
    """The findings, what matters most first: the first one is the headline.

    Args:
        n_groups: Groups that were resampled; None: items were.
        standing: The judge beside the mean and the raters; None where no item has a score.
    """
    if standing is None:
        return (
            Finding("nothing scored", f"None of the {failed:,} items has a score, so there is nothing to evaluate."),
        )
    few = (n if n_groups is None else n_groups) < MIN_UNITS
    found: list[Finding | None] = [
        _failures(n, failed),
        _one_score(standing),
        _few(n, n_groups) if few else None,
        None if few else _reversed(pearson),
        None if few else _beside_the_mean(standing, rmse),
        _spread(standing.spread),
        None if few else _shift(standing, rmse),
        _rationales(standing),
        _raters(standing),
        None if few or n_groups is None else _groups(n_groups),
    ]
    return tuple(each for each in found if each is not None)


def says_one_thing(spread: float) -> bool:
    """Whether scores spread so little beside the gold scores that their correlations say nothing."""
    return spread < SAYS_ONE_THING


def _failures(n: int, failed: int) -> Finding | None:
    if failed < MANY_FAILED * (n + failed):
        return None
    return Finding(
        "many failed",
        f"{failed:,} of {n + failed:,} items have no score. All other figures are about the remaining items, which may "
        "be easier.",
    )


def _one_score(standing: Standing) -> Finding | None:
    if not says_one_thing(standing.spread):
        return None
    return Finding(
        "one score",
        f"It gives every item nearly the same score: its scores spread {standing.spread:.2f} times as far as the gold "
        "scores. Correlations of such similar scores mean little.",
    )


def _few(n: int, n_groups: int | None) -> Finding:
    units = f"{n:,} items" if n_groups is None else f"{n:,} items from {n_groups:,} {_plural(n_groups, 'group')}"
    what = "items" if n_groups is None else "groups"
    return Finding("too few", f"Too little data: {units}. Confidence intervals need at least {MIN_UNITS} {what}.")


def _reversed(pearson: Interval) -> Finding | None:
    if not (pearson.high < 0 or pearson.value < -0.999):  # a correlation of -1 does not vary, and has no interval
        return None
    return Finding(
        "reversed",
        f"It ranks items in reverse: it scores high where people score low (Pearson {pearson}). Check that the judge "
        "and the gold scores use the same direction.",
    )


def _beside_the_mean(standing: Standing, rmse: Interval) -> Finding:
    difference = standing.minus_mean
    if standing.mean["rmse"] == 0:
        return Finding(
            "one gold score",
            f"All gold scores are the same, so its ranking cannot be evaluated. Its RMSE is {rmse.value:.3f}.",
        )
    numbers = f"RMSE {rmse.value:.3f} against {standing.mean['rmse']:.3f}"
    if np.isnan(difference.low):
        return Finding(
            "no interval",
            f"Compared with always predicting the mean: {numbers}. There is no interval for the difference.",
        )
    numbers = f"{numbers}, difference {difference}."
    if difference.high < 0:
        return Finding("better", f"Better than always predicting the mean: {numbers}")
    if difference.low > 0:
        return Finding("worse", f"Worse than always predicting the mean: {numbers}")
    return Finding("not told apart", f"No clear difference from always predicting the mean: {numbers}")


def _spread(spread: float) -> Finding | None:
    if np.isnan(spread) or says_one_thing(spread):
        return None
    text = f"Its scores spread {spread:.2f} times as far as the gold scores"
    if spread < _TIMID:
        return Finding("timid", f"{text}: it stays too close to the middle.")
    if spread > _SURE:
        return Finding("overconfident", f"{text}: it is overconfident.")
    return Finding("spread", f"{text}.")


def _shift(standing: Standing, rmse: Interval) -> Finding | None:
    shift = standing.shift
    rest = max(rmse.value**2 - shift.value**2, 0)
    certain = not shift.low <= 0 <= shift.high  # also where it is the same for all items, and there is no interval
    if not certain or shift.value**2 < rest or not shift.value or abs(shift.value) < 0.1 * standing.mean["rmse"]:
        return None
    return Finding(
        "shifted",
        f"Its scores are {abs(shift.value):.2f} too {'high' if shift.value > 0 else 'low'} on average. Without this "
        f"shift its RMSE would be {np.sqrt(rest):.3f}. To remove it, judge with --recalibrate false and run trl-tract "
        "recalibrate.",
    )


def _rationales(standing: Standing) -> Finding | None:
    if standing.rationales is None or standing.rationales < 2:
        return None
    if standing.distinct == 1:
        return Finding("one rationale", f"It wrote the same rationale {standing.rationales:,} times.")
    only = "Only " if 2 * (standing.distinct or 0) < standing.rationales else ""
    text = f"{only}{standing.distinct:,} of its {standing.rationales:,} rationales are distinct."
    return Finding("rationales", text)


def _raters(standing: Standing) -> Finding | None:
    if standing.raters is None:
        return None
    raters, difference = standing.raters, standing.raters.minus_rater
    numbers = (
        f"a rater differs from the mean of the other raters by RMSE {raters.rater['rmse']:.3f}, the judge by "
        f"{raters.judge['rmse']:.3f} ({raters.n:,} items with several raters"
    )
    if np.isnan(difference.low):
        return Finding("raters", f"Compared with the raters: {numbers}).")
    numbers = f"{numbers}, difference {difference})."
    if difference.low > 0:
        return Finding("below raters", f"Not yet as close to the raters as they are to each other: {numbers}")
    if difference.high < 0:
        return Finding("above raters", f"Closer to the raters than they are to each other: {numbers}")
    return Finding("at raters", f"No clear difference between the judge and a rater: {numbers}")


def _groups(n_groups: int) -> Finding:
    rough = " With so few groups, the intervals are rough." if n_groups < _ROUGH else ""
    return Finding("groups", f"The intervals come from {n_groups:,} groups.{rough}")


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"
