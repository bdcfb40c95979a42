"""Reinforcement on the command line and in a run: behind both stages, or from the seed model on scores alone."""

import json
import random

import pytest
from enumerable import enumerable_model, enumerable_tokenizer

from trl_tract import CoTRAILJudge, run_tract
from trl_tract.cli import main
from trl_tract.files.journal import read_jsonl, write_jsonl
from trl_tract.runs.spec import RunSpec
from trl_tract.runs.step_names import steps_of
from trl_tract.runs.train_steps import RLStep

pytestmark = pytest.mark.usefixtures("without_matplotlib")
TRAINING = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "score_values": [1, 2],
    "score_marker": "#",
}
RL = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": 2}
GENERATION = {"max_new_tokens": 4, "max_attempts": 8}


@pytest.fixture(scope="module")
def seed_model(tmp_path_factory):
    """One that writes its marker now and then."""
    directory = tmp_path_factory.mktemp("seed")
    enumerable_model().float().save_pretrained(directory)
    enumerable_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    rng = random.Random(0)
    rows = []
    for number in range(16):
        prompt = "".join(rng.choices("a12", k=3)) + "a" * number
        rows.append({"prompt": prompt, "completion": f"a # {1 + number % 2}", "score": 1 + (number % 4) / 4})
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(file, rows)
    write_jsonl(file.with_name("scores.jsonl"), [{"prompt": row["prompt"], "score": row["score"]} for row in rows])
    return file


