"""Reports: groups, failures, undefined numbers, comparisons; tables and pictures of them."""

import json
import math

import numpy as np
import pytest

from trl_tract.evaluation import metrics
from trl_tract.evaluation.pairs import METRICS
from trl_tract.evaluation.report import ScoreReport, compare, comparison_table, score_report


def judged(seed, n=80):
    rng = np.random.default_rng(seed)
    gold = rng.integers(1, 6, n).astype(float)
    return gold + rng.normal(0, 1, n), gold


@pytest.mark.parametrize("name", METRICS)
def test_values_are_those_of_the_functions(name):
    predicted, gold = judged(0)
    assert getattr(score_report(predicted, gold, n_bootstrap=10), name).value == getattr(metrics, name)(predicted, gold)


def test_groups_widen_the_interval_of_items_that_repeat():
    predicted, gold = judged(3, n=50)
    four_times = [np.repeat(side, 4) for side in (predicted, gold)]
    alone, grouped = (
        score_report(*four_times, groups=g, n_bootstrap=4000).mae for g in (None, np.repeat(np.arange(50), 4))
    )
    # Four copies hold no more information than one: the honest interval is sqrt(4) times as wide.
    assert (grouped.high - grouped.low) / (alone.high - alone.low) == pytest.approx(2, rel=0.1)


def test_groups_may_have_any_names():
    predicted, gold = judged(4)
    numbers = score_report(predicted, gold, groups=np.arange(80) // 4, n_bootstrap=50)
    names = score_report(predicted, gold, groups=[("question", i // 4) for i in range(80)], n_bootstrap=50)
    assert names == numbers


def test_a_seed_fixes_the_intervals():
    predicted, gold = judged(5)
    assert score_report(predicted, gold, seed=3) == score_report(predicted, gold, seed=3)


def test_another_seed_moves_the_intervals_and_not_the_values():
    predicted, gold = judged(5)
    one, other = (score_report(predicted, gold, seed=seed).pearson for seed in (3, 4))
    assert one.low != other.low
    assert one.value == other.value


def test_failures_are_counted_and_kept_out_of_everything_else():
    predicted, gold = judged(7)
    with_failures = score_report([*predicted, math.nan, None], [*gold, 1, 5], n_bootstrap=50)
    without = score_report(predicted, gold, n_bootstrap=50)
    assert (with_failures.n, with_failures.failed) == (80, 2)
    assert [getattr(with_failures, name) for name in METRICS] == [getattr(without, name) for name in METRICS]


def test_groups_of_failed_items_are_not_drawn():
    predicted, gold = judged(8, n=10)
    found = score_report([*predicted, math.nan], [*gold, 3], groups=[*"aabbccddee", "f"], n_bootstrap=50)
    assert found.n_groups == 5


def test_correlations_of_a_constant_judge_are_undefined_and_its_errors_are_not():
    found = score_report([3] * 20, [1, 2, 3, 4, 5] * 4)
    assert all(math.isnan(getattr(found, name).value) for name in ("pearson", "spearman", "kendall"))
    assert found.rmse.value == pytest.approx(math.sqrt(2))  # errors 2 1 0 1 2: mean square 10 / 5
    assert found.rmse.low < found.rmse.value < found.rmse.high


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_items_have_no_correlation(n):
    found = score_report([1, 2][:n], [1, 2][:n], n_bootstrap=20)
    assert math.isnan(found.pearson.value)
    assert found.n == n


def test_a_judge_that_always_failed_is_all_undefined():
    found = score_report([math.nan] * 3, [1, 2, 3])
    assert (found.n, found.failed) == (0, 3)
    assert all(math.isnan(getattr(found, name).value) for name in METRICS)


def test_one_group_gives_no_interval():
    predicted, gold = judged(9)
    found = score_report(predicted, gold, groups=["only"] * 80).pearson
    assert math.isnan(found.low)
    assert not math.isnan(found.value)


def test_no_interval_where_resamples_are_often_undefined():
    # One item of six differs: a resample leaves it out with probability (5/6)^6 = 0.33; its MAE is always defined.
    found = score_report([1, 2, 2, 2, 2, 2], [1, 3, 3, 3, 3, 3])
    assert math.isnan(found.pearson.low)
    assert not math.isnan(found.mae.low)


def test_no_bootstrap_gives_values_alone():
    found = score_report(*judged(10), n_bootstrap=0)
    assert math.isnan(found.mae.low)
    assert "no intervals" in str(found)


def test_grid_reaches_the_rounded_metrics():
    predicted, gold = judged(11)
    found = score_report(predicted, gold, n_bootstrap=0, grid=[1, 3, 5])
    assert found.accuracy.value == metrics.accuracy(predicted, gold, grid=[1, 3, 5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1]), "predictions has 2 items and references has 1"),
        (([1, 2], [1, math.nan]), r"references\[1\] is nan"),
        (([1, math.inf], [1, 2]), r"predictions\[1\] is inf.*Pass NaN"),
    ],
)
def test_unusable_scores_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        score_report(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": ["a"]}, "groups has 1 items and references has 3"),
        ({"groups": ["a", None, "b"]}, r"groups\[1\] is None"),
        ({"groups": [1.0, 2.0, math.nan]}, r"groups\[2\] is nan"),
        ({"n_bootstrap": -1}, "n_bootstrap is -1"),
    ],
)
def test_unusable_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        score_report([1, 2, 3], [1, 2, 3], **options)


