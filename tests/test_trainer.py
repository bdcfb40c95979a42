"""TRACTTrainer as its users meet it: swapped in, logged, evaluated, saved, resumed, described."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from conftest import PLAIN, make_model, make_rows, make_tokenizer, make_trainer, save_seed
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig

from trl_tract import REALConfig, REALTrainer, TRACTConfig, TRACTTrainer
from trl_tract.saved.judge_config import JudgeConfig

TOKENIZER = make_tokenizer()
GRID_IDS = tuple(TOKENIZER.convert_tokens_to_ids(["1", "2", "3", "4", "5"]))
TRAIN_NAMES = {"loss/rationale", "loss/score", "score/expected", "score/mae", "score/grid_mass"}
EVAL_NAMES = {f"eval_{name}" for name in TRAIN_NAMES} | {"eval_score/pearson", "eval_score/spearman", "eval_score/rmse"}


def lora_config() -> LoraConfig:
    return LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def by_hand(model: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per-row expected scores and grid masses, and per-token nats, from the full logits of text rows in float64."""
    expected, mass, nll = [], [], []
    model = model.double().eval()
    for row in rows:
        ids = TOKENIZER(row["prompt"] + row["completion"] + "<|end|>").input_ids
        start = len(TOKENIZER(row["prompt"]).input_ids)
        score = len(ids) - 2  # "... 5<|end|>"
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        probs = log_probs[score - 1].exp()[list(GRID_IDS)]
        expected.append(sum(float(p) * value for p, value in zip(probs, (1, 2, 3, 4, 5), strict=True)))
        mass.append(float(probs.sum()))
        nll += [-float(log_probs[t - 1, ids[t]]) for t in range(start, len(ids)) if t != score]
    gold = [row["score"] for row in rows]
    errors = [e - g for e, g in zip(expected, gold, strict=True)]
    return {
        "expected": expected,
        "gold": gold,
        "loss/rationale": sum(nll) / len(nll),
        "loss/score": sum(error**2 for error in errors) / len(errors),
        "score/expected": sum(expected) / len(expected),
        "score/mae": sum(map(abs, errors)) / len(errors),
        "score/grid_mass": sum(mass) / len(mass),
    }


