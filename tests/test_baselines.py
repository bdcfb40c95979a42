"""Each configuration in the table of docs/baselines.md is that model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_rows, make_tokenizer, make_trainer
from datasets import Dataset
from test_oracle import oracle_loss

from trl_tract import CoTRAILJudge, CoTSelfDistill, TransformersBackend
from trl_tract.backends import ScriptedBackend

TOKENIZER = make_tokenizer()
TABLE = (Path(__file__).parents[1] / "docs" / "baselines.md").read_text(encoding="utf-8")
CELLS = [line.split("|")[1:-1] for line in TABLE.splitlines() if line.startswith("|")][2:]
CONFIGS: dict[str, dict[str, Any]] = {
    name.strip(): {key: json.loads(value.lower()) for key, value in re.findall(r"(\w+)=([\w.]+)", config)}
    for name, _, config, _ in CELLS
}


def bare(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "completion": " " + row["completion"][row["completion"].rindex("[RESULT]") :]}


def test_the_table_was_read():
    assert len(CONFIGS) == 13
    assert CONFIGS["RAFT, no rationale"] == {"rationale_weight": 0, "drop_rationale": True}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_the_formula_of_that_model(tmp_path, name):
    rows, settings = make_rows(4, seed=1), dict(CONFIGS[name])
    trainer = make_trainer(tmp_path, rows, tokenizer=TOKENIZER, **settings)
    if settings.pop("drop_rationale", False):
        rows = [bare(row) for row in rows]
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    wanted = oracle_loss(make_model().double(), rows, **settings)
    torch.testing.assert_close(loss.detach().double(), wanted.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch", [4, 8])
def test_the_authors_effective_weight_is_one_over_the_batch(batch):
    # Their term: mean over the micro-batch, divided by its rows again.
    errors = torch.arange(1.0, batch + 1)
    theirs = errors.mean() / batch
    ours = CONFIGS[f"TRACT, the authors' effective weight at batch {batch}"]["raft_weight"] * errors.mean()
    assert ours == theirs


def test_a_judge_without_rationale_writes_none_and_scores_as_it_was_trained(tmp_path):
    rows = make_rows(4, seed=1)
    trainer = make_trainer(tmp_path, rows, tokenizer=TOKENIZER, drop_rationale=True)
    trainer.save_model()
    TOKENIZER.save_pretrained(tmp_path)
    judged = CoTRAILJudge.from_pretrained(tmp_path).judge(rows)
    assert [judgement.rationales for judgement in judged] == [[""]] * 4
    expected = trainer.predict(Dataset.from_list(rows)).predictions
    assert [judgement.score for judgement in judged] == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_model_without_rationale_is_refused_for_self_distillation(tmp_path):
    make_trainer(tmp_path, make_rows(4), drop_rationale=True).save_model()
    with pytest.raises(ValueError, match="drop_rationale=True"):
        CoTSelfDistill.from_pretrained(tmp_path, TransformersBackend(make_model(), TOKENIZER))


def test_stage_two_on_both_kinds_of_rationale(tmp_path):
    rows = Dataset.from_list(make_rows(3))
    script = {row["prompt"]: " my own [RESULT]" for row in make_rows(3)}
    script[rows[1]["prompt"]] = " no marker"
    backend = ScriptedBackend(script, TOKENIZER)
    both = CoTSelfDistill(backend, keep_annotated=True).distill(rows, tmp_path)
    # Row 1's own rationale failed: its annotated one is there already, and is not given twice.
    assert both["rationale_source"] == ["annotated", "self", "annotated", "annotated", "self"]
    assert both["completion"][::2][0] == rows[0]["completion"]
    assert both["prompt"] == [rows[i]["prompt"] for i in (0, 0, 1, 2, 2)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["annotated"], summary["self_written"], summary["dropped"]) == (3, 2, 1)
