"""Reliability, CRPS and spread against hand calculations; recalibration and conformal intervals by simulation."""

import json
import math

import numpy as np
import pytest

from trl_tract.evaluation.calibration import (
    as_distributions,
    expected_calibration_error,
    held_out,
    ranked_probability_score,
    reliability,
    spread_against_error,
)
from trl_tract.evaluation.recalibration import FILE_NAME, Conformal, Recalibration

GRID = [1, 2, 3, 4, 5]


def forecasts(rng, n, *, honest=True):
    """Score distributions, and gold scores drawn from them (or from flatter ones)."""
    probs = rng.dirichlet(np.full(5, 0.8), n)
    truth = probs if honest else 0.5 * probs + 0.1
    gold = np.array([rng.choice(GRID, p=row) for row in truth])
    return probs, gold.astype(float)


def test_crps_of_certainty_is_the_absolute_error():
    np.testing.assert_allclose(ranked_probability_score(np.eye(5), [1, 3.5, 3, 1, 5], GRID), [0, 1.5, 0, 3, 0])


def test_crps_equals_the_squared_differences_of_cumulative_distributions():
    # The other definition of the ranked probability score, on a grid with steps of 1.
    probs, gold = forecasts(np.random.default_rng(0), 200)
    steps = gold[:, None] <= np.array(GRID)
    wanted = np.square(probs.cumsum(axis=1) - steps)[:, :-1].sum(axis=1)
    np.testing.assert_allclose(ranked_probability_score(probs, gold, GRID), wanted, atol=1e-12)


def test_crps_equals_its_integral_between_grid_values():
    # Integral of (F(x) - 1[x >= y])^2: from 1 to 2.2 F = 0.4, from 2.2 to 4 it is 0.4 - 1. 1.2 * 0.16 + 1.8 * 0.36.
    assert ranked_probability_score([[0.4, 0.6]], [2.2], [1, 4])[0] == pytest.approx(1.2 * 0.16 + 1.8 * 0.36)


def test_crps_does_not_change_with_the_mass_on_the_grid():
    probs, gold = forecasts(np.random.default_rng(1), 5)
    np.testing.assert_allclose(
        ranked_probability_score(0.3 * probs, gold, GRID), ranked_probability_score(probs, gold, GRID)
    )


def test_an_honest_distribution_has_the_lowest_crps():
    probs, gold = forecasts(np.random.default_rng(2), 4000)
    honest = ranked_probability_score(probs, gold, GRID).mean()
    for power in (0.5, 2.0):
        assert honest < ranked_probability_score(probs**power, gold, GRID).mean()


def test_reliability_by_hand():
    probs = [[0.82, 0.18], [0.88, 0.12], [0.3, 0.7]]
    found = reliability(probs, [1, 2, 2], [1, 2], bins=5)
    # Score 1: 0.3 is in [0.2, 0.4) and untrue; 0.82, 0.88 in [0.8, 1]: mean 0.85, one of two true. Score 2: the rest.
    assert [(b.event, round(b.predicted, 6), b.observed, b.n) for b in found] == [
        (1, 0.3, 0, 1),
        (1, 0.85, 0.5, 2),
        (2, 0.15, 0.5, 2),
        (2, 0.7, 1, 1),
    ]


def test_cumulative_reliability_by_hand_takes_fractions_as_they_are():
    # P(score <= 1) = 0.5, P(score <= 2) = 0.75; a gold score of 1.5 is not <= 1, and is <= 2.
    found = reliability([[0.5, 0.25, 0.25]], [1.5], [1, 2, 3], event="cumulative")
    assert [(b.event, b.predicted, b.observed) for b in found] == [(1, 0.5, 0), (2, 0.75, 1)]


@pytest.mark.parametrize("event", ["point", "cumulative"])
def test_honest_distributions_have_a_calibration_error_near_zero_and_boastful_ones_do_not(event):
    rng = np.random.default_rng(3)
    honest, boastful = (expected_calibration_error(*forecasts(rng, 4000, honest=h), GRID, event=event) for h in (1, 0))
    assert honest < 0.02  # chance: about 0.4 / sqrt(400 in a bin)
    assert boastful > 0.06


def test_calibration_error_by_hand():
    # The four bins of test_reliability_by_hand: 1 * 0.3 + 2 * 0.35 + 2 * 0.35 + 1 * 0.3 over 6.
    probs = [[0.82, 0.18], [0.88, 0.12], [0.3, 0.7]]
    assert expected_calibration_error(probs, [1, 2, 2], [1, 2], bins=5) == pytest.approx(2 / 6)


def test_spread_against_error_by_hand():
    found = spread_against_error([2.0, 0.1, 0.3, 1.0], [1, 2, 3, 4], [4, 2, 2, 4], bins=2)
    # Narrowest two: spreads 0.1, 0.3, errors 0, 1. Widest: 1, 2 and 0, 3.
    assert found[0] == pytest.approx((math.sqrt(0.05), math.sqrt(0.5), 0.5, 2))
    assert found[1] == pytest.approx((math.sqrt(2.5), math.sqrt(4.5), 1.5, 2))


