"""Each metric against scipy, scikit-learn or a hand calculation; what is undefined; the `evaluate.Metric`."""

import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, cohen_kappa_score

from trl_tract.evaluation import metrics
from trl_tract.evaluation.metrics import accuracy, calibration_error, kendall, mae, pearson, qwk, rmse, spearman
from trl_tract.evaluation.pairs import METRICS, JudgedPairs, round_to_grid

CORRELATIONS = [
    (pearson, lambda x, y: stats.pearsonr(x, y).statistic),
    (spearman, lambda x, y: stats.spearmanr(x, y).statistic),
    (kendall, lambda x, y: stats.kendalltau(x, y, variant="b").statistic),
]


def judged(seed, *, n=60, levels=None):
    """Gold scores on 1..5 and predictions that follow them: continuous, or on so many levels."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(1, 6, n).astype(float)
    predicted = gold + rng.normal(0, 1.2, n)
    return (predicted if levels is None else np.clip(np.rint(predicted), 1, levels)), gold


@pytest.mark.parametrize("levels", [None, 2, 5])
@pytest.mark.parametrize(("ours", "theirs"), CORRELATIONS, ids=["pearson", "spearman", "kendall"])
def test_correlations_equal_scipy(ours, theirs, levels):
    for seed in range(30):
        predicted, gold = judged(seed, n=3 + 4 * seed, levels=levels)
        if np.ptp(predicted) and np.ptp(gold):
            assert ours(predicted, gold) == pytest.approx(theirs(predicted, gold), abs=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), CORRELATIONS, ids=["pearson", "spearman", "kendall"])
def test_correlations_equal_scipy_where_both_sides_are_continuous(ours, theirs):
    rng = np.random.default_rng(0)
    for n in (3, 4, 17, 500):
        x, y = rng.normal(size=n), rng.normal(size=n)
        assert ours(x, y) == pytest.approx(theirs(x, y), abs=1e-12)


def test_pearson_keeps_its_digits_far_from_zero():
    # 1e8 + (1, 2, 4) against (1, 3, 4): adding a constant changes nothing; r = 13 / 14.
    assert pearson([1e8 + 1, 1e8 + 2, 1e8 + 4], [1, 3, 4]) == pytest.approx(13 / 14, abs=1e-7)


def test_rmse_by_hand():
    # Errors 0, -1, 2: sqrt((0 + 1 + 4) / 3).
    assert rmse([1, 2, 5], [1, 3, 3]) == pytest.approx(math.sqrt(5 / 3))


def test_mae_by_hand():
    # Errors 0, -1, 2.5: 3.5 / 3.
    assert mae([1, 2, 5.5], [1, 3, 3]) == pytest.approx(3.5 / 3)


def test_qwk_equals_scikit_learn_on_a_grid_of_integers():
    for seed in range(30):
        predicted, gold = judged(seed)
        grid = [1, 2, 3, 4, 5]
        ours = qwk(predicted, gold, grid=grid)
        nearest = round_to_grid(predicted, grid).astype(int)
        assert ours == pytest.approx(
            cohen_kappa_score(nearest, gold.astype(int), labels=grid, weights="quadratic"), abs=1e-12
        )


def test_qwk_without_a_grid_equals_scikit_learn_on_the_spanning_integers():
    predicted, gold = judged(7)
    nearest = np.floor(predicted + 0.5).astype(int)
    labels = list(range(min(nearest.min(), 1), max(nearest.max(), 5) + 1))
    theirs = cohen_kappa_score(nearest, gold.astype(int), labels=labels, weights="quadratic")
    assert qwk(predicted, gold) == pytest.approx(theirs, abs=1e-12)


def test_qwk_measures_disagreement_in_rubric_units():
    # Grid 0, 1, 10. Rounded pairs (0,0) (10,1) (1,1): observed (0 + 81 + 0) / 3 = 27. By chance, the mean of (i - j)^2
    # over i in (0, 10, 1), j in (0, 1, 1): (0+1+1 + 100+81+81 + 1+0+0) / 9 = 265 / 9. kappa = 1 - 27 * 9 / 265.
    assert qwk([0, 8, 1.2], [0, 1, 1], grid=[0, 1, 10]) == pytest.approx(1 - 243 / 265)


def test_qwk_does_not_change_with_unused_grid_points():
    predicted, gold = judged(3)
    assert qwk(predicted.clip(1, 5), gold, grid=[1, 2, 3, 4, 5]) == qwk(predicted.clip(1, 5), gold, grid=range(-9, 20))


def test_qwk_of_a_constant_prediction_is_zero_as_in_scikit_learn():
    # The prediction is as far from the gold scores as chance would put it.
    assert qwk([3, 3, 3, 3], [1, 2, 3, 5]) == pytest.approx(0, abs=1e-12)
    assert cohen_kappa_score([3, 3, 3, 3], [1, 2, 3, 5], weights="quadratic") == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", [3.0, 0.1, 1 / 3])
def test_qwk_is_undefined_where_both_sides_are_one_value(value):
    assert math.isnan(qwk([value] * 7, [value] * 7, grid=[0.1, 1 / 3, 0.7, 3.0]))


def test_accuracy_equals_scikit_learn_after_rounding():
    predicted, gold = judged(5)
    nearest = np.floor(predicted + 0.5).astype(int)
    assert accuracy(predicted, gold) == pytest.approx(accuracy_score(gold.astype(int), nearest))


def test_accuracy_rounds_references_too():
    # Gold 3.33 (a mean of three annotators) is 3 on the grid, 3.67 is 4.
    assert accuracy([3.2, 3.2], [10 / 3, 11 / 3]) == 0.5


def test_rounding_takes_the_nearest_grid_value():
    # Between 2.5 and 10 the border is 6.25; beyond the ends there is only the end.
    np.testing.assert_array_equal(round_to_grid([-4, 6.2, 6.3, 99], [10, 2.5, 0]), [0, 2.5, 10, 10])


@pytest.mark.parametrize("grid", [None, [1, 2, 3, 4, 5]])
def test_rounding_goes_up_from_halfway(grid):
    np.testing.assert_array_equal(round_to_grid([1.5, 2.5, 3.5, 2.4999999], grid), [2, 3, 4, 2])


def test_calibration_error_by_hand():
    # Bin 2 (predictions 1.8, 2.2): means 2.0 and 2.5, so 0.5 for 2 of 3 items; bin 4: 4.0 and 3.0, so 1 for 1 of 3.
    assert calibration_error([1.8, 2.2, 4.0], [2, 3, 3]) == pytest.approx((2 * 0.5 + 1 * 1.0) / 3)


def test_calibration_error_lets_errors_in_one_bin_cancel_but_not_across_bins():
    assert calibration_error([2, 2], [1, 3]) == 0
    assert calibration_error([1, 2], [2, 1]) == 1


@pytest.mark.parametrize("function", [pearson, spearman, kendall])
@pytest.mark.parametrize("constant", [3.0, 0.1, 1e-300])
def test_correlation_with_a_constant_is_undefined(function, constant):
    # 0.1 seven times has a variance of 1e-34 in floating point, and still none.
    varied = [1, 2, 3, 4, 5, 5, 4]
    assert math.isnan(function([constant] * 7, varied))
    assert math.isnan(function(varied, [constant] * 7))


@pytest.mark.parametrize("function", [pearson, spearman, kendall])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_correlation_of_fewer_than_three_items_is_undefined(function, n):
    assert math.isnan(function([1, 2][:n], [4, 5][:n]))


@pytest.mark.parametrize("function", [rmse, mae, qwk, accuracy, calibration_error])
def test_no_items_give_no_number(function):
    assert math.isnan(function([], []))


@pytest.mark.parametrize("function", [pearson, spearman, kendall, rmse, mae, qwk, accuracy, calibration_error])
@pytest.mark.parametrize("missing", [math.nan, None, math.inf])
def test_a_missing_prediction_makes_a_function_undefined(function, missing):
    assert math.isnan(function([1, 2, missing, 4], [1, 2, 3, 5]))


@pytest.mark.parametrize("function", [pearson, spearman, kendall, rmse, mae, qwk, accuracy, calibration_error])
def test_unequal_lengths_are_refused(function):
    with pytest.raises(ValueError, match=r"3 items .* 2"):
        function([1, 2, 3], [1, 2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_gold_score_that_is_not_finite_is_refused_by_position(bad):
    with pytest.raises(ValueError, match=r"1 of 3 .*references\[1\]"):
        mae([1, 2, 3], [1, bad, 3])


def test_what_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="predictions"):
        mae(["good"], [1])


def test_columns_are_refused():
    with pytest.raises(ValueError, match=r"predictions has shape \(2, 1\)"):
        mae([[1], [2]], [1, 2])


@pytest.mark.parametrize("grid", [[], [1, math.nan]])
def test_an_unusable_grid_is_refused(grid):
    with pytest.raises(ValueError, match=r"grid is \["):
        qwk([1, 2, 3], [1, 2, 3], grid=grid)


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("name", METRICS)
def test_counts_mean_repetition(name, levels):
    # A row of counts gives what the function gives on the items written out that often.
    predicted, gold = judged(11, n=40, levels=levels)
    counts = np.random.default_rng(1).integers(0, 4, (20, 40)).astype(float)
    weighted = JudgedPairs(predicted, gold)(counts)[name]
    written_out = [np.repeat(np.arange(40), row.astype(int)) for row in counts]
    expected = [getattr(metrics, name)(predicted[items], gold[items]) for items in written_out]
    np.testing.assert_allclose(weighted, expected, rtol=0, atol=1e-12)


def test_a_resample_without_variation_is_undefined_and_its_neighbours_are_not():
    # The second row draws items 0 and 1 alone, whose predictions are equal.
    found = JudgedPairs(np.array([2.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))(np.array([[1.0, 1, 1], [2, 1, 0]]))
    assert [np.isnan(found[name]).tolist() for name in ("pearson", "spearman", "kendall")] == [[False, True]] * 3


def test_floating_point_noise_is_no_variation():
    # Items 0 and 1 alone: predictions 0.1 and 0.1, whose weighted variance comes out as 1e-17 for some of the counts.
    times = np.arange(1.0, 60.0)
    found = JudgedPairs(np.array([0.1, 0.1, 0.7]), np.array([1.0, 2.0, 3.0]))(np.outer(times, [2, 1, 0]))
    assert np.isnan([found[name] for name in ("pearson", "spearman", "kendall")]).all()


def test_floating_point_noise_is_no_disagreement_by_chance():
    # Item 1 alone: both sides 0.7, so kappa is 0 / 0 however often it is drawn.
    times = np.arange(1.0, 60.0)
    found = JudgedPairs(np.array([0.1, 0.7]), np.array([0.1, 0.7]), [0.1, 0.4, 0.7])(np.outer(times, [0, 1]))
    assert np.isnan(found["qwk"]).all()


@pytest.fixture
def score_metric(tmp_path):
    pytest.importorskip("evaluate")
    return metrics.ScoreMetric(cache_dir=str(tmp_path))


def test_evaluate_metric_equals_the_functions(score_metric):
    predicted, gold = judged(2)
    found = score_metric.compute(predictions=predicted, references=gold)
    functions = [pearson, spearman, kendall, rmse, mae, qwk, accuracy, calibration_error]
    assert found == {f.__name__: f(predicted, gold) for f in functions} | {"n": 60, "failed": 0}


def test_evaluate_metric_counts_failures_and_keeps_them_out(score_metric):
    found = score_metric.compute(predictions=[1, math.nan, 3, 5], references=[1, 5, 3, 4])
    assert (found["n"], found["failed"], found["mae"]) == (3, 1, pytest.approx(1 / 3))


def test_evaluate_metric_hands_the_grid_on(score_metric):
    predicted, gold = judged(4)
    found = score_metric.compute(predictions=predicted, references=gold, grid=[1, 3, 5])
    assert found["qwk"] == qwk(predicted, gold, grid=[1, 3, 5]) != qwk(predicted, gold)


def test_evaluate_metric_adds_up_batches(score_metric):
    predicted, gold = judged(6)
    for half in (slice(0, 30), slice(30, 60)):
        score_metric.add_batch(predictions=predicted[half], references=gold[half])
    assert score_metric.compute()["spearman"] == spearman(predicted, gold)


def test_evaluate_metric_is_made_and_computed_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("evaluate")

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # Made anew, not taken from the cache, which must go on holding the class that other modules have imported.
    metric = metrics._score_metric_class.__wrapped__()(cache_dir=str(tmp_path))
    assert metric.compute(predictions=[1, 2, 4], references=[1, 2, 3])["mae"] == pytest.approx(1 / 3)


@pytest.mark.slow
@pytest.mark.process
def test_evaluate_metric_is_imported_without_a_network(tmp_path):
    pytest.importorskip("evaluate")
    program = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from trl_tract.evaluation.metrics import ScoreMetric\n"
        f"metric = ScoreMetric(cache_dir={str(tmp_path)!r})\n"
        "print(metric.compute(predictions=[1, 2, 4], references=[1, 2, 3])['mae'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("0.333"), done.stderr


@pytest.mark.slow
@pytest.mark.process
def test_evaluate_loads_the_metric_from_its_file_without_a_network(tmp_path):
    pytest.importorskip("evaluate")
    program = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import evaluate, trl_tract.evaluation.evaluate_metric\n"
        f"metric = evaluate.load(trl_tract.evaluation.evaluate_metric.__file__, cache_dir={str(tmp_path)!r})\n"
        "metric.add_batch(predictions=[1, 2], references=[1, 2])\n"
        "metric.add_batch(predictions=[float('nan'), 4], references=[5, 3])\n"
        "found = metric.compute(grid=[1, 2, 3, 4, 5])\n"
        "print(found['mae'], found['n'], found['failed'])\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == [str(1 / 3), "3", "1"], done.stderr


def test_evaluate_finds_one_metric_in_the_file(score_metric):
    from evaluate import loading

    assert isinstance(score_metric, loading.import_main_class("trl_tract.evaluation.evaluate_metric"))


def test_a_missing_evaluate_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r'pip install "trl-tract\[metric\]"'):
        metrics._score_metric_class.__wrapped__()  # not from the cache, which other tests have filled


@pytest.mark.process
def test_importing_metrics_imports_nothing_heavy():
    heavy = ["torch", "transformers", "datasets", "evaluate", "scipy", "sklearn", "matplotlib"]
    program = (
        "import sys, trl_tract.evaluation.metrics, trl_tract.evaluation.report\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_kappa_of_minus_one_is_not_below_it():
    # 1 - 1.6 / 0.8 is -1.0000000000000004 in floating point, which has no Fisher's z.
    assert qwk([0, 1, 1, 1, 2], [2, 1, 1, 1, 0]) == -1
