"""`examples/benchmarks/replication` trains, judges and tabulates what its configurations say."""

import csv
import importlib
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer

from trl_tract.evaluation.metrics import pearson

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks" / "replication"


SCRIPTS = sorted(file.stem for file in FOLDER.glob("*.py"))


@pytest.fixture(scope="module")
def replication():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
        for name in SCRIPTS:
            sys.modules.pop(name, None)  # A folder of scripts: its names should not stay importable.


@pytest.fixture
def replicate(replication):
    return replication.replicate


@pytest.fixture
def table(replication):
    return replication.table


def prometheus_items(questions=4, responders=2):
    prompt = (
        "###Task Description:\nA response to evaluate, a reference answer that gets a score of 5, and a rubric.\n\n"
        "###The instruction to evaluate:\nquestion {}\n\n###Response to evaluate:\nanswer {}\n\n"
        "###Reference Answer (Score 5):\nthe best\n\n###Score Rubrics:\n[Is it good?]\n\n###Feedback: "
    )
    return [
        {
            "instruction": prompt.format(question, responder),
            "gpt4_score": [1 + (question + responder) % 5] * 3,
            "gpt4_feedback": ["it is good", "it is fair", "it is poor"],
        }
        for question in range(questions)
        for responder in range(responders)
    ]