def test_an_honest_spread_is_the_error_to_be_expected():
    probs, gold = forecasts(np.random.default_rng(4), 20000)
    mean = probs @ GRID
    std = np.sqrt(probs @ np.square(GRID) - mean**2)
    for bin in spread_against_error(std, mean, gold):
        assert bin.rmse == pytest.approx(bin.std, rel=0.08)


def test_failed_items_have_no_spread():
    assert sum(b.n for b in spread_against_error([0.1, math.nan, 1], [1, math.nan, 2], [1, 2, 3])) == 2


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        ([[0.5, 0.5]], r"probs has shape \(1, 2\)"),
        ([[0.0] * 5], r"probs\[0\] is \[0.0"),
        ([[math.nan] * 5], "are not distributions"),
        ([[-0.1, 0.5, 0.5, 0.1, 0]], "are not distributions"),
    ],
)
def test_what_is_no_distribution_is_refused(probs, message):
    with pytest.raises(ValueError, match=message):
        as_distributions(probs, GRID)


def test_gold_scores_are_needed_for_every_row():
    with pytest.raises(ValueError, match="must hold 2 finite gold scores"):
        reliability(np.eye(5)[:2], [1, math.nan], GRID)


def test_groups_are_held_out_whole():
    groups = [f"q{i // 4}" for i in range(80)]
    chosen = held_out(groups, 0.25, seed=3)
    assert chosen.sum() == 20
    assert not {g for g, c in zip(groups, chosen, strict=True) if c} & {
        g for g, c in zip(groups, chosen, strict=True) if not c
    }


def test_a_split_that_leaves_a_side_empty_is_refused():
    with pytest.raises(ValueError, match="empty"):
        held_out(["a"] * 10, 0.5)


def timid(seed, n=200):
    """A judge that uses only the middle of the range, half a point too high."""
    rng = np.random.default_rng(seed)
    gold = rng.choice(GRID, n).astype(float)
    return 3.5 + 0.4 * (gold - 3) + rng.normal(0, 0.2, n), gold


def test_a_recalibration_is_least_squares():
    predicted, gold = timid(0)
    fitted = Recalibration.fit(predicted, gold, GRID)
    assert [fitted.slope, fitted.intercept] == pytest.approx(np.polyfit(predicted, gold, 1).tolist())


def test_a_recalibration_mends_scores_that_it_was_not_fitted_on():
    fitted, (predicted, gold) = Recalibration.fit(*timid(1), GRID), timid(2)
    before, after = (np.sqrt(np.square(scores - gold).mean()) for scores in (predicted, fitted(predicted)))
    assert after < 0.6 * before
    assert fitted.rmse_cross_validated == pytest.approx(after, rel=0.15)


def test_cross_validation_says_that_a_good_judge_needs_no_recalibration():
    worse = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        gold = rng.uniform(2, 4, 30)
        fitted = Recalibration.fit(gold + rng.normal(0, 0.1, 30), gold, GRID)
        worse += fitted.rmse_cross_validated > fitted.rmse
    assert worse > 20


def test_a_judge_that_is_wrong_the_wrong_way_round_is_not_turned_round():
    fitted = Recalibration.fit([5, 4, 3, 2, 1] * 4, [1, 2, 3, 4, 5] * 4, GRID)
    assert (fitted.slope, fitted.intercept) == (0, 3)


def test_recalibrated_scores_stay_in_the_range():
    assert Recalibration(10, -20, 1, 5, 100, 1, 1)([1.0, 2.3, 5.0, math.nan])[:3].tolist() == [1, 3, 5]


def test_a_failed_judgement_stays_failed():
    assert math.isnan(Recalibration(1, 0, 1, 5, 100, 1, 1)(math.nan))


def test_cross_validation_keeps_groups_together():
    # Five copies of each item: were they spread over the parts, the fit would have seen every item.
    predicted, gold = (np.repeat(side, 5) for side in timid(5, n=10))
    groups = np.repeat(np.arange(10), 5).tolist()
    alone, grouped = (Recalibration.fit(predicted, gold, GRID, groups=g).rmse_cross_validated for g in (None, groups))
    assert grouped > alone


@pytest.mark.parametrize("scores", [[3.0] * 9, [3.0] * 9 + [math.nan] * 5])
def test_too_few_judgements_for_a_recalibration_are_refused(scores):
    with pytest.raises(ValueError, match=r"9 judgements .* 9 groups"):
        Recalibration.fit(scores, [3.0] * len(scores), GRID)


def test_no_judgement_at_all_is_too_few():
    with pytest.raises(ValueError, match=r"0 judgements .* 0 groups"):
        Recalibration.fit([math.nan] * 20, [3.0] * 20, GRID)