def test_report_is_json_and_says_none_where_undefined():
    found = json.loads(
        json.dumps(score_report([3, 3, 3, math.nan], [1, 2, 3, 4], n_bootstrap=20).to_dict(), allow_nan=False)
    )
    assert found["pearson"] == {"value": None, "low": None, "high": None}
    assert found["mae"]["value"] == 1
    assert (found["n"], found["failed"]) == (3, 1)


def test_printed_report_is_an_aligned_table():
    report = score_report([3, 3, 3, math.nan], [1, 2, 3, 4], n_bootstrap=20)
    lines = str(report).split("\n\n")[1].splitlines()
    assert lines[0] == "3 of 4 items scored, 1 failed"
    assert lines[2].split() == ["pearson", "undefined", "-", "-", "-"]
    # The last column is always predicting the mean, 2.
    assert lines[6].split()[::4] == ["mae", "0.667"]
    assert len({len(line) for line in lines[1:9]}) == 1
    assert lines[9] == "no intervals: 3 items, but 5 are needed"
    more = str(score_report([1, 2, 3, 4, 5], [1, 2, 3, 4, 4], n_bootstrap=20))
    assert more.splitlines()[-1] == "95 % intervals: 20 bootstrap resamples of 5 items, seed 0"


@pytest.mark.parametrize("name", METRICS)
def test_comparison_is_the_difference_of_two_reports(name):
    a, gold = judged(13)
    b = judged(14)[0]
    difference = getattr(compare(a, b, gold, n_bootstrap=10), name).value
    assert difference == pytest.approx(getattr(metrics, name)(a, gold) - getattr(metrics, name)(b, gold), abs=1e-12)


def test_a_judge_does_not_differ_from_itself():
    a, gold = judged(15)
    assert str(compare(a, a, gold).pearson) == "0.000 [no interval]"


def test_pairing_tells_apart_what_two_reports_do_not():
    # b is a plus a little noise: their own intervals overlap almost wholly, their difference is far from 0.
    a, gold = judged(16, n=300)
    b = a + np.random.default_rng(0).normal(0, 0.5, 300)
    of_a, of_b, difference = score_report(a, gold).rmse, score_report(b, gold).rmse, compare(a, b, gold).rmse
    assert of_a.high > of_b.low
    assert difference.high < 0


def test_comparison_uses_the_items_that_both_scored():
    found = compare([1, math.nan, 3, 4, 5], [1, 2, math.nan, 4, 4], [1, 2, 3, 4, 5], n_bootstrap=20)
    assert (found.n, found.failed, found.failed_a, found.failed_b) == (3, 2, 1, 1)
    assert found.mae.value == pytest.approx(-1 / 3)  # a is right on all three, b is off by 1 on the last


def test_comparison_resamples_groups():
    a, gold = judged(17, n=50)
    b = judged(18, n=50)[0]
    four_times = [np.repeat(side, 4) for side in (a, b, gold)]
    alone, grouped = (compare(*four_times, groups=g, n_bootstrap=4000).mae for g in (None, np.repeat(np.arange(50), 4)))
    assert (grouped.high - grouped.low) / (alone.high - alone.low) == pytest.approx(2, rel=0.1)


def test_comparison_names_the_side_that_is_wrong():
    with pytest.raises(ValueError, match=r"2 items .* 3"):
        compare([1, 2, 3], [1, 2], [1, 2, 3])


def test_printed_comparison_names_both_failures():
    text = str(compare([1, 2, 3, 5], [1, 2, math.nan, 4], [1, 2, 3, 4], n_bootstrap=20))
    assert text.splitlines()[0] == "3 of 4 items scored by both; a failed 0, b 1"
    assert text.splitlines()[1].split() == ["metric", "a", "-", "b", "low", "high"]


def table_rows():
    good, constant = (score_report(p, [1, 2, 3, 4, 5], n_bootstrap=200) for p in ([1, 2, 3, 5, 4], [3] * 5))
    return [
        {"judge": "TRACT | stage 2", "report": good, "grid_mass": 0.98765, "seconds": 12},
        {"judge": "constant", "report": constant.to_dict()},
    ]


def test_comparison_table_shows_every_column_and_what_is_not_known():
    lines = comparison_table(table_rows()).splitlines()
    assert "| Pearson [95 %] | Spearman |" in " ".join(lines[0].split())
    cells = [[cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")] for line in lines[2:]]
    assert cells[0][0] == "TRACT / stage 2"
    assert cells[0][1].startswith("0.900 [")
    assert cells[0][2:] == ["0.900", "0.632", "0.988", "0", "12.0"]  # RMSE sqrt(2 / 5)
    assert cells[1] == ["constant", "undefined", "undefined", "1.414", "-", "0", "-"]


def test_comparison_table_is_aligned_markdown():
    lines = comparison_table(table_rows()).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert all(set(cell.strip()) <= set(":-") for cell in lines[1].strip("|").split("|"))
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}


@pytest.mark.parametrize("row", [{"judge": "a"}, {"judge": "a", "report": None, "sceonds": 1}])
def test_comparison_table_refuses_rows_that_it_would_misread(row):
    with pytest.raises(ValueError, match=r"rows\[0\] has the keys"):
        comparison_table([row])


def test_comparison_table_refuses_no_rows():
    with pytest.raises(ValueError, match="rows is empty"):
        comparison_table([])


def test_report_is_what_the_top_level_hands_out():
    import trl_tract

    assert isinstance(trl_tract.score_report([1, 2, 3], [1, 2, 3], n_bootstrap=0), ScoreReport)
