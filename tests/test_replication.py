"""`examples/benchmarks/replication` trains, judges and tabulates what its configurations say."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import make_model

from trl_tract.evaluation.metrics import pearson

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks" / "replication"


@pytest.fixture
def replication(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import replicate
    import table

    yield replicate, table
    for name in ("replicate", "rows", "table"):
        sys.modules.pop(name, None)  # A folder of scripts: its names should not stay importable.


@pytest.fixture
def replicate(replication):
    return replication[0]


@pytest.fixture
def table(replication):
    return replication[1]


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
    config = replicate.read_config(finished.parent / "config.yaml")
    assert [row["row"] for row in test["rows"]] == config.rows
    assert all(len(row["pearson_by_seed"]) == 2 for row in test["rows"])

    # The same command again: nothing is trained twice, and the same table comes out.
    before = (finished / "table.md").read_text()
    replicate.main(["config.yaml", "--output_dir", "out"])
    printed = capsys.readouterr().out
    assert "finished before" in printed
    assert (finished / "table.md").read_text() == before
    assert json.loads(printed.splitlines()[-1])["benchmark"] == "replication"


def test_reference_answers_are_left_out_and_the_rest_stays(replicate):
    prompt = prometheus_items()[0]["instruction"]
    shortened = replicate.without_reference(prompt)
    assert "reference" not in shortened.lower()
    assert "the best" not in shortened
    for kept in ("###Task Description:", "question 0", "answer 0", "###Score Rubrics:\n[Is it good?]", "###Feedback: "):
        assert kept in shortened


def test_a_question_is_never_on_both_sides(replicate, tmp_path, tokenizer):
    (tmp_path / "items.json").write_text(json.dumps(prometheus_items(questions=10)))
    tokenizer.save_pretrained(tmp_path)
    config = replicate.Replication(model=str(tmp_path), data=str(tmp_path / "items.json"), eval_fraction=0.3)
    train, tests = replicate.prepare(config, str(tmp_path), tmp_path)
    groups = [
        {json.loads(line)["group"] for line in file.read_text().splitlines()} for file in (train, *tests.values())
    ]
    assert [len(each) for each in groups] == [7, 3]
    assert not groups[0] & groups[1]


def test_the_shortest_questions_are_kept_with_all_their_items(replicate, tokenizer):
    class Item:
        def __init__(self, group, words):
            self.group, self.reference = group, {"prompt": "word " * words}

    items = [Item("a", 3), Item("a", 90), Item("b", 30), Item("c", 50), Item("b", 10)]
    # The longest prompts are 90, 30 and 50 words long.
    kept = replicate.shortest_questions(items, 2, tokenizer)
    assert kept == [items[2], items[3], items[4]]


@pytest.mark.parametrize("config", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_configurations_are_understood_by_the_trainer_and_the_judge(replicate, config, tmp_path):
    import inspect

    from trl import ModelConfig, get_peft_config

    from trl_tract import CoTRAILJudge, CoTSelfDistill, TRACTConfig
    from trl_tract.backends import make_backend

    settings = replicate.read_config(config)
    training = {**settings.training, "bf16": False}  # refused on a CPU
    for model in sys.modules["rows"].MODELS.values():
        TRACTConfig(**{**training, **model.objective, "output_dir": str(tmp_path)})
    assert get_peft_config(ModelConfig(**settings.model_args)) is not None
    for taker in (CoTRAILJudge, CoTSelfDistill):
        assert set(settings.generation) <= set(inspect.signature(taker).parameters)
    inspect.signature(make_backend).bind("model", **settings.backend)


def test_unknown_keys_and_rows_are_named(replicate, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: m\nlearning_rate: 1\n")
    with pytest.raises(ValueError, match="learning_rate unknown"):
        replicate.read_config(file)
    file.write_text("model: m\nrows: [tract, best]\n")
    with pytest.raises(ValueError, match="best unknown"):
        replicate.read_config(file)


def test_a_row_brings_the_models_that_it_starts_and_learns_from(replication):
    rows = sys.modules["rows"]
    assert rows.models_for(["continued"]) == ["stage1", "continued"]
    assert rows.models_for(["ce-self"]) == ["ce", "ce-self"]
    assert rows.models_for(["seed", "ce-direct", "ce-direct-rail"]) == ["ce-direct"]


def test_a_seeds_mean_is_over_the_items_that_each_seed_scored(table):
    gold = np.array([1.0, 2, 3, 5, 4])
    scores = np.array([[1.0, 2, 3, 4, math.nan], [5.0, 1, 4, 2, 3]])
    found = table.SeedScores(scores, gold)(np.ones((1, 5)))["pearson"][0]
    by_hand = (pearson(scores[0, :4], gold[:4]) + pearson(scores[1], gold)) / 2
    assert found == pytest.approx(by_hand, abs=1e-12)


def test_a_seed_without_scores_leaves_the_mean_undefined(table):
    scores = np.array([[1.0, 2, 3], [math.nan] * 3])
    assert math.isnan(table.SeedScores(scores, np.array([1.0, 2, 3]))(np.ones((1, 3)))["pearson"][0])


def test_questions_needed_by_hand(table):
    # Half-width 0.4 of 10 questions, difference 0.2: a half as wide takes 2^2 times as many.
    assert table.questions_needed(table.Interval(0.2, -0.2, 0.6), 10) == 40
    assert table.questions_needed(table.Interval(0.2, math.nan, math.nan), 10) is None
    assert table.questions_needed(table.Interval(0.0, -0.1, 0.1), 10) is None


def test_a_score_is_decided_from_the_judgement_on_disk(table):
    records = [{"error": None, "probs": [[0.2, 0.0, 0.6]]}, {"error": "cut", "probs": []}]
    mean = table.decided(records, (1.0, 2.0, 5.0), "mean", seed=0)
    assert mean[0] == pytest.approx(0.2 * 1 + 0.6 * 5)
    assert math.isnan(mean[1])
    draws = {table.decided(records[:1], (1.0, 2.0, 5.0), "sampled", seed=seed)[0] for seed in range(40)}
    assert draws == {1.0, 5.0}