def test_a_recalibration_takes_the_place_of_a_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "tract_calibration.json").symlink_to(tmp_path / "mine")
    Recalibration(1.0, 0.0, 1.0, 5.0, 30, 0.5, 0.5).save(tmp_path / "judge")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_recalibration_comes_back_as_it_was_saved(tmp_path):
    fitted = Recalibration.fit(*timid(3), GRID)
    fitted.save(tmp_path)
    assert Recalibration.load(tmp_path) == fitted


@pytest.mark.parametrize("content", ["{", "[]", '{"slope": 1}', json.dumps({"slope": "steep", "n": 3})])
def test_a_file_that_is_no_recalibration_is_named(content, tmp_path):
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ValueError, match=rf"{FILE_NAME}"):
        Recalibration.load(tmp_path)


def noisy(rng, n):
    """Scores whose error is as large as `std` says, gold scores, and `std`."""
    std = rng.uniform(0.1, 1.2, n)
    gold = rng.uniform(1, 5, n)
    return gold + std * rng.normal(size=n), gold, std


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("n", [19, 99, 300])
def test_conformal_intervals_hold_95_percent_of_new_gold_scores(n, normalized):
    # By theory between 0.95 and 0.95 + 1 / (n + 1), exactly ceil(0.95 * (n + 1)) / (n + 1) without ties: 0.95, 0.95 and
    # 286 / 301. 1,000 draws of n held-out and 50 new items each.
    inside = []
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        scores, gold, std = noisy(rng, n + 50)
        width = std if normalized else None
        fitted = Conformal.fit(
            scores[:n], gold[:n], [-10, 10], level=0.95, std=None if width is None else width[:n], seed=seed
        )
        low, high = fitted.interval(scores[n:], None if width is None else width[n:])
        inside.append(((low <= gold[n:]) & (gold[n:] <= high)).mean())
    # The mean of 1,000 draws has a standard error of about 0.0018 at n = 19, less beyond.
    assert np.mean(inside) == pytest.approx(math.ceil(0.95 * (n + 1) - 1e-9) / (n + 1), abs=0.006)


@pytest.mark.parametrize("told", [True, False])
def test_conformal_intervals_hold_new_questions_only_if_groups_are_told(told):
    # 20 questions of 30 items that share most of their error: of the 600 items only 20 are news.
    inside = []
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        shared, own = rng.normal(size=(21, 1)), rng.normal(0, 0.2, (21, 30))
        error = (shared + own) * rng.choice([0.3, 1.5], (21, 1))
        fitted = Conformal.fit(
            error[:20].ravel(),
            np.zeros(600),
            [-10, 10],
            groups=np.repeat(np.arange(20), 30).tolist() if told else None,
            seed=seed,
        )
        low, high = fitted.interval(error[20])
        inside.append(((low <= 0) & (high >= 0)).mean())
    if told:
        assert 0.94 <= np.mean(inside) <= 0.97  # 20 of 21: 0.952
    else:
        assert np.mean(inside) < 0.935


def test_normalised_intervals_are_wider_where_the_judge_is_unsure():
    scores, gold, std = noisy(np.random.default_rng(0), 500)
    fitted = Conformal.fit(scores, gold, [-10, 10], std=std)
    low, high = fitted.interval([3.0, 3.0], [0.1, 1.0])
    # The floor is 0.02 of a range of 20: (1 + 0.4) / (0.1 + 0.4).
    assert (high - low)[1] / (high - low)[0] == pytest.approx(2.8)


def test_conformal_intervals_end_where_the_grid_ends():
    fitted = Conformal(2.0, 0.95, 1.0, 5.0, 100)
    assert [end.tolist() for end in fitted.interval([1.5, 3.0])] == [[1.0, 1.0], [3.5, 5.0]]


@pytest.mark.parametrize(("n", "rank"), [(99, 95), (20, 20), (39, 38)])
def test_the_quantile_is_the_error_of_the_right_rank(n, rank):
    # ceil(100 * 0.95), which is 95.0 on paper and a little more in floating point; ceil(19.95); ceil(38.0).
    assert Conformal.fit(np.arange(1.0, n + 1), np.zeros(n), [-200, 200]).quantile == rank


@pytest.mark.parametrize(("level", "enough"), [(0.95, 19), (0.9, 9), (0.5, 1)])
def test_too_few_items_for_a_level_are_refused(level, enough):
    gold = np.zeros(enough)
    assert Conformal.fit(gold + 1, gold, [-5, 5], level=level).n == enough
    with pytest.raises(ValueError, match=f"level {level}: {enough}"):
        Conformal.fit(gold[1:] + 1, gold[1:], [-5, 5], level=level)


@pytest.mark.parametrize("std", [None, [0.1]])
def test_a_spread_is_given_to_new_items_exactly_if_it_was_fitted(std):
    fitted = Conformal(1.0, 0.95, 1.0, 5.0, 100, normalized=std is None, floor=0.1)
    with pytest.raises(ValueError, match="were fitted with"):
        fitted.interval([3.0], std)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_a_level_that_is_no_probability_is_refused(level):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        Conformal.fit([1.0], [1.0], GRID, level=level)
