"""Each thing that goes wrong early is said once, with its likely cause, and a healthy run says nothing."""

import logging

import pytest
from conftest import make_rows, make_trainer

from trl_tract import TRACTConfig
from trl_tract.training.early_warnings import EarlyWarnings

HEALTHY = {"score/grid_mass": 0.9, "score/expected": 3.0, "spread/expected": 0.8, "spread/gold": 1.4}


def watch(**settings) -> EarlyWarnings:
    return EarlyWarnings(TRACTConfig("out", use_cpu=True, bf16=False, **settings))


def said_over(steps: range, means: dict[str, float], **settings) -> list[str]:
    warnings = watch(**settings)
    return [message for step in steps for message in warnings.after_log(means, step)]


def test_a_healthy_run_says_nothing():
    assert not watch(learning_rate=1e-3).at_start()
    assert not said_over(range(0, 500, 10), HEALTHY)


def test_a_learning_rate_over_a_hundred_times_the_recipes_is_said():
    warnings = watch(learning_rate=2e-3)
    (message,) = warnings.at_start()
    assert "learning_rate=0.002 is 200 times the 1e-05" in message
    assert not warnings.at_start()  # once


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({}, "learning rate is too low"),
        ({"normalize_grid": True}, "normalize_grid=True does not train the mass"),
        ({"raft_weight": 0.0}, "nothing trains the score"),
    ],
)
def test_no_mass_on_the_grid_is_said_once_with_its_cause(settings, cause):
    (message,) = said_over(range(0, 100, 10), {**HEALTHY, "score/grid_mass": 0.004}, **settings)
    assert "after 20 steps only 4.0e-03 of the probability" in message
    assert cause in message


def test_an_expected_score_that_never_moves_is_said_after_three_log_entries():
    still = {**HEALTHY, "score/expected": 1.0, "spread/expected": 0.01}
    (message,) = said_over(range(0, 100, 10), still)
    assert "after 40 steps the expected score is 1.00 for every row" in message  # entries at 20, 30 and 40
    assert "score_in_ce=True" in message


def test_rows_that_all_have_the_same_gold_score_are_no_reason_to_warn():
    assert not said_over(range(0, 100, 10), {**HEALTHY, "spread/expected": 0.01, "spread/gold": 0.0})


def test_one_entry_of_like_scores_is_no_reason_to_warn():
    warnings = watch()
    still = {**HEALTHY, "spread/expected": 0.01}
    entries = [still, still, HEALTHY, still, still]
    assert not [message for step, means in enumerate(entries) for message in warnings.after_log(means, 20 + step)]


def test_a_collapsed_run_is_said_by_the_trainer(tmp_path, caplog, monkeypatch):
    # All weights start at 0 and stay there: the same distribution for every row, and 5 of 384 tokens' mass.
    from conftest import make_model

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("trl_tract"), "propagate", True)
    model = make_model()
    for parameter in model.parameters():
        parameter.data.zero_()
    trainer = make_trainer(
        tmp_path, make_rows(8), model=model, max_steps=24, learning_rate=0.0, logging_strategy="steps", logging_steps=1
    )
    trainer.train()
    said = [record.getMessage() for record in caplog.records if "trl_tract" in record.name]
    assert sum("the expected score is 0.20 for every row" in message for message in said) == 0  # 0.0391
    assert sum("the expected score is 0.04 for every row" in message for message in said) == 1