class Sizes(TorchDispatchMode):
    """The numbers in the largest tensor that an operator returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *found])
        return result


# Swapping the class name


@pytest.mark.parametrize("config_class", [TRACTConfig, SFTConfig, TrainingArguments])
def test_any_config_of_the_family_trains(tmp_path, config_class):
    trainer = make_trainer(tmp_path, make_rows(4), config_class=config_class, max_steps=1, seed=7)
    assert isinstance(trainer.args, TRACTConfig)
    assert trainer.args.seed == 7
    assert trainer.train().global_step == 1


def test_a_plain_sft_config_keeps_its_own_values(tmp_path):
    # to_dict() writes a placeholder for whatever ends in `_token`, eos_token and pad_token among them.
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_length=77, eos_token="<|im_end|>")
    taken = TRACTConfig.from_args(args, "model")
    assert (taken.max_length, taken.eos_token, taken.pad_token) == (77, "<|im_end|>", None)


def test_plain_training_arguments_get_tracts_max_length(tmp_path):
    taken = TRACTConfig.from_args(TrainingArguments(str(tmp_path), use_cpu=True), "model")
    assert taken.max_length == 3000


def test_no_args_name_the_output_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model()
    model.config._name_or_path = "someone/tiny-llama"
    trainer = TRACTTrainer(model, train_dataset=Dataset.from_list(make_rows(4)), processing_class=TOKENIZER)
    assert trainer.args.output_dir == "tiny-llama-TRACT"


def test_a_model_given_as_a_directory_trains(tmp_path):
    save_seed(tmp_path / "seed")
    trainer = TRACTTrainer(
        str(tmp_path / "seed"),
        args=TRACTConfig(str(tmp_path / "out"), **PLAIN, max_steps=1),
        train_dataset=Dataset.from_list(make_rows(4)),
    )
    assert trainer.train().global_step == 1


def test_training_lowers_both_terms(tmp_path):
    # 20 steps on 8 rows that can be learnt by heart.
    trainer = make_trainer(
        tmp_path,
        make_rows(8),
        model=make_model(std=0.1),
        max_steps=20,
        per_device_train_batch_size=8,
        optim="adamw_torch",
        learning_rate=0.01,
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss/score" in entry]
    assert logged[-1]["loss/score"] < 0.5 * logged[0]["loss/score"]
    assert logged[-1]["loss/rationale"] < 0.5 * logged[0]["loss/rationale"]


# One forward pass


@pytest.mark.parametrize("lora", [False, True])
def test_a_training_step_runs_the_backbone_once(tmp_path, lora):
    extra = {"peft_config": lora_config()} if lora else {}
    trainer = make_trainer(tmp_path, make_rows(8), extra=extra, max_steps=2)
    calls: list[int] = []
    base = trainer.model.get_base_model() if lora else trainer.model
    base.base_model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 2


def test_an_evaluation_batch_runs_the_backbone_once(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(4), eval_dataset=make_rows(8), per_device_eval_batch_size=4)
    calls: list[int] = []
    trainer.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    trainer.evaluate()
    assert len(calls) == 2


def test_score_rows_alone_pass_through_the_head_a_second_time(tmp_path):
    # 4 rows, 4 scores: (4, 32) hidden states, beside whatever TRL's fused head does with the weight itself.
    trainer = make_trainer(tmp_path, make_rows(4), max_steps=1)
    shapes: list[tuple[int, ...]] = []
    trainer.model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    trainer.train()
    assert shapes == [(4, 32)]


# Metrics


def slashed(entry: dict[str, Any]) -> set[str]:
    return {name for name in entry if "/" in name}


def test_training_logs_these_names_and_no_others(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(4), max_steps=1, logging_strategy="steps", logging_steps=1)
    trainer.train()
    assert slashed(trainer.state.log_history[0]) == TRAIN_NAMES


def test_evaluation_returns_and_logs_these_names_and_no_others(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(4), eval_dataset=make_rows(4, seed=1))
    assert slashed(trainer.evaluate()) == EVAL_NAMES
    assert slashed(trainer.state.log_history[-1]) == EVAL_NAMES


def test_logged_means_equal_those_by_hand_with_accumulation(tmp_path):
    # One update of 9 rows in micro-batches of 4, 4 and 1: a mean of means would weigh the last row four times.
    rows = make_rows(9)
    trainer = make_trainer(
        tmp_path,
        rows,
        max_steps=1,
        gradient_accumulation_steps=3,
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    wanted = by_hand(make_model(), rows)
    logged = trainer.state.log_history[0]
    for name in TRAIN_NAMES:
        assert logged[name] == pytest.approx(wanted[name], rel=1e-4), name
    assert logged["loss"] == pytest.approx(wanted["loss/rationale"] + wanted["loss/score"], rel=1e-4)


def test_means_start_anew_after_each_log(tmp_path):
    rows = make_rows(8)
    trainer = make_trainer(
        tmp_path,
        rows,
        max_steps=2,
        learning_rate=0.0,
        train_sampling_strategy="sequential",
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    second = by_hand(make_model(), rows[4:])
    assert trainer.state.log_history[1]["score/expected"] == pytest.approx(second["score/expected"], rel=1e-4)


@pytest.mark.parametrize("batch", [3, 8])
def test_evaluation_metrics_equal_scipy_on_expected_scores_by_hand(tmp_path, batch):
    rows = make_rows(8, seed=4)
    trainer = make_trainer(tmp_path, make_rows(4), eval_dataset=rows, per_device_eval_batch_size=batch)
    found = trainer.evaluate()
    wanted = by_hand(make_model(), rows)
    expected, gold = wanted["expected"], wanted["gold"]
    wanted["score/pearson"] = scipy.stats.pearsonr(expected, gold).statistic
    wanted["score/spearman"] = scipy.stats.spearmanr(expected, gold).statistic
    wanted["score/rmse"] = math.sqrt(wanted["loss/score"])
    for name in EVAL_NAMES:
        assert found[name] == pytest.approx(wanted[name.removeprefix("eval_")], rel=1e-4), name


def test_evaluation_of_packed_rows_scores_every_row(tmp_path):
    rows = make_rows(8, seed=4)
    settings = {"packing": True, "max_length": 128}
    packed = make_trainer(tmp_path, make_rows(4), eval_dataset=rows, **settings).evaluate()
    padded = make_trainer(tmp_path, make_rows(4), eval_dataset=rows).evaluate()
    for name in EVAL_NAMES - {"eval_loss"}:
        assert packed[name] == pytest.approx(padded[name], rel=1e-4), name


def test_new_rows_can_be_evaluated(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(4))
    rows = make_rows(6, seed=5)
    found = trainer.evaluate(Dataset.from_list(rows))
    assert found["eval_score/expected"] == pytest.approx(by_hand(make_model(), rows)["score/expected"], rel=1e-4)


def test_each_of_several_evaluation_sets_has_its_own_metrics(tmp_path):
    easy, hard = make_rows(4, seed=5), make_rows(6, seed=6)
    sets = {"easy": Dataset.from_list(easy), "hard": Dataset.from_list(hard)}
    found = make_trainer(tmp_path, make_rows(4), eval_dataset=sets).evaluate()
    for name, rows in (("easy", easy), ("hard", hard)):
        wanted = by_hand(make_model(), rows)
        assert found[f"eval_{name}_score/expected"] == pytest.approx(wanted["score/expected"], rel=1e-4)
        pearson = scipy.stats.pearsonr(wanted["expected"], wanted["gold"]).statistic
        assert found[f"eval_{name}_score/pearson"] == pytest.approx(pearson, rel=1e-4)


def test_a_prediction_does_not_leak_into_the_next_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(4), eval_dataset=make_rows(4, seed=1))
    alone = trainer.evaluate()
    other = make_trainer(tmp_path, make_rows(6, seed=2)).train_dataset
    trainer.predict(other)
    again = trainer.evaluate()
    assert {name: again[name] for name in EVAL_NAMES} == {name: alone[name] for name in EVAL_NAMES}


@pytest.mark.parametrize(
    "settings", [{}, {"padding_free": True, "max_length": None}, {"train_sampling_strategy": "group_by_length"}]
)
def test_predict_returns_the_expected_scores_in_the_rows_order(tmp_path, settings):
    # Five rows in batches of two: the last batch is filled up by nobody.
    trainer = make_trainer(tmp_path, make_rows(4), per_device_eval_batch_size=2, **settings)
    rows = make_rows(5, seed=6)
    found = trainer.predict(Dataset.from_list(rows))
    wanted = by_hand(make_model(), rows)
    assert found.predictions.tolist() == pytest.approx(wanted["expected"], rel=1e-4)
    assert found.label_ids.tolist() == wanted["gold"]
    assert found.metrics["test_score/mae"] == pytest.approx(wanted["score/mae"], rel=1e-4)


def test_predict_refuses_a_bad_row_even_where_training_drops_them(tmp_path):
    # With a row less, every later prediction would stand at another row's place.
    trainer = make_trainer(tmp_path, make_rows(4), invalid_rows="drop")
    bad = {"prompt": "ask", "completion": " no score", "score": 3.0}
    with pytest.raises(ValueError, match=r"1 of 3 test rows .*row 1"):
        trainer.predict(Dataset.from_list([make_rows(1)[0], bad, make_rows(1)[0]]))


def test_new_rows_can_be_evaluated_as_they_are(tmp_path):
    rows = make_rows(5, seed=6)
    found = make_trainer(tmp_path, make_rows(4)).evaluate(Dataset.from_list(rows))
    assert found["eval_score/mae"] == pytest.approx(by_hand(make_model(), rows)["score/mae"], rel=1e-4)


def test_an_evaluation_set_is_prepared_and_packed_once(tmp_path):
    settings = {"packing": True, "max_length": 128, "eval_packing": True}
    trainer = make_trainer(tmp_path, make_rows(8), eval_dataset=make_rows(9, seed=1), **settings)
    first = trainer.evaluate()
    again = trainer.evaluate(trainer.eval_dataset)
    assert {name: again[name] for name in EVAL_NAMES} == {name: first[name] for name in EVAL_NAMES}


@pytest.mark.parametrize(
    ("metric", "better"),
    [("eval_score/pearson", max), ("score/rmse", min), ("eval_loss/score", min), ("eval_loss/rationale", min)],
)
def test_the_best_checkpoint_is_the_best_by_the_metric(tmp_path, metric, better):
    trainer = make_trainer(
        tmp_path,
        make_rows(4),
        eval_dataset=make_rows(6, seed=1),
        max_steps=3,
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model=metric,
        save_only_model=True,
    )
    trainer.train()
    name = f"eval_{metric.removeprefix('eval_')}"
    values = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert len(set(values)) == 3
    assert trainer.state.best_metric == better(values)


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        *[(f"{prefix}{name}", False) for prefix in ("", "eval_", "eval_valid_", "valid_") for name in
          ("score/mae", "score/rmse", "loss/score", "loss/rationale", "loss/annotators", "score/rmse/tone")],
        *[(f"{prefix}{name}", True) for prefix in ("", "eval_", "eval_valid_") for name in
          ("score/pearson", "score/spearman", "score/grid_mass", "score/pearson/loss")],
        ("eval_judge/rmse", False), ("eval_loss", False), ("eval_mean_token_accuracy", True), (None, None),
    ],
)  # fmt: skip
def test_the_direction_follows_the_metric(metric, direction):
    assert TRACTConfig("out", use_cpu=True, bf16=False, metric_for_best_model=metric).greater_is_better is direction


def test_a_direction_that_is_given_stays(tmp_path):
    given = TRACTConfig("out", bf16=False, metric_for_best_model="eval_score/rmse", greater_is_better=True)
    assert given.greater_is_better
    # TrainingArguments fills it in by the name's end, and a copy of ours has it filled in.
    host = TrainingArguments("out", metric_for_best_model="eval_score/rmse")
    assert TRACTConfig.from_args(host, "m").greater_is_better is False
    host = TrainingArguments("out", metric_for_best_model="eval_score/pearson", greater_is_better=False)
    assert TRACTConfig.from_args(host, "m").greater_is_better is False


# Saving


@pytest.mark.parametrize("lora", [False, True])
def test_tract_config_is_saved_beside_the_weights(tmp_path, lora):
    extra = {"peft_config": lora_config()} if lora else {}
    trainer = make_trainer(tmp_path / "run", make_rows(4), extra=extra, normalize_grid=True)
    trainer.save_model(str(tmp_path / "saved"))
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "saved" / weights).is_file()
    config = JudgeConfig.load(tmp_path / "saved")
    assert config.scales[0].grid.token_ids == GRID_IDS
    assert config.normalize_grid
    # The rows' completions begin with a space: " the reply ... [RESULT] 4".
    assert config.format.to_dict() == {"marker": "[RESULT]", "lead": " ", "separator": " ", "start": " "}


@pytest.mark.parametrize("lora", [False, True])
def test_tract_config_is_saved_in_checkpoints(tmp_path, lora):
    extra = {"peft_config": lora_config()} if lora else {}
    make_trainer(tmp_path, make_rows(4), extra=extra, max_steps=1, save_strategy="steps", save_steps=1).train()
    saved = json.loads((tmp_path / "checkpoint-1" / "tract_config.json").read_text())
    assert saved["score_token_ids"] == list(GRID_IDS)


class StopAfter(TrainerCallback):
    """Ends a run early, without changing its schedule."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, lora):
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 2,
    }

    def trainer(name: str, *callbacks: TrainerCallback) -> Any:
        extra: dict[str, Any] = {"callbacks": list(callbacks)}
        if lora:
            extra["peft_config"] = lora_config()
        return make_trainer(tmp_path / name, make_rows(10), extra=extra, **settings)

    whole = trainer("whole")
    whole.train()
    trainer("cut", StopAfter(2)).train()
    resumed = trainer("cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    weights = whole.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


# After training


@pytest.mark.parametrize("lora", [False, True])
def test_the_trained_model_generates_as_a_plain_one_does(tmp_path, lora):
    extra = {"peft_config": lora_config()} if lora else {}
    trainer = make_trainer(tmp_path, make_rows(4), extra=extra, max_steps=1)
    trainer.train()
    model = trainer.model.merge_and_unload() if lora else trainer.model
    plain = make_model()
    plain.load_state_dict(model.state_dict())
    ids = TOKENIZER("write [RESULT] and a score ->", return_tensors="pt").input_ids
    wanted = plain.eval().generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.eval().generate(ids, max_new_tokens=8, do_sample=False), wanted)


