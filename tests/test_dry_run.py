"""A dry run counts what Trainer would do, says how it estimates, shows rows, and leaves nothing behind."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_rows, make_trainer, save_seed
from test_aspects import ASPECTS
from test_aspects import make_rows as aspect_rows

from trl_tract.cli import main
from trl_tract.commands.dry_run import Plan
from trl_tract.files.journal import read_json, read_jsonl, write_json, write_jsonl
from trl_tract.runs.spec import too_few_groups
from trl_tract.runs.train_steps import TrainStep


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_seed(tmp_path_factory.mktemp("model"), weights=False)


def run_of(tmp_path, model, *options):
    paths = ["--data", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    return ["run", "--model_name_or_path", model, *paths, "--bf16", "false", *options]


PAPER = ["--objective", "paper"]


def begin(tmp_path, model, seconds):
    """A directory of a real run, which cannot train since the model has no weights, with these steps finished."""
    write_jsonl(tmp_path / "rows.jsonl", make_rows(12))
    assert main(run_of(tmp_path, model, *PAPER)) == 1
    write_json(tmp_path / "out" / "steps.json", seconds)


def dry(tmp_path, model, rows, capsys, *options, command="run"):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    paper = [] if command == "train" or "--objective" in options else PAPER
    code = main([command, *run_of(tmp_path, model, "--dry-run", *paper, *options)[1:]])
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 4, "num_train_epochs": 3},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 2},
        {"per_device_train_batch_size": 3, "num_train_epochs": 0.5},
        {"per_device_train_batch_size": 4, "max_steps": 5},
    ],
)
def test_updates_are_those_that_trainer_does(settings, tmp_path):
    trainer = make_trainer(tmp_path, make_rows(7), **{**settings, "learning_rate": 0.0})
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    trainer.train()
    assert Plan.of(lengths, trainer.args.to_dict(), 1).updates == trainer.state.global_step


def test_tokens_of_an_update_are_counted():
    plan = Plan.of([10, 20, 30, 40], {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, 1)
    # Two rows of 25 tokens in the mean, or of 40 each.
    assert (plan.rows_per_update, plan.mean_tokens, plan.most_tokens) == (2, 50, 80)
    assert (plan.batch_rows, plan.longest) == (1, 40)


def test_processes_share_the_updates():
    lengths = [10] * 32
    assert [Plan.of(lengths, {"num_train_epochs": 1}, processes).updates for processes in (1, 2, 4)] == [4, 2, 1]


def test_a_dry_run_prints_the_steps_and_writes_nothing(tmp_path, model, capsys):
    code, printed = dry(tmp_path, model, make_rows(12), capsys)
    assert code == 0
    assert re.findall(r"^\[(\d)/7\] (\w+)", printed, re.MULTILINE)[0] == ("1", "Reading")
    assert "11 rows to train on, 1 held-out items" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("fraction", "few"), [("0.1", True), ("0.5", False)])
def test_a_dry_run_says_where_too_few_groups_are_held_out(tmp_path, model, capsys, fraction, few):
    printed = dry(tmp_path, model, make_rows(12), capsys, "--eval_fraction", fraction)[1]
    assert ("Too few held-out groups to tell how good the judge is" in printed) == few


def test_as_many_groups_are_held_out_as_intervals_need(tmp_path, model, capsys):
    # A tenth of 15 are 2, and five are no more than a third.
    assert "10 rows to train on, 5 held-out items in 5 groups" in dry(tmp_path, model, make_rows(15), capsys)[1]


@pytest.mark.parametrize("others", range(4, 40))
def test_the_fraction_that_is_named_holds_out_enough(others):
    (fraction,) = re.findall(r"eval_fraction to ([\d.]+)", too_few_groups(2, others))
    assert round((2 + others) * float(fraction)) >= 5


def test_a_dry_run_leaves_the_calibration_out_that_a_run_leaves_out(tmp_path, model, capsys):
    printed = dry(tmp_path, model, make_rows(15), capsys, "--objective", "auto")[1]
    assert len(re.findall(r"\] Judging the items set aside.*: left out$", printed, re.MULTILINE)) == 2


def test_a_command_names_a_setting_as_its_option(tmp_path, model, capsys):
    write_jsonl(tmp_path / "rows.jsonl", [*make_rows(12), {"prompt": "ask", "completion": "no score", "score": 9.0}])
    assert main(run_of(tmp_path, model, *PAPER)) == 1
    assert "--invalid_rows drop" in capsys.readouterr().err


def test_a_dry_run_without_rationales_has_the_steps_of_such_a_run(tmp_path, model, capsys):
    code, printed = dry(tmp_path, model, make_rows(12), capsys, "--drop_rationale", "true")
    assert code == 0
    assert re.findall(r"^\[(\d/\d)\] (\w+)", printed, re.MULTILINE) == [
        ("1/4", "Reading"), ("2/4", "Training"), ("3/4", "Judging"), ("4/4", "Writing"),
    ]  # fmt: skip
    assert "11 rationales" not in printed


def test_a_dry_run_of_reinforcement_alone_shows_no_settings_of_stages_that_it_lacks(tmp_path, model, capsys):
    options = ["--objective", "auto", "--rl", "true", "--rationales", "none", "--max_length", "9"]
    code, printed = dry(tmp_path, model, make_rows(15), capsys, *options, "--score_values", "0..100")
    assert code == 0
    assert "Reinforcement learning" in printed
    assert "10 rows to train on" in printed
    for of_a_stage in ("Settings derived", "learning_rate", "terms of the loss", "cross-entropy", "would print"):
        assert of_a_stage not in printed


def test_stage_two_has_annotated_rationales_as_well_where_they_are_kept(tmp_path, model, capsys):
    options = ["--num_generations", "2", "--keep_annotated", "true", "--per_device_train_batch_size", "1"]
    printed = dry(tmp_path, model, make_rows(12), capsys, *options, "--num_train_epochs", "1")[1]
    # 11 rows; in stage two, each with its own rationale and two that are written for it.
    assert re.findall(r"(\d+) updates of 1 rows", printed) == ["11", "33"]


JUDGED = ["--judge_eval_items", "20", "--eval_strategy", "epoch", "--per_device_train_batch_size", "1"]


@pytest.fixture
def trained_on(monkeypatch):
    """The rows that each training is given, instead of the training."""
    found = []

    def look(step):
        found.append((step, len(step._trainer(step._arguments(), None).train_dataset)))

    monkeypatch.setattr(TrainStep, "run", look)
    return found


def grouped_rows(groups):
    return [{**row, "group": str(number % groups)} for number, row in enumerate(make_rows(60))]


def test_rows_that_a_run_judges_in_training_are_not_counted_as_trained_on(tmp_path, seed_model, capsys, trained_on):
    options = [*JUDGED, "--calibrate", "0", "--num_generations", "2", "--keep_annotated", "true", "--objective", "auto"]
    options += ["--gradient_accumulation_steps", "1", "--learning_rate", "1e-4", "--report_to", "none"]
    printed = dry(tmp_path, seed_model, grouped_rows(15), capsys, *options, "--num_train_epochs", "1")[1]
    main(run_of(tmp_path, seed_model, *options, "--num_train_epochs", "1"))
    ((step, count),) = trained_on  # there is no model to go on with
    assert f"{count} rows to train on, 20 to judge during training" in printed
    assert f"Settings derived for {count} rows of" in printed
    assert read_json(tmp_path / "out" / "recipe.json")["facts"]["rows"] == count
    three_each = [row for row in read_jsonl(Path(step.train_data)) for _ in range(3)]
    write_jsonl(tmp_path / "three.jsonl", three_each)
    replace(step, train_data=str(tmp_path / "three.jsonl"), output_dir=str(tmp_path / "two")).run()
    assert [int(updates) for updates in re.findall(r"(\d+) updates of 1 rows", printed)] == [
        rows for _, rows in trained_on
    ]


@pytest.mark.parametrize("evaluated", [False, True])
def test_rows_that_are_judged_while_one_stage_trains_are_counted(tmp_path, seed_model, capsys, trained_on, evaluated):
    options = [*JUDGED, "--num_train_epochs", "1", "--report_to", "none"]
    if evaluated:  # they are judged instead
        write_jsonl(tmp_path / "eval.jsonl", make_rows(25, seed=1))
        options += ["--eval_data", str(tmp_path / "eval.jsonl")]
    printed = dry(tmp_path, seed_model, grouped_rows(15), capsys, *options, command="train")[1]
    assert main(["train", *run_of(tmp_path, seed_model, *options)[1:]]) == 0
    ((_, count),) = trained_on
    assert count == (60 if evaluated else 40)
    assert f"{count} rows to train on" in printed
    assert f"{count} updates of 1 rows" in printed


def test_a_dry_run_says_what_is_finished(tmp_path, model, capsys):
    begin(tmp_path, model, {"prepare": 3.0, "stage1": 61.0})
    printed = dry(tmp_path, model, make_rows(12), capsys)[1]
    assert "[2/7] Stage one: the seed model on the annotated rationales: finished before, in 61 s" in printed
    assert "Self-generation: the stage-one model writes its own rationales\n    11 rationales" in printed
    assert json.loads((tmp_path / "out" / "steps.json").read_text()) == {"prepare": 3.0, "stage1": 61.0}


def test_a_dry_run_says_that_a_directory_would_be_refused(tmp_path, model, capsys):
    begin(tmp_path, model, {"prepare": 3.0, "stage1": 61.0})
    assert main(run_of(tmp_path, model, *PAPER, "--dry-run", "--on_failure", "drop")) == 1
    assert "would be refused: " in (printed := capsys.readouterr().err)
    assert "holds another run (on_failure: 'keep_gold' there, 'drop' now)" in printed


def test_five_rows_are_shown_with_their_terms_of_the_loss(tmp_path, model, capsys):
    printed = dry(tmp_path, model, make_rows(12), capsys, command="train")[1]
    assert len(re.findall(r"^row \d+, gold score", printed, re.MULTILINE)) == 5
    assert re.search(r"^score +1 +squared error", printed, re.MULTILINE)
    assert re.search(r"^rationale +\d+ +cross-entropy", printed, re.MULTILINE)
    assert re.search(r"^prompt +\d+ +none", printed, re.MULTILINE)


@pytest.mark.parametrize(("name", "coloured"), [("FORCE_COLOR", True), ("NO_COLOR", False)])
def test_colour_is_where_it_is_wanted(name, coloured, tmp_path, model, capsys, monkeypatch):
    monkeypatch.setenv(name, "1")
    printed = dry(tmp_path, model, make_rows(12), capsys, command="train")[1]
    assert ("\x1b[1;7;35m" in printed) == coloured


def test_rows_that_would_be_refused_end_a_dry_run_with_1(tmp_path, model, capsys):
    rows = make_rows(12)
    rows[3]["completion"] = " fine. 4"
    code, printed = dry(tmp_path, model, rows, capsys, command="train")
    assert code == 1
    assert "1 of 12 rows.jsonl rows refused (no marker; first: row 3)" in printed


def test_rows_that_may_be_dropped_do_not(tmp_path, model, capsys):
    rows = make_rows(12)
    rows[3]["score"] = 9.0
    assert dry(tmp_path, model, rows, capsys, "--invalid_rows", "drop", command="train")[0] == 0


def test_a_dry_run_of_several_aspects(tmp_path, model, capsys):
    aspects = json.dumps(ASPECTS)
    code, printed = dry(tmp_path, model, aspect_rows(ASPECTS, 12), capsys, "--aspects", aspects)
    assert code == 0
    # 11 training rows with a rationale for each of two aspects.
    assert "22 rationales for 11 prompts" in printed
    (golds,) = re.findall(r"^row 0, gold score ([\d., ]+)$", printed, re.MULTILINE)
    assert len(golds.split(", ")) == 2
    assert len(re.findall(r"^score +\d+ +squared error", printed, re.MULTILINE)) >= 10


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_dry_run_says_what_training_would_warn_of(command, tmp_path, model, capsys):
    printed = dry(tmp_path, model, make_rows(12), capsys, "--score_values", "0..100", command=command)[1]
    assert "Training would print this warning: score_values span 100 rubric units" in printed
    assert "raft_weight=0.0016 gives it the same weight" in printed
    options = ["--score_values", "0..100", "--raft_weight", "0.0016"]
    assert "would warn" not in dry(tmp_path, model, make_rows(12), capsys, *options, command=command)[1]
