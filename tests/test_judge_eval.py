"""Judging held-out items in training: what is logged is what the finished judge says, and training does not notice."""

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ASPECTS, PLAIN, make_aspect_rows, make_model, make_rows, make_tokenizer, make_trainer, save_seed
from datasets import Dataset
from peft import LoraConfig
from transformers import EarlyStoppingCallback

from trl_tract import CoTRAILJudge, JudgeEvalCallback, TRACTTrainer, score_report
from trl_tract.runs.train_steps import TrainStep
from trl_tract.scale.scale import read_scales

ROWS = make_rows(12)
HELD_OUT = make_rows(6, seed=1)
# A random model hardly ever writes the marker.
JUDGING: dict[str, Any] = {"max_new_tokens": 6, "append_marker": True}
# Dropout and the order of the rows take random numbers from the process; the model moves.
TRAINED: dict[str, Any] = {
    "max_steps": 3,
    "learning_rate": 0.1,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
}
NAMES = {f"eval_judge/{name}" for name in ("rmse", "mae", "pearson", "spread", "grid_mass", "failed")}


def test_a_row_that_cannot_be_judged_is_named_by_its_place_in_the_evaluation_set():
    rows = [*HELD_OUT[:3], {**HELD_OUT[3], "score": "n/a"}, *HELD_OUT[4:]]
    trainer = SimpleNamespace(scales=read_scales({}), args=SimpleNamespace(invalid_rows="raise"))
    with pytest.raises(ValueError, match="row 3 cannot be judged"):
        JudgeEvalCallback(num_items=2)._part_of(rows, trainer, "eval")


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer_with(directory: Path, *callbacks: Any, rows: Any = ROWS, held_out: Any = HELD_OUT, **settings: Any) -> Any:
    extra = {"callbacks": list(callbacks), "peft_config": lora()}
    return make_trainer(directory, rows, eval_dataset=held_out, extra=extra, **{**TRAINED, **settings})


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def judged_by_the_saved_one(directory: Path, rows: list[dict[str, Any]], **settings: Any) -> dict[str, float]:
    judge = CoTRAILJudge.from_pretrained(directory, **settings)
    judgements = judge.judge([{"prompt": row["prompt"]} for row in rows])
    report = score_report([each.score for each in judgements], [row["score"] for row in rows], n_bootstrap=0)
    assert report.standing is not None
    return {
        "eval_judge/rmse": report.rmse.value,
        "eval_judge/mae": report.mae.value,
        "eval_judge/pearson": report.pearson.value,
        "eval_judge/spread": report.spread,
        "eval_judge/grid_mass": float(np.mean([each.grid_mass for each in judgements])),
        "eval_judge/failed": report.failed / len(rows),
    }


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_what_is_logged_is_what_the_saved_judge_says(tmp_path, chat):
    rows, held_out = make_rows(12, chat=chat), make_rows(6, seed=1, chat=chat)
    trainer = trainer_with(
        tmp_path, JudgeEvalCallback(**JUDGING), rows=rows, held_out=held_out, gradient_checkpointing=True
    )
    trainer.train()
    trainer.save_model()
    make_tokenizer().save_pretrained(tmp_path)
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    adapter = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    adapter["base_model_name_or_path"] = str(base)
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    wanted = judged_by_the_saved_one(tmp_path, held_out, **JUDGING)
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert {name: last[name] for name in NAMES} == pytest.approx(wanted, rel=1e-4)