@pytest.fixture
def finished(replicate, tmp_path, tokenizer, monkeypatch):
    """A whole replication of two seeds on a tiny random model, in the configuration's own directory."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    make_model().save_pretrained(model)
    tokenizer.save_pretrained(model)
    (tmp_path / "items.json").write_text(json.dumps(prometheus_items()))
    settings = yaml.safe_load((FOLDER / "smollm2_vicuna.yaml").read_text())
    settings |= {
        "model": str(model),
        "data": "items.json",
        "max_questions": None,
        "eval_fraction": 0.5,
        "seeds": [0, 1],
    }
    settings["model_args"]["lora_target_modules"] = ["all-linear"]
    settings["generation"] |= {"max_new_tokens": 4}
    settings["rows"] = ["seed", "raft-direct", "continued", "tract-sampled", "tract"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    replicate.main(["config.yaml", "--output_dir", "out"])
    return tmp_path / "out"


@pytest.mark.slow
def test_every_row_of_the_table_is_trained_judged_and_compared(finished, replicate, capsys):
    assert (finished / "seed-1" / "stage1-merged" / "model.safetensors").is_file()
    result = json.loads((finished / "table.json").read_text())
    assert result["seeds"] == [0, 1]
    test = result["tests"]["held-out"]
    assert (test["n"], test["questions"]) == (4, 2)
    config = sys.modules["config"].read_config(finished.parent / "config.yaml")
    assert [row["row"] for row in test["rows"]] == config.rows
    assert all(len(row["pearson_by_seed"]) == 2 for row in test["rows"])

    # The same command again: nothing is trained twice, and the same table comes out.
    before = (finished / "table.md").read_text()
    replicate.main(["config.yaml", "--output_dir", "out"])
    printed = capsys.readouterr().out
    assert "finished before" in printed
    assert (finished / "table.md").read_text() == before
    assert json.loads(printed.splitlines()[-1])["benchmark"] == "replication"


def test_reference_answers_are_left_out_and_the_rest_stays(replication):
    prompt = prometheus_items()[0]["instruction"]
    shortened = replication.items.without_reference(prompt)
    assert "reference" not in shortened.lower()
    assert "the best" not in shortened
    for kept in ("###Task Description:", "question 0", "answer 0", "###Score Rubrics:\n[Is it good?]", "###Feedback: "):
        assert kept in shortened


def test_a_question_is_never_on_both_sides(replication, tmp_path, tokenizer):
    (tmp_path / "items.json").write_text(json.dumps(prometheus_items(questions=10)))
    config = replication.config.Replication("model", data=str(tmp_path / "items.json"), eval_fraction=0.3)
    items = replication.items.Items(config, tokenizer, tmp_path)
    train = items.write_rows("train.jsonl", items.training())
    (test,) = items.tests(replication.choosing.Choice(of=replication.choosing.chosen_for(config))).values()
    groups = [{json.loads(line)["group"] for line in file.read_text().splitlines()} for file in (train, test)]
    assert [len(each) for each in groups] == [7, 3]
    assert not groups[0] & groups[1]


def test_the_shortest_questions_are_kept_with_all_their_items(replication, tokenizer):
    class Item:
        def __init__(self, group, words):
            self.group, self.reference = group, {"prompt": "word " * words}

    items = [Item("a", 3), Item("a", 90), Item("b", 30), Item("c", 50), Item("b", 10)]
    # The longest prompts are 90, 30 and 50 words long.
    kept = replication.items.shortest_questions(items, 2, tokenizer)
    assert kept == [items[2], items[3], items[4]]


@pytest.mark.parametrize("config", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_configurations_are_understood_by_the_trainer_and_the_judge(replicate, config, tmp_path):
    import inspect

    from trl import ModelConfig, get_peft_config

    from trl_tract import CoTBootstrap, CoTRAILJudge, CoTSelfDistill, REALConfig, TRACTConfig
    from trl_tract.backends import make_backend

    settings = sys.modules["config"].read_config(config)
    training = {**settings.training, "bf16": False}  # refused on a CPU
    for model in sys.modules["rows"].MODELS.values():
        for tried in settings.choice.get("training", [{}]):
            TRACTConfig(**{**training, **model.objective, **tried, "output_dir": str(tmp_path)})
    for tried in settings.choice.get("reinforcement", [{}]):
        REALConfig(**{**settings.reinforcement, **tried, "output_dir": str(tmp_path), "use_cpu": True, "bf16": False})
    assert set(settings.bootstrap) <= set(inspect.signature(CoTBootstrap).parameters)
    assert get_peft_config(ModelConfig(**settings.model_args)) is not None
    for taker in (CoTRAILJudge, CoTSelfDistill):
        assert set(settings.generation) <= set(inspect.signature(taker).parameters)
    inspect.signature(make_backend).bind("model", **settings.backend)


def test_unknown_keys_and_rows_are_named(replicate, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: m\nlearning_rate: 1\n")
    with pytest.raises(ValueError, match="learning_rate unknown"):
        sys.modules["config"].read_config(file)
    file.write_text("model: m\nrows: [tract, best]\n")
    with pytest.raises(ValueError, match="best unknown"):
        sys.modules["config"].read_config(file)


def test_a_row_brings_the_models_that_it_starts_and_learns_from(replication):
    rows = replication.rows
    assert rows.models_for(["continued"]) == ["stage1", "continued"]
    assert rows.models_for(["ce-self"]) == ["ce", "ce-self"]
    assert rows.models_for(["seed", "mean", "ce-direct", "ce-direct-rail"]) == ["ce-direct"]
    assert rows.models_for(["real"]) == ["stage1", "tract", "real"]
    assert rows.models_for(["tract-bootstrap"]) == ["stage1-bootstrap", "tract-bootstrap"]


def test_a_seeds_mean_is_over_the_items_that_each_seed_scored(table):
    gold = np.array([1.0, 2, 3, 5, 4])
    scores = np.array([[1.0, 2, 3, 4, math.nan], [5.0, 1, 4, 2, 3]])
    found = table.SeedScores(scores, gold)(np.ones((1, 5)))["pearson"][0]
    by_hand = (pearson(scores[0, :4], gold[:4]) + pearson(scores[1], gold)) / 2
    assert found == pytest.approx(by_hand, abs=1e-12)


def test_a_seed_without_scores_leaves_the_mean_undefined(table):
    scores = np.array([[1.0, 2, 3], [math.nan] * 3])
    assert math.isnan(table.SeedScores(scores, np.array([1.0, 2, 3]))(np.ones((1, 3)))["pearson"][0])


def test_units_needed_by_hand(table):
    # Half-width 0.4 of 10 questions, difference 0.2: a half as wide takes 2^2 times as many.
    assert table.units_needed(table.Interval(0.2, -0.2, 0.6), 10) == 40
    assert table.units_needed(table.Interval(0.2, math.nan, math.nan), 10) is None
    assert table.units_needed(table.Interval(0.0, -0.1, 0.1), 10) is None


def test_a_score_is_decided_from_the_judgement_on_disk(table):
    records = [{"error": None, "probs": [[0.2, 0.0, 0.6]]}, {"error": "cut", "probs": []}]
    mean = table.decided(records, (1.0, 2.0, 5.0), "mean", seed=0)
    assert mean[0] == pytest.approx(0.2 * 1 + 0.6 * 5)
    assert math.isnan(mean[1])
    draws = {table.decided(records[:1], (1.0, 2.0, 5.0), "sampled", seed=seed)[0] for seed in range(40)}
    assert draws == {1.0, 5.0}


def saf_settings(folder, model, **changes):
    """The configuration for Short Answer Feedback on a tiny model, and rows like those, which are written."""
    for name, count in (("train.csv", 14), ("test.csv", 7)):
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["question_id", "question", "reference", "answer", "feedback", "score"])
            for number in range(count):
                feedback, score = [("it is poor", 0), ("it is fair", 0.4), ("it is good", 1)][number % 3]
                writer.writerow([number % 6, f"why {number % 6}?", "so", f"it is {name} {number}", feedback, score])
    settings = yaml.safe_load((FOLDER / "smollm2_saf.yaml").read_text())
    settings |= {"model": str(model), "data": str(folder / "train.csv"), "curve": [], "seeds": [0]}
    settings |= {"tests": {"unseen": str(folder / "test.csv")}, "rationales": 2, "several": {"tract": 3}}
    settings["rubric"] = {
        "criterion": "ok?",
        "scores": dict(zip(["0", "0.25", "0.5", "0.75", "1"], "abcde", strict=True)),
    }
    rates = [{"learning_rate": 1.0e-3}, {"learning_rate": 1.0e-2}]
    settings["choice"] |= {"items": 5, "alphas": [1, 100], "training": rates, "reinforcement": rates}
    settings["training"] |= {"max_steps": 1, "save_strategy": "no"}
    settings["generation"]["max_new_tokens"] = 8
    small = {"max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    settings["reinforcement"] |= {**small, "max_completion_length": 4}
    settings["model_args"]["dtype"] = "float32"
    return settings | changes


@pytest.fixture(scope="module")
def seed_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seed")
    model = make_model(std=0.1, width=64)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chosen(replication, seed_model, tmp_path_factory):
    """A replication of the rows that write no rationale, with settings chosen on training items."""
    folder = tmp_path_factory.mktemp("saf")
    settings = saf_settings(folder, seed_model, rows=["mean", "ridge", "raft-direct"], several={}, rationales=0)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "test.csv").rename(folder / "closed.csv")
    with pytest.raises(FileNotFoundError):
        replication.replicate.main([str(folder / "config.yaml"), "--output_dir", str(folder / "out")])
    written = (folder / "out" / "choice.json").read_text()
    (folder / "closed.csv").rename(folder / "test.csv")
    replication.replicate.main([str(folder / "config.yaml"), "--output_dir", str(folder / "out")])
    return SimpleNamespace(folder=folder, out=folder / "out", written=written, config=folder / "config.yaml")


def test_settings_are_written_down_before_a_test_is_opened_and_stay(chosen):
    # The test file was not there at first: everything up to it was done without.
    choice = json.loads(chosen.written)
    assert (chosen.out / "choice.json").read_text() == chosen.written
    tried = [line for line in choice["log"] if line["model"] == "raft-direct"]
    assert [line["settings"]["learning_rate"] for line in tried] == [1e-3, 1e-2]
    assert choice["chosen"]["raft-direct"] == min(tried, key=lambda line: line["rmse"])["settings"]
    trained = json.loads((chosen.out / "seed-0" / "raft-direct.json").read_text())
    assert trained["training"]["learning_rate"] == choice["chosen"]["raft-direct"]["learning_rate"]


def test_settings_are_chosen_on_training_items_alone(chosen):
    def prompts(name):
        return {str(json.loads(line)["prompt"]) for line in (chosen.out / name).read_text().splitlines()}

    tried_on, judged, training = map(prompts, ("choice-train.jsonl", "choice-items.jsonl", "train.jsonl"))
    assert (len(tried_on), len(judged)) == (9, 5)
    assert tried_on | judged == training
    assert not tried_on & judged
    assert not training & prompts("unseen.jsonl")


def test_tests_stay_closed_to_settings_of_another_configuration(replication, tokenizer, chosen, tmp_path):
    config = replication.config.read_config(chosen.config)
    config.training["learning_rate"] = 1.0
    items = replication.items.Items(config, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="another configuration"):
        items.tests(replication.choosing.Choice.read(chosen.out))
    with pytest.raises(FileNotFoundError):
        replication.choosing.Choice.read(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_intervals_come_by_question_and_by_item(chosen):
    found = json.loads((chosen.out / "table.json").read_text())["tests"]["unseen"]
    assert (found["n"], found["questions"]) == (7, 6)
    rmse = {row["row"]: row["rmse"] for row in found["rows"]}["raft-direct"]
    assert rmse["by_question"]["value"] == rmse["by_item"]["value"]
    assert rmse["by_question"]["low"] != rmse["by_item"]["low"]


def test_some_rows_are_done_and_shown_by_themselves(chosen, replication, capsys):
    arguments = [str(chosen.config), "--output_dir", str(chosen.out), "--rows", "mean", "raft-direct"]
    replication.replicate.main(arguments)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["row"] for row in last["tests"]["unseen"]["rows"]] == ["mean", "raft-direct"]
    replication.replicate.main([*arguments[:3], "--table_only"])  # the others are still there
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["row"] for row in last["tests"]["unseen"]["rows"]] == ["mean", "ridge", "raft-direct"]


def test_mean_and_ridge_by_hand_on_ten_items(replication):
    rng = np.random.default_rng(0)
    features, gold, wanted = rng.normal(size=(10, 3)), rng.uniform(size=10), rng.normal(size=(10, 3))
    ends = (0.0, 1.0)
    mean = replication.rivals.predict("mean", features, gold, wanted, ends=ends)
    assert mean == pytest.approx([gold.sum() / 10] * 10)
    # Standardised columns; the intercept, the mean, is not penalised: w = (X'X + a)^-1 X'(y - mean).
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    weights = np.linalg.solve(standard.T @ standard + 4.0 * np.eye(3), standard.T @ (gold - gold.mean()))
    by_hand = gold.mean() + (wanted - features.mean(axis=0)) / features.std(axis=0) @ weights
    ridge = replication.rivals.predict("ridge", features, gold, wanted, alpha=4.0, ends=ends)
    assert ridge == pytest.approx(np.clip(by_hand, *ends), abs=1e-12)


def test_features_are_the_last_hidden_state_behind_prompt_and_marker(replication, seed_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = ["is it good? ->", "is it good? no ->"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    scales = replication.config.Replication("model").scales
    found = replication.rivals.features_of(str(seed_model), tmp_path / "rows.jsonl", scales)
    model = AutoModelForCausalLM.from_pretrained(seed_model)
    tokenizer = AutoTokenizer.from_pretrained(seed_model)
    for prompt, features in zip(prompts, found, strict=True):
        # Without a rationale there is no space before the marker; this tokenizer's scores have none before them.
        ids = tokenizer(f"{prompt}[RESULT] ", return_tensors="pt").input_ids
        with torch.no_grad():
            states = model.model(ids).last_hidden_state
        assert states[0, -1].numpy() == pytest.approx(features, abs=1e-5)


def test_error_of_fewer_rationales_is_the_mean_over_all_choices_of_them(replication):
    scores, gold = np.array([0.1, 0.9, 0.4, 0.4, 0.7]), 0.3
    for count in (1, 3, 5):
        by_hand = np.mean([(np.mean(some) - gold) ** 2 for some in itertools.combinations(scores, count)])
        assert replication.rationales.squared_errors(scores, gold, count) == pytest.approx(by_hand, abs=1e-12)


def own_rows():
    # Prompt a, gold 1: rationales that come to 0.9 and 0.2; prompt b, gold 0: to 0.6 and 1.
    scored = [("a", 1.0, 0.9), ("a", 1.0, 0.2), ("b", 0.0, 0.6), ("b", 0.0, 1.0), ("c", 0.5, None)]
    return [{"prompt": prompt, "score": score, "rationale_score": own} for prompt, score, own in scored]


def test_how_right_own_rationales_are_by_hand(replication, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own_rows()))
    found = replication.rationales.own_rationales(tmp_path / "rows.jsonl", [0.0, 0.5, 1.0])
    # Half a step is 0.25: of four, 0.9 alone is that near. Off by 0.1, 0.8, 0.6 and 1: mean square 2.01 / 4.
    assert (found["prompts"], found["rationales"], found["within"]) == (2, 4, 0.25)
    assert found["rmse"] == pytest.approx(math.sqrt(2.01 / 4))
    assert found["rmse_nearest"] == pytest.approx(math.sqrt((0.01 + 0.36) / 2))
    assert found["rmse_mean"] == pytest.approx(0.5)
    assert found["by_gold"]["1"] == {"rationales": 2, "score": pytest.approx(0.55), "within": 0.5}


def test_nearest_and_weighted_rationales(replication):
    rows = own_rows()
    assert replication.models.kept_rows(rows, "nearest", 0) == [rows[0], rows[2]]
    drawn = [row for seed in range(200) for row in replication.models.kept_rows(rows, "weighted", seed)]
    # The deviation of 1 and 0 is 0.5, s = 0.25: weights exp(-0.08), exp(-5.12), exp(-2.88), exp(-8).
    weights = np.exp([-0.08, -5.12, -2.88, -8])
    shares = np.array([sum(row is each for row in drawn) for each in rows[:4]]) / 400
    assert shares == pytest.approx(weights / weights.sum(), abs=0.05)


@pytest.mark.slow
def test_every_row_for_short_answer_feedback_is_trained_and_judged(replication, seed_model, tmp_path):
    settings = saf_settings(tmp_path, seed_model)
    settings["choice"]["training"] = [{"learning_rate": 1.0e-3}]  # REAL alone has something to choose
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    replication.replicate.main([str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["row"] for row in result["tests"]["unseen"]["rows"]] == settings["rows"]
    assert set(result["choice"]["chosen"]) == {*replication.rows.models_for(settings["rows"]), "mean", "ridge"}
    assert result["tests"]["unseen"]["several"]["tract"]["samples"] == 3
    assert result["own_rationales"]["0"]["rationales"] > 0


def test_the_tables_of_the_docs_are_those_of_the_results(monkeypatch, replication):
    monkeypatch.syspath_prepend(str(FOLDER.parents[2] / "docs"))
    import benchmark_tables

    for page in benchmark_tables.PAGES:
        assert benchmark_tables.written(page) == page.read_text(encoding="utf-8"), "python docs/benchmark_tables.py"
    sys.modules.pop("benchmark_tables")


def test_a_configuration_with_nothing_to_choose_tries_nothing(replication, tmp_path, monkeypatch):
    config = replication.config.Replication("model", rows=["stage1", "real"])
    config.choice = {"items": 1, "training": [{"learning_rate": 0.5}], "reinforcement": [{"learning_rate": 0.25}]}
    items = SimpleNamespace(
        training=lambda: [1, 2],
        split=lambda items: ([1], [2]),
        write_rows=lambda name, items: tmp_path / "empty.jsonl",
        write_items=lambda name, items: tmp_path / "empty.jsonl",
    )
    (tmp_path / "empty.jsonl").touch()
    choice = replication.replicate.choose(config, "model", items, tmp_path)
    assert choice.log == []
    assert choice.settings("tract") == {"learning_rate": 0.5}
    assert choice.settings("real") == {"learning_rate": 0.25}
