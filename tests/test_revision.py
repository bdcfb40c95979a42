"""A seed model's revision on the hub counts in each step of a run, not in training alone."""

import json

import pytest
from conftest import make_rows
from datasets import Dataset
from peft import LoraConfig
from tiny import save_seed
from transformers import AutoModelForCausalLM

from trl_tract import REALConfig, REALTrainer, TRACTConfig, TRACTTrainer, TransformersBackend
from trl_tract.backends.base import Generation
from trl_tract.cli import main
from trl_tract.files.journal import write_jsonl
from trl_tract.training.adapters import on_revision
from trl_tract.training.judge_trainer import KeepsJudge

NAME = "someone/seed"
# PEFT asks the hub, which cannot be reached, whether the base is there.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")
QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--bf16", "false", "--save_strategy", "no"]


def sum_of(model):
    return round(float(model.get_input_embeddings().weight.detach().float().sum()), 3)


@pytest.fixture
def revisions(tmp_path, monkeypatch):
    """The sum of the embeddings -> the revision of a model in the hub's cache that has them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    for revision, commit, seed in (("main", "a" * 40, 0), ("v1", "b" * 40, 1)):
        (folder / "refs" / revision).write_text(commit, encoding="utf-8")
        (folder / "snapshots" / commit).mkdir(parents=True)
        save_seed(folder / "snapshots" / commit, seed=seed)
    return {sum_of(AutoModelForCausalLM.from_pretrained(NAME, revision=name)): name for name in ("main", "v1")}


def test_every_step_of_a_run_loads_the_revision(revisions, tmp_path, monkeypatch):
    generated, trained = [], []

    def generate(backend, prompts, *, n=1, **settings):
        generated.append(revisions[sum_of(backend.model)])
        return [[Generation(f"polite {i} {j}", "stop", 5) for j in range(n)] for i, _ in enumerate(prompts)]

    train = KeepsJudge.train
    monkeypatch.setattr(TransformersBackend, "generate", generate)
    monkeypatch.setattr(
        KeepsJudge, "train", lambda self, *a, **k: trained.append(revisions[sum_of(self.model)]) or train(self, *a, **k)
    )
    rows = make_rows(40)
    for row in rows[::2]:
        row["completion"] = None
    write_jsonl(tmp_path / "rows.jsonl", rows)
    given = ["--model", NAME, "--model_revision", "v1", "--data", str(tmp_path / "rows.jsonl"), "--max_steps", "1"]
    given += ["--seed_baseline", "true", "--bootstrap", json.dumps({"tolerance": 10}), "--calibrate", "0"]
    assert main(["run", *given, "--output_dir", str(tmp_path / "out"), *QUIET]) == 0
    assert trained == ["v1", "v1"]
    # Bootstrap, self-generation, and three judges: the seed, stage one, TRACT.
    assert set(generated) == {"v1"}
    assert len(generated) >= 5
    assert json.loads((tmp_path / "out" / "tract" / "adapter_config.json").read_text())["revision"] == "v1"


@pytest.mark.parametrize("kind", [TRACTTrainer, REALTrainer])
def test_an_adapter_names_the_revision_of_its_base(revisions, tmp_path, kind):
    settings = {"report_to": "none", "bf16": False, "model_init_kwargs": {"revision": "v1"}}
    if kind is REALTrainer:
        rows = [{"prompt": row["prompt"], "score": 3} for row in make_rows(4)]
        args = REALConfig(
            str(tmp_path), num_generations=2, per_device_train_batch_size=2, max_completion_length=8, **settings
        )
    else:
        rows, args = make_rows(4), TRACTConfig(str(tmp_path), **settings)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = kind(NAME, args, train_dataset=Dataset.from_list(rows), peft_config=config)
    assert revisions[sum_of(trainer.model)] == "v1"
    assert trainer.model.peft_config["default"].revision == "v1"
    assert config.revision is None  # the caller's is left alone


@pytest.mark.parametrize(
    ("own", "init", "named"), [("v2", {"revision": "v1"}, "v2"), (None, {"revision": "main"}, None)]
)
def test_a_named_revision_is_kept_and_the_main_branch_is_not_named(own, init, named):
    assert on_revision(LoraConfig(revision=own), init).revision == named