def test_training_is_the_same_with_and_without(tmp_path):
    weights = []
    for callbacks in ([], [JudgeEvalCallback(**JUDGING)]):
        trainer = trainer_with(tmp_path / str(len(weights)), *callbacks, gradient_checkpointing=True)
        trainer.train()
        weights.append({name: weight.detach().clone() for name, weight in trainer.model.named_parameters()})
    assert len(logged(trainer, "eval_judge/rmse")) == 3
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_training_that_goes_on_judges_as_one_that_was_not_interrupted(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_with(tmp_path / "whole", JudgeEvalCallback(**JUDGING), **saving)
    whole.train()
    trainer_with(tmp_path / "cut", JudgeEvalCallback(**JUDGING), **{**saving, "max_steps": 3}).train()
    again = trainer_with(tmp_path / "cut", JudgeEvalCallback(**JUDGING), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert logged(again, "eval_judge/rmse") == logged(whole, "eval_judge/rmse")


def test_the_best_checkpoint_is_the_one_with_the_lowest_rmse_of_its_own_rationales(tmp_path):
    trainer = trainer_with(
        tmp_path,
        JudgeEvalCallback(**JUDGING),
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_judge/rmse",
        learning_rate=1.0,
    )
    trainer.train()
    values = logged(trainer, "eval_judge/rmse")
    assert len(set(values)) == 3
    assert trainer.state.best_metric == min(values)
    assert trainer.evaluate()["eval_judge/rmse"] == pytest.approx(min(values), rel=1e-5)


def test_training_stops_early_where_the_judge_gets_no_better(tmp_path):
    trainer = trainer_with(
        tmp_path,
        EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=100.0),
        JudgeEvalCallback(**JUDGING),
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_judge/rmse",
        max_steps=9,
    )
    trainer.train()
    assert trainer.state.global_step == 3


def test_the_fields_of_the_configuration_do_the_same(tmp_path):
    by_callback = trainer_with(tmp_path / "a", JudgeEvalCallback(num_items=4, **JUDGING)).evaluate()
    by_fields = trainer_with(tmp_path / "b", judge_eval_items=4, judge_eval_settings=json.dumps(JUDGING)).evaluate()
    assert {name: by_fields[name] for name in NAMES} == {name: by_callback[name] for name in NAMES}


def test_where_many_items_have_no_score_there_is_no_rmse(tmp_path):
    found = trainer_with(tmp_path, JudgeEvalCallback(max_new_tokens=2, max_attempts=1)).evaluate()
    assert found["eval_judge/failed"] == 1
    assert math.isnan(found["eval_judge/rmse"])


def test_it_is_said_where_no_evaluation_made_a_best_checkpoint(tmp_path, caplog):
    best = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    metric = {"metric_for_best_model": "judge/rmse", "max_steps": 1}
    judging = JudgeEvalCallback(max_new_tokens=2, max_attempts=1)
    with caplog.at_level(logging.WARNING, logger="trl_tract"):
        trainer_with(tmp_path, judging, **best, **metric).train()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("trl_tract.training.judge_")]
    assert [line.split()[:3] for line in said[-2:]] == [["6", "of", "6"], ["judge/rmse", "was", "NaN"]]


@pytest.mark.parametrize("metric", ["judge/rmse", "eval_judge/mae"])
def test_a_best_checkpoint_by_judging_needs_items_to_judge(tmp_path, metric):
    with pytest.raises(ValueError, match="judge_eval_items"):
        trainer_with(tmp_path, metric_for_best_model=metric).train()


def test_each_aspect_has_its_own_figures(tmp_path):
    rows = make_aspect_rows(6)
    trainer = trainer_with(tmp_path, JudgeEvalCallback(**JUDGING), rows=rows, held_out=rows, aspects=ASPECTS)
    found = trainer.evaluate()
    wanted = {f"{name}/{aspect}" for name in NAMES for aspect in ASPECTS}
    assert {name for name in found if name.startswith("eval_judge/")} == wanted


def test_a_judge_without_rationales_is_asked_for_its_scores_at_once(tmp_path):
    trainer = trainer_with(tmp_path, JudgeEvalCallback(), drop_rationale=True)
    found = trainer.evaluate()
    assert found["eval_judge/failed"] == 0
    # No rationale stands between prompt and score on either side.
    assert found["eval_judge/rmse"] == pytest.approx(found["eval_score/rmse"], rel=1e-5)