@pytest.fixture(scope="module")
def finished(seed_model, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    settings = {"training": TRAINING, "generation": GENERATION, "rl": RL, "say": lambda line: None}
    return out, run_tract(seed_model, str(rows), out, eval_fraction=0.25, objective="paper", **settings)


def test_a_run_with_reinforcement_reports_on_all_three_judges(finished):
    out, result = finished
    assert list(result.reports) == ["stage one", "TRACT", "REAL"]
    assert result.model == out / "real"
    assert list(json.loads((out / "report.json").read_text())["judges"]) == ["stage one", "TRACT", "REAL"]


def test_reinforcement_starts_from_the_tract_model(finished):
    out, _ = finished
    step = json.loads((out / "rl.json").read_text())
    assert step["model"] == str(out / "tract")
    saved = [json.loads((out / name / "tract_config.json").read_text()) for name in ("tract", "real")]
    assert saved[0] == saved[1]


def test_reinforcement_does_not_go_on_with_other_settings(finished):
    step = json.loads((finished[0] / "rl.json").read_text())
    assert step.pop("kind") == "rl"
    step["training"]["learning_rate"] = 0.5
    with pytest.raises(FileExistsError, match=r"training.learning_rate: 1e-06 there, 0.5 now"):
        RLStep(**step).run()


def test_the_card_of_the_reinforced_judge_has_its_evaluation(finished):
    card = (finished[0] / "real" / "README.md").read_text(encoding="utf-8")
    assert "num_generations" in card
    assert "### Stage one" not in card


def test_the_checkpoint_is_chosen_by_rows_that_were_held_out(finished):
    state = json.loads((finished[0] / "real" / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert state["best_metric"] == min(losses)


def test_rows_with_scores_alone_train_the_seed_model(seed_model, rows, tmp_path):
    scores, out = str(rows.with_name("scores.jsonl")), tmp_path / "out"
    settings = {"training": TRAINING, "generation": GENERATION, "rl": RL, "say": lambda line: None}
    result = run_tract(seed_model, scores, out, eval_fraction=0.25, rationales="none", objective="paper", **settings)
    assert list(result.reports) == ["REAL"]
    assert not (out / "tract").exists()
    assert len(list(read_jsonl(out / "judged-real" / "judgements.jsonl"))) == 4


def test_the_command_trains_a_judge(seed_model, rows, tmp_path, capsys):
    out = tmp_path / "real"
    words = f"--model {seed_model} --data {rows.with_name('scores.jsonl')} --output_dir {out} --score_marker # "
    words += "--score_values 1 2 --num_generations 4 --per_device_train_batch_size 4 --max_completion_length 4 "
    words += "--max_steps 1 --bf16 false --gradient_checkpointing false --report_to none --disable_tqdm true"
    assert main(["rl", *words.split()]) == 0
    assert str(out) in capsys.readouterr().out
    assert CoTRAILJudge.from_pretrained(str(out)).scales[0].marker == "#"


ON_SCORES = {**RL, "score_values": [1, 2], "score_marker": "#", "bf16": False, "report_to": "none"}
DEFAULTS = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 0.2,
    "save_steps": 0.2,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "num_generations_eval": 1,
}


@pytest.mark.parametrize(
    ("given", "besides"),
    [
        ({}, {}),
        ({"save_total_limit": 5, "num_generations_eval": 2, "load_best_model_at_end": False}, {}),
        ({"save_strategy": "epoch"}, {"eval_strategy": "epoch"}),
        ({"save_steps": 500}, {"eval_steps": 500}),
        ({"eval_steps": 3}, {"save_steps": 3}),
        # No checkpoint, no choice between them.
        ({"save_strategy": "no"}, {"load_best_model_at_end": False}),
    ],
)
def test_what_is_given_of_saving_and_evaluation_is_done(given, besides, seed_model, rows, tmp_path):
    data = str(rows.with_name("scores.jsonl"))
    step = RLStep(seed_model, data, str(tmp_path / "real"), training=ON_SCORES | given)
    trainer = step._trainer(step._arguments(), None)
    assert {name: getattr(trainer.args, name) for name in DEFAULTS} == DEFAULTS | given | besides
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (15, 1)


def test_without_an_evaluation_all_rows_are_trained_on(seed_model, rows, tmp_path):
    data, training = str(rows.with_name("scores.jsonl")), {**ON_SCORES, "eval_strategy": "no"}
    step = RLStep(seed_model, data, str(tmp_path / "real"), training=training)
    trainer = step._trainer(step._arguments(), None)
    assert len(trainer.train_dataset) == 16
    assert trainer.eval_dataset is None


def test_the_command_hands_on_what_is_given_and_nothing_else(seed_model, rows, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(RLStep, "run", lambda step: done.append(step.training))
    words = f"--model {seed_model} --data {rows.with_name('scores.jsonl')} --output_dir {tmp_path / 'real'}"
    words += " --score_values 1 2 --score_marker # --save_steps 500 --generation_batch_size 8 --bf16 false"
    assert main(["rl", *words.split()]) == 0
    (training,) = done
    assert training == {
        "output_dir": str(tmp_path / "real"),
        "score_values": [1.0, 2.0],
        "score_marker": "#",
        "save_steps": 500,
        "generation_batch_size": 8,
        "bf16": False,
    }


def test_a_run_names_the_steps_that_it_will_have():
    spec = RunSpec("seed", "rows.jsonl", rl={})
    assert list(steps_of(spec))[-4:] == ["rl", "calibrate-real", "judge-real", "report"]
    assert list(steps_of(RunSpec("seed", "rows.jsonl", rationales="none", rl={}, calibrate=0.0))) == [
        *("prepare", "rl", "judge-real", "report")
    ]


def test_the_reinforced_judge_is_calibrated_like_the_others(seed_model, tmp_path):
    # On items that it was not trained on, and whatever the fit comes to.
    scores, said = str(tmp_path / "scores.jsonl"), []
    write_jsonl(tmp_path / "scores.jsonl", [{"prompt": "a" * n, "score": 1 + n % 2} for n in range(1, 31)])
    settings = {"training": TRAINING, "generation": GENERATION, "rl": RL, "say": said.append}
    settings |= {"eval_fraction": 0.3, "rationales": "none", "objective": "paper", "calibrate": 0.3}
    run_tract(seed_model, scores, tmp_path / "out", **settings)
    counts = {name: len(list(read_jsonl(tmp_path / "out" / f"{name}.jsonl"))) for name in ("train", "calibration")}
    assert counts["calibration"] == len(list(read_jsonl(tmp_path / "out" / "calibration-real" / "judgements.jsonl")))
    assert counts["calibration"] >= 3
    assert any("calibrated" in line.lower() for line in said)
