"""The verdict: the right words for judges whose faults are known, and numbers that a reader can check by hand."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from trl_tract.evaluation.intervals import MIN_UNITS
from trl_tract.evaluation.report import score_report
from trl_tract.evaluation.standing import Raters

RNG = np.random.default_rng(0)
N = 60
# Three raters see the truth through noise of their own; the gold score is their mean.
TRUTH = RNG.integers(1, 6, N).astype(float)
RATERS = np.clip(TRUTH[:, None] + RNG.normal(0, 0.6, (N, 3)), 1, 5)
GOLD = RATERS.mean(axis=1)
TEXTS = [f"Reply {i} misses a point." for i in range(N)]
GROUPS = [i // 4 for i in range(N)]


def kinds(scores, rationales=TEXTS, groups=GROUPS, **more):
    report = score_report(scores, GOLD, groups=groups, n_bootstrap=300, rationales=rationales, **more)
    return {finding.kind: finding.text for finding in report.verdict}


def headline(found):
    return next(iter(found))


def test_a_perfect_judge():
    found = kinds(GOLD)
    assert list(found) == ["better", "spread", "rationales", "groups"]
    assert found["better"].startswith("Better than always predicting the mean: RMSE 0.000 against")
    assert found["spread"] == "Its scores spread 1.00 times as far as the gold scores."
    assert found["rationales"] == "60 of its 60 rationales are distinct."


@pytest.mark.parametrize("wiggle", [0.0, 1e-3, 0.05])
def test_a_judge_that_says_one_thing(wiggle):
    # 0.05 is the judge of the newcomer: 3.76 to 3.91 for everything, Pearson .9.
    found = kinds(3.8 + wiggle * (GOLD - GOLD.mean()) + 1e-4 * RNG.normal(size=N))
    assert headline(found) == "one score"
    assert found["one score"].startswith("It gives every item nearly the same score")
    assert "better" not in found
    assert "spread" not in found


def test_a_judge_with_one_rationale():
    found = kinds(GOLD + RNG.normal(0, 0.3, N), ["Fine."] * N)
    assert headline(found) == "better"
    assert found["one rationale"] == "It wrote the same rationale 60 times."


@pytest.mark.parametrize("groups", [2, MIN_UNITS - 1])
def test_a_judge_seen_on_too_few_groups(groups):
    found = kinds(GOLD + RNG.normal(0, 0.3, N), groups=[i % groups for i in range(N)])
    assert headline(found) == "too few"
    assert found["too few"].startswith(f"Too little data: 60 items from {groups} groups.")
    assert not {"better", "worse", "not told apart"} & found.keys()
    report = score_report(GOLD + 0.1, GOLD, groups=[i % groups for i in range(N)], n_bootstrap=50)
    assert all(math.isnan(getattr(report, name).low) for name in ("pearson", "rmse", "accuracy"))


def test_a_reversed_judge():
    found = kinds(6 - GOLD)
    assert headline(found) == "reversed"
    assert found["reversed"].startswith("It ranks items in reverse")
    assert "worse" in found


def test_a_judge_at_the_raters_level():
    found = kinds(TRUTH + RNG.normal(0, 0.6, N), raters=RATERS.tolist())
    assert headline(found) == "better"
    assert found["at raters"].startswith("No clear difference between the judge and a rater")


@pytest.mark.parametrize("gap", [None, math.nan])
def test_a_rater_who_gave_no_score_is_no_rater_of_the_item(gap):
    gaps = [[*scores, gap] for scores in RATERS.tolist()]
    assert kinds(TRUTH, raters=gaps) == kinds(TRUTH, raters=RATERS.tolist())


@pytest.mark.parametrize("count", [1, MIN_UNITS - 1])
def test_of_too_few_items_no_shift_is_spoken_of(count):
    report = score_report(np.arange(count) + 2.0, np.arange(count) + 1.0)
    assert "shifted" not in [finding.kind for finding in report.verdict]


def test_a_judge_that_never_errs_on_gold_scores_that_are_all_the_same_has_no_shift():
    assert [finding.kind for finding in score_report([3] * 6, [3] * 6).verdict] == ["one gold score"]


def test_a_judge_below_and_one_above_the_raters_level():
    assert "below raters" in kinds(TRUTH + RNG.normal(0, 1.4, N), raters=RATERS.tolist())
    assert "above raters" in kinds(TRUTH, raters=RATERS.tolist())


def test_a_judge_that_failed_on_half_of_the_items():
    scores = np.where(np.arange(N) % 2, np.nan, GOLD + RNG.normal(0, 0.3, N))
    found = kinds(scores)
    assert headline(found) == "many failed"
    assert found["many failed"].startswith("30 of 60 items have no score.")
    assert "better" in found


def test_a_judge_that_is_off_by_one():
    found = kinds(GOLD + 1)
    assert list(found)[:3] == ["better", "spread", "shifted"]
    assert found["shifted"].startswith("Its scores are 1.00 too high on average. Without this shift its RMSE would be")
    assert "0.50 too low" in kinds(GOLD - 0.5 + RNG.normal(0, 0.1, N))["shifted"]
    assert "shifted" not in kinds(GOLD + RNG.normal(0, 0.6, N))


def test_a_judge_that_guesses_is_no_better_than_the_mean():
    assert headline(kinds(RNG.permutation(GOLD))) == "worse"
    # Half of the truth is right, half is not: as far from the gold scores as their mean is.
    noise = RNG.normal(size=N)
    noise -= noise @ (GOLD - GOLD.mean()) / np.square(GOLD - GOLD.mean()).sum() * (GOLD - GOLD.mean())
    noise *= np.sqrt(0.75 * np.square(GOLD - GOLD.mean()).sum() / np.square(noise).sum())
    assert headline(kinds(GOLD.mean() + 0.5 * (GOLD - GOLD.mean()) + noise)) == "not told apart"


def test_a_judge_that_keeps_to_the_middle_and_one_that_exaggerates():
    assert "timid" in kinds(3 + 0.3 * (GOLD - 3))
    assert "overconfident" in kinds(3 + 1.8 * (GOLD - 3))


def test_gold_scores_that_are_all_the_same_tell_nothing():
    report = score_report(3 + RNG.normal(0, 0.5, N), [3.0] * N, n_bootstrap=50)
    assert [finding.kind for finding in report.verdict] == ["one gold score"]


def test_a_judge_with_few_rationales():
    assert kinds(GOLD, TEXTS[:20] * 3)["rationales"] == "Only 20 of its 60 rationales are distinct."


def test_a_judge_without_any_score():
    report = score_report([np.nan] * 3, [1, 2, 3])
    (finding,) = report.verdict
    assert finding.kind == "nothing scored"
    assert str(report).startswith("None of the 3 items has a score")


def test_the_verdict_stands_on_top_of_the_printed_report_and_in_its_json():
    report = score_report(GOLD + 0.2, GOLD, n_bootstrap=50, raters=RATERS.tolist(), rationales=TEXTS)
    first, second, *_ = str(report).splitlines()
    assert first == report.verdict[0].text
    assert second == f"- {report.verdict[1].text}"
    saved = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert saved["verdict"][0] == {"kind": "better", "text": first}
    assert saved["standing"]["raters"]["n"] == N


def test_the_mean_is_the_best_constant_by_hand():
    # Gold 1 1 3 3 2: mean 2, squared errors 1 1 1 1 0, so RMSE sqrt(0.8) and MAE 0.8. The judge errs by 1 each time.
    report = score_report([2, 0, 4, 2, 3], [1, 1, 3, 3, 2], n_bootstrap=0)
    assert report.standing.mean["rmse"] == pytest.approx(math.sqrt(0.8))
    assert report.standing.mean["mae"] == pytest.approx(0.8)
    assert report.standing.minus_mean.value == pytest.approx(1 - math.sqrt(0.8))
    assert report.standing.shift.value == pytest.approx(0.2)


def test_raters_are_compared_with_the_mean_of_the_others_by_hand():
    # Item 1: raters 1 and 3, so each is 2 off the other; the judge says 2, 1 off each. Item 2: raters 2 2 5, each
    # against the mean of the others: 3.5, 3.5 and 2, so squares 2.25, 2.25 and 9, mean 4.5; the judge says 3: .25, .25
    # and 1, mean 0.5. Item 3 has one rater. Each item counts once.
    report = score_report([2, 3, 1, math.nan], [2, 3, 1, 4], n_bootstrap=0, raters=[[1, 3], [2, 2, 5], [1], [4, 5]])
    raters: Raters = report.standing.raters
    assert raters.n == 2
    assert raters.rater["rmse"] == pytest.approx(math.sqrt((4 + 4.5) / 2))
    assert raters.judge["rmse"] == pytest.approx(math.sqrt((1 + 0.5) / 2))
    assert raters.minus_rater.value == pytest.approx(math.sqrt(0.75) - math.sqrt(4.25))


def test_the_difference_from_the_mean_holds_the_truth_as_often_as_it_says():
    # Gold scores normal, the judge half-way to them with noise: RMSE sqrt(.25 + .25) against 1.
    hits = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        gold = rng.normal(size=40)
        report = score_report(0.5 * gold + 0.5 * rng.normal(size=40), gold, n_bootstrap=100)
        hits += report.standing.minus_mean.low <= math.sqrt(0.5) - 1 <= report.standing.minus_mean.high
    assert 0.88 <= hits / 150 <= 0.99  # 0.95 with a standard error of 0.018


def test_the_mean_that_is_always_predicted_is_each_resamples_own():
    # A plain bootstrap of RMSE minus standard deviation.
    gold = np.array([1.0, 1, 1, 2, 1, 1, 5, 1])
    predicted = gold + np.array([0.1, -0.2, 0.3, 0.1, -0.1, 0.2, -0.3, 0.1])
    drawn = np.random.default_rng(1).integers(0, 8, (20_000, 8))
    values = np.sqrt(np.square((predicted - gold)[drawn]).mean(axis=1)) - gold[drawn].std(axis=1)
    found = score_report(predicted, gold, n_bootstrap=20_000).standing.minus_mean
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, 7) * np.sqrt(8 / 7) * values.std(), rel=0.02)