def test_each_of_several_evaluation_sets_is_judged_under_its_name(tmp_path):
    held_out = {"one": Dataset.from_list(HELD_OUT), "two": Dataset.from_list(make_rows(5, seed=2))}
    found = trainer_with(tmp_path, JudgeEvalCallback(**JUDGING), held_out=held_out).evaluate()
    assert found["eval_one_judge/rmse"] != found["eval_two_judge/rmse"]


def test_a_callback_that_is_added_later_judges_too(tmp_path):
    given = trainer_with(tmp_path / "a", JudgeEvalCallback(**JUDGING)).evaluate()
    trainer = trainer_with(tmp_path / "b")
    trainer.add_callback(JudgeEvalCallback(**JUDGING))
    assert trainer.evaluate()["eval_judge/rmse"] == given["eval_judge/rmse"]


def test_predictions_are_not_judged(tmp_path):
    trainer = trainer_with(tmp_path, JudgeEvalCallback(**JUDGING))
    trainer.evaluate()
    assert not [name for name in trainer.predict(Dataset.from_list(HELD_OUT)).metrics if "judge/" in name]


def test_items_of_its_own_need_no_rationales(tmp_path):
    items = [{"prompt": row["prompt"], "score": row["score"]} for row in HELD_OUT]
    of_items = trainer_with(tmp_path / "a", JudgeEvalCallback(items, **JUDGING), held_out=ROWS).evaluate()
    of_rows = trainer_with(tmp_path / "b", JudgeEvalCallback(**JUDGING)).evaluate()
    assert of_items["eval_judge/rmse"] == of_rows["eval_judge/rmse"]


def test_rows_that_are_dropped_are_not_judged(tmp_path):
    broken = [*HELD_OUT[:3], {**HELD_OUT[3], "score": 9.0}]
    found = trainer_with(tmp_path / "a", JudgeEvalCallback(**JUDGING), held_out=broken, invalid_rows="drop").evaluate()
    of_three = trainer_with(tmp_path / "b", JudgeEvalCallback(**JUDGING), held_out=HELD_OUT[:3]).evaluate()
    assert found["eval_judge/rmse"] == of_three["eval_judge/rmse"]


def evaluation_on_a_rank(directory: Path) -> dict[str, float]:
    callback = JudgeEvalCallback(**JUDGING)
    found: dict[str, float] = make_trainer(
        directory, ROWS, eval_dataset=HELD_OUT[:5], extra={"callbacks": [callback]}
    ).evaluate()
    return {name: found[name] for name in NAMES}


@pytest.mark.process
def test_two_ranks_judge_like_one(tmp_path, two_ranks):
    wanted = evaluation_on_a_rank(tmp_path / "alone")
    for found in two_ranks(evaluation_on_a_rank, tmp_path / "ranks"):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_a_step_trains_on_none_of_the_rows_that_it_judges(tmp_path, monkeypatch):
    # Two rows of each group, with prompts of their own.
    rows = [{**row, "group": str(number // 2)} for number, row in enumerate(ROWS)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_seed(tmp_path / "seed")
    group = {row["prompt"]: row["group"] for row in rows}
    parts: list[list[str]] = []

    class Seen(TRACTTrainer):
        def __init__(self, *args: Any, **given: Any) -> None:
            parts.extend([group[row["prompt"]] for row in given[name]] for name in ("train_dataset", "eval_dataset"))
            super().__init__(*args, **given)

    monkeypatch.setattr("trl_tract.runs.train_steps.TRACTTrainer", Seen)
    training = {**PLAIN, **TRAINED, "max_steps": 1, "judge_eval_items": 3, "judge_eval_settings": JUDGING}
    TrainStep(str(tmp_path / "seed"), str(file), str(tmp_path / "out"), training=training).run()
    trained, judged = parts
    assert (len(trained), len(judged)) == (8, 4)
    assert not set(trained) & set(judged)
    assert "- Rows: 8\n" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [entry for entry in history if "eval_judge/rmse" in entry]