def test_the_trained_models_plain_forward_still_gives_logits_and_a_loss(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(4), max_steps=1)
    trainer.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    outputs = trainer.model(input_ids=ids, labels=ids)
    assert outputs.logits.shape == (1, 4, 384)
    assert torch.isfinite(outputs.loss)


# The model card


@pytest.fixture(scope="module")
def card(tmp_path_factory) -> tuple[Path, str]:
    """A judge that knows its rows by heart, saved with its card, and the card."""
    directory = tmp_path_factory.mktemp("runs") / "tiny-judge"
    trainer = make_trainer(
        directory,
        make_rows(4),
        max_steps=100,
        optim="adamw_torch",
        learning_rate=3e-3,
        eval_dataset=make_rows(6, seed=1),
        score_values=[1, 2, 3, 4, 5],
        score_marker="[RESULT]",
        raft_weight=2.0,
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(dataset_name="someone/rows", tags="judges")
    return directory, (directory / "README.md").read_text()


@pytest.mark.parametrize(
    "part",
    [
        "# tiny-judge",
        "- Score grid: 1, 2, 3, 4, 5\n",
        "- Marker before the score: `[RESULT]`\n",
        "- `raft_weight`: 2.0\n",
        "https://aclanthology.org/2025.acl-long.147",
        "After annotated rationales. With its own rationales, the judge can be worse:\n\n- Held-out score/",
        "- Held-out score/pearson: ",
    ],
)
def test_the_card_says_what_the_judge_does(card, part):
    assert part in card[1]


def test_the_cards_metadata_hold_tags_and_data_and_no_directory(card):
    from huggingface_hub import ModelCard

    data = ModelCard(card[1]).data
    assert data.tags == ["generated_from_trainer", "llm-as-a-judge", "trl", "tract", "judges"]
    assert data.datasets == "someone/rows"
    assert data.base_model is None
    assert str(card[0].parent) not in card[1]


def test_the_cards_quick_start_runs(card, monkeypatch, capsys):
    directory, text = card
    monkeypatch.chdir(directory.parent)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    row = make_rows(4)[0]
    namespace: dict[str, Any] = {}
    exec(code.replace('"..."', repr(row["prompt"])), namespace)  # what a reader of the card would type
    assert namespace["judgement"].error is None
    assert namespace["judgement"].score == pytest.approx(row["score"], abs=0.25)
    assert capsys.readouterr().out.startswith(str(namespace["judgement"].score))


def test_a_checkpoint_comes_with_a_card_in_the_output_directory(tmp_path):
    make_trainer(tmp_path, make_rows(4), max_steps=1, save_strategy="steps", save_steps=1).train()
    assert "- Marker before the score: `[RESULT]`" in (tmp_path / "README.md").read_text()


def test_every_named_setting_of_the_card_is_a_field_of_a_config():
    from trl_tract.saved.model_card import _SETTINGS

    fields = {*TRACTConfig.__dataclass_fields__, *REALConfig.__dataclass_fields__}
    assert not set(_SETTINGS) - fields


def test_on_a_cpu_a_step_has_a_tile_of_logits_at_once(tmp_path):
    # 1,024 of the vocabulary; TRL's own tiles are 32,768 tokens of the vocabulary wide, for each token with a label.
    trainer = make_trainer(tmp_path, make_rows(16), model=make_model(vocab=40_000, width=8))
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(16)])
    labelled = int((batch["labels"] != -100).sum())
    with Sizes() as sizes:
        trainer.compute_loss(trainer.model, batch)
    assert sizes.largest <= 2**20 < labelled * 32_768


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("trainer", [TRACTTrainer, REALTrainer])
def test_what_is_no_dataset_is_refused_in_words(trainer, splits):
    rows = DatasetDict(train=Dataset.from_list(make_rows(2))) if splits else make_rows(2)
    with pytest.raises(TypeError, match="train dataset"):
        trainer(make_model(), train_dataset=rows, processing_class=make_tokenizer())


def test_a_list_is_no_dataset_to_evaluate_on(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(2), eval_dataset=Dataset.from_list(make_rows(2)))
    with pytest.raises(TypeError, match="eval dataset"):
        trainer.evaluate(make_rows(2))
