"""REALTrainer from end to end on tiny models: where it starts, what it asks and scores, what it saves and refuses."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import processes
import pytest
import torch
from conftest import make_merging_tokenizer, make_model, make_rows, make_tokenizer, make_trainer
from datasets import Dataset
from enumerable import PLAIN_ROWS, SETTINGS, enumerable_model, enumerable_tokenizer
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from trl_tract import CoTRAILJudge, REALConfig, REALTrainer, TransformersBackend
from trl_tract.files.checkpoints import last_complete_checkpoint
from trl_tract.rows.template import Template, TemplateSettings
from trl_tract.rows.tokens import resolve_asked
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.scale import Scale, read_scales
from trl_tract.training.resuming import checkpoint_of, save_objective
from trl_tract.training.rollouts import as_rollout
from trl_tract.training.starting import checked_rows, problem_of

TOKENIZER = enumerable_tokenizer()
REAL = {**SETTINGS, "num_generations": 4, "per_device_train_batch_size": 8, "learning_rate": 0.1}


def make(
    output_dir: Path, model: Any = None, rows: Any = PLAIN_ROWS, tokenizer: Any = TOKENIZER, **settings: Any
) -> Any:
    return REALTrainer(
        enumerable_model() if model is None else model,
        REALConfig(str(output_dir), **{**REAL, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER,
    )


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> dict[str, Path]:
    """What TRACTTrainer saves: a whole model and an adapter, both on the scores 1 and 2 behind #."""
    folder = tmp_path_factory.mktemp("judges")
    enumerable_model().float().save_pretrained(folder / "seed")
    TOKENIZER.save_pretrained(folder / "seed")
    rows = [{"prompt": row["prompt"], "completion": " a # 1", "score": row["score"]} for row in PLAIN_ROWS]
    grid = {"score_values": [1.0, 2.0], "score_marker": "#", "max_steps": 1}
    for name, extra in [("full", {}), ("adapter", {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])})]:
        trainer = make_trainer(
            folder / name, rows, model=str(folder / "seed"), tokenizer=enumerable_tokenizer(), extra=extra, **grid
        )
        trainer.train()
        trainer.save_model()
    return {name: folder / name for name in ("seed", "full", "adapter")}


def started(judge: Path, output_dir: Path, extra: Any = None, **settings: Any) -> Any:
    own = {name: value for name, value in REAL.items() if name not in ("score_values", "score_marker")}
    args = REALConfig(str(output_dir), **{**own, **settings})
    return REALTrainer(judge, args, train_dataset=Dataset.from_list(PLAIN_ROWS), **(extra or {}))


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_judge_is_trained_on_as_it_was_trained(judges, tmp_path, kind):
    trainer = started(judges[kind], tmp_path)
    trainer.train()
    trainer.save_model()
    saved = [json.loads((folder / "tract_config.json").read_text()) for folder in (judges[kind], tmp_path)]
    assert saved[0] == saved[1]
    (judgement,) = CoTRAILJudge.from_pretrained(str(tmp_path), max_new_tokens=3).judge([{"prompt": "1a"}])
    assert judgement.error is None or "#" in judgement.error


def test_an_adapter_is_trained_on_and_its_base_is_not(judges, tmp_path):
    trainer = started(judges["adapter"], tmp_path)
    base = {name: w.clone() for name, w in trainer.model.named_parameters() if "lora" not in name}
    trainer.train()
    trainer.save_model()
    assert all(torch.equal(w, base[name]) for name, w in trainer.model.named_parameters() if "lora" not in name)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (judges["adapter"], tmp_path))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["adapter", "seed"])
def test_adapters_on_4_bit_weights_are_trained(judges, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # see test_qlora.py
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    extra: dict[str, Any] = {"quantization_config": nf4}
    settings: dict[str, Any] = {}
    if kind == "seed":
        extra["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"])
        settings = {"score_values": [1, 2], "score_marker": "#"}
    trainer = started(judges[kind], tmp_path, extra, **settings)
    assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
    before = {name: w.clone() for name, w in trainer.model.named_parameters() if w.requires_grad}
    trainer.train()
    assert before.keys() == {name for name in before if "lora" in name}
    assert any(not torch.equal(w, before[name]) for name, w in trainer.model.named_parameters() if name in before)


def test_the_reward_is_the_squared_error_of_the_judge_behind_the_same_rationale(judges, tmp_path):
    trainer = started(judges["full"], tmp_path)
    trainer.model.train()
    rows = PLAIN_ROWS[:2] * 4
    trainer._generate_and_score_completions(rows)
    backend = TransformersBackend(str(judges["full"]))
    prefixes = [[*prompt, *each.ids] for prompt, each in zip(trainer._sampled_prompts, trainer._rollouts, strict=True)]
    probs = np.exp(backend.next_token_logprobs(prefixes, trainer.scale.grid.token_ids))
    expected = probs @ [1.0, 2.0]
    rewards = list(trainer._logs["rewards"]["squared_error"])
    scored = [number for number, each in enumerate(trainer._rollouts) if each.scored]
    assert scored
    for number in scored:
        assert rewards[number] == pytest.approx(-((expected[number] - rows[number]["score"]) ** 2), abs=1e-5)


def test_generation_stops_at_the_marker(tmp_path):
    trainer = make(tmp_path, max_completion_length=40)
    lengths = []
    generate = trainer.model.generate

    def watched(**kwargs):
        found = generate(**kwargs)
        lengths.append(found.shape[1] - kwargs["input_ids"].shape[1])
        return found

    trainer.model.generate = watched
    trainer._asked = [trainer._template.ask({"prompt": "1a"})] * 4
    ids, _ = trainer._generate_single_turn([[3, 2]] * 4, None, {}, 4)
    assert max(len(own) for own in ids) == lengths[0]
    assert all(5 not in own[:-1] for own in ids if 5 in own and own[-1] == 5)
    assert lengths[0] < 40


def test_the_log_tells_what_became_of_the_rationales(tmp_path):
    trainer = make(tmp_path, logging_strategy="steps", logging_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    names = ("score/expected", "score/rmse", "score/grid_mass", "score/spread", "rationale/length", "entropy")
    assert all(name in entry for name in names)
    assert 0 < entry["rationale/no_score"] < 1
    assert not any(name.startswith("completions/") for name in entry)


def test_an_evaluation_has_the_error_over_all_its_rationales(tmp_path):
    trainer = REALTrainer(
        enumerable_model(),
        REALConfig(str(tmp_path), **{**REAL, "per_device_eval_batch_size": 4, "num_generations_eval": 1}),
        train_dataset=Dataset.from_list(PLAIN_ROWS),
        eval_dataset=Dataset.from_list(PLAIN_ROWS * 2),
        processing_class=TOKENIZER,
    )
    tables = []
    add = trainer._rollout_metrics["eval"].add
    trainer._rollout_metrics["eval"].add = lambda table, count: (tables.append(table), add(table, count))
    metrics = trainer.evaluate()
    table = torch.cat(tables)
    scored = table[table[:, 5] > 0]
    assert len(table) == 2 * len(PLAIN_ROWS)
    assert metrics["eval_score/rmse"] == pytest.approx(float(scored[:, 3].mean().sqrt()), abs=1e-6)
    assert metrics["eval_loss"] == pytest.approx(float(table[:, 0].mean()), abs=1e-5)


def test_evaluation_sets_of_uneven_size_have_the_error_over_their_own_rationales(tmp_path):
    sets = {"few": PLAIN_ROWS[:3], "many": PLAIN_ROWS[3:]}
    trainer = REALTrainer(
        enumerable_model(),
        REALConfig(str(tmp_path), **{**REAL, "per_device_eval_batch_size": 4, "num_generations_eval": 2}),
        train_dataset=Dataset.from_list(PLAIN_ROWS),
        eval_dataset={name: Dataset.from_list(rows) for name, rows in sets.items()},
        processing_class=TOKENIZER,
    )
    trainer.predict(Dataset.from_list([{"prompt": "a", "score": 1.0}] * 8))  # of no evaluation
    tables = []
    add = trainer._rollout_metrics["eval"].add
    trainer._rollout_metrics["eval"].add = lambda table, count: (tables.append(table), add(table, count))
    metrics = trainer.evaluate()
    assert [len(table) for table in tables] == [4, 2, 4, 4, 2]
    for name, table in {"few": torch.cat(tables[:2]), "many": torch.cat(tables[2:])}.items():
        for figure in ("loss", "loss/expected"):
            assert metrics[f"eval_{name}_{figure}"] == pytest.approx(float(table[:, 0].mean()), abs=1e-6)
        assert metrics[f"eval_{name}_rationale/no_score"] == pytest.approx(float(1 - table[:, 5].mean()))


@pytest.mark.parametrize(
    "settings",
    [
        {"advantages": "normalised", "num_iterations": 2, "top_p": 0.9},
        {"advantages": "normalised", "generation_kwargs": {"typical_p": 0.9}},
        {"generation_kwargs": {"use_cache": True}, "delta": 2.0, "epsilon": 0.0},
        {"advantages": "normalised", "steps_per_generation": 2},
        {"advantages": "normalised", "loss_type": "vespo"},
        {"direct_weight": 0.01, "gold_weight": 0.5, "beta": 0.1},
        {"score_values": [11, 12, 21, 22], "max_completion_length": 4},
        {"loss_type": "grpo", "entropy_coef": 0.01},
    ],
)
def test_what_is_not_refused_trains(tmp_path, settings):
    model = enumerable_model()
    model.save_pretrained(tmp_path / "seed")  # the reference is loaded from there
    model.config._name_or_path = str(tmp_path / "seed")
    rows = [{**row, "score": 11.5} for row in PLAIN_ROWS] if "score_values" in settings else PLAIN_ROWS
    trainer = make(tmp_path / "out", model, rows, max_steps=2, **settings)
    before = [weight.detach().clone() for weight in model.parameters()]
    trainer.train()
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.9},
        {"top_k": 5},
        {"repetition_penalty": 1.03},
        {"num_iterations": 2},
        {"steps_per_generation": 2},
        {"loss_type": "vespo"},
        {"loss_type": "cispo"},
        {"neftune_noise_alpha": 5.0},
        {"vllm_structured_outputs_regex": "a+"},
        {"generation_kwargs": {"typical_p": 0.9}},
        {"generation_kwargs": {"do_sample": False}},
        {"advantages": "normalised", "generation_kwargs": {"temperature": 0.5}},
        {"advantages": "normalised", "generation_kwargs": {"max_new_tokens": 2}},
        {"epsilon": -0.1},
        {"epsilon_high": -0.1},
        {"delta": 0.9},
        {"reward_weights": [0.5]},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"scale_rewards": "batch"},
        {"advantages": "normalised", "scale_rewards": False},
        {"label_smoothing_factor": 0.1},
        {"train_sampling_strategy": "sequential"},
        {"max_completion_length": None},
        {"mask_truncated_completions": True},
        {"use_transformers_continuous_batching": True},
        {"advantages": "ranked"},
        {"direct_weight": -1},
        {"no_score_penalty": float("inf")},
        {"score_marker": " "},
        {"thinking": "sometimes"},
    ],
)
def test_what_cannot_be_made_right_is_refused(settings):
    with pytest.raises(ValueError):  # noqa: PT011  # the wording stands in test_api_errors.py
        REALConfig("out", **{**REAL, **settings}).scales  # noqa: B018


@pytest.mark.parametrize("name", ["reward_funcs", "tools", "rollout_func"])
def test_arguments_that_replace_the_reward_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        REALTrainer(enumerable_model(), REALConfig(str(tmp_path), **REAL), **{name: []})


def test_fewer_rows_than_an_update_takes_are_refused(tmp_path):
    # 8 rationales an update, 4 of each prompt: two prompts.
    with pytest.raises(ValueError, match="1 training rows"):
        make(tmp_path, rows=PLAIN_ROWS[:1])


@pytest.mark.parametrize(("shuffled", "which"), [(True, "others each time"), (False, "the last ones")])
def test_rows_that_fill_no_update_are_told_of(tmp_path, monkeypatch, shuffled, which):
    said = []
    monkeypatch.setattr("trl_tract.training.starting.logger.warning", said.append)
    make(tmp_path, rows=PLAIN_ROWS[:7], shuffle_dataset=shuffled)
    make(tmp_path, shuffle_dataset=shuffled)
    assert said == [
        f"each epoch leaves 1 of the 7 training rows out, {which}: rationales are written for 2 rows at once"
    ]


def test_rows_of_messages_are_told_what_is_needed(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}], "score": 1.0}] * 4
    with pytest.raises(ValueError, match="columns messages, score"):
        make(tmp_path, rows=rows)


def test_a_reference_needs_a_model_that_can_be_loaded_again(tmp_path):
    with pytest.raises(ValueError, match="beta"):
        make(tmp_path, beta=0.1)


def test_a_checkpoint_is_not_gone_on_from_with_another_beta(tmp_path):
    before, now = (REALConfig(str(tmp_path), **{**REAL, "beta": beta}) for beta in (0.0, 0.1))
    save_objective(tmp_path, before, None, None)
    with pytest.raises(ValueError, match="beta"):
        checkpoint_of(str(tmp_path), now, None)


def test_a_prompt_of_another_kind_than_the_judge_was_trained_on_is_none(tmp_path):
    template, scales = Template(make_tokenizer()), read_scales({})
    rows = {False: {"prompt": "a", "score": 3}, True: {"prompt": [{"role": "user", "content": "a"}], "score": 3}}
    for chat in (False, True):
        found = [problem_of(template, JudgeConfig(scales, chat=chat), None, rows[own]) for own in (chat, not chat)]
        assert [problem and problem[0] for problem in found] == [None, "mixed types"]


def test_a_bad_row_of_a_stream_is_named_when_its_turn_comes():
    rows = Dataset.from_list([{"prompt": "a", "score": 3}, {"prompt": "b", "score": 9}]).to_iterable_dataset()
    args = SimpleNamespace(invalid_rows="raise", max_completion_length=8)
    stream = checked_rows(Template(TOKENIZER), JudgeConfig(read_scales({})), args, None, rows, "train")
    with pytest.raises(ValueError, match="train row 1 refused"):
        list(stream)


def test_rows_without_a_gold_score_or_a_prompt_are_dropped_if_asked_to(tmp_path):
    rows = [*PLAIN_ROWS, {"prompt": "a", "score": None}, {"prompt": "a", "score": 7.0}, {"prompt": "", "score": 1.0}]
    with pytest.raises(ValueError, match=r"of 11 train rows refused \(no prompt"):
        make(tmp_path, rows=rows)
    trainer = make(tmp_path, rows=rows, invalid_rows="drop")
    assert len(trainer.train_dataset) == len(PLAIN_ROWS)
    trainer.create_model_card()
    assert f"- Rows: {len(PLAIN_ROWS)}\n" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_judge_of_several_aspects_is_refused(judges, tmp_path):
    shutil.copytree(judges["full"], tmp_path / "two")
    config = json.loads((tmp_path / "two" / "tract_config.json").read_text())
    one = {name: config[name] for name in ("score_values", "score_texts", "score_token_ids", "completion_format")}
    config |= {"aspects": {"tone": one, "facts": one}, "num_scores": 2}
    (tmp_path / "two" / "tract_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="tone, facts"):
        started(tmp_path / "two", tmp_path / "out")


def test_another_grid_than_the_judge_was_trained_on_is_refused(judges, tmp_path):
    with pytest.raises(ValueError, match="score_values"):
        started(judges["full"], tmp_path, score_values=[1, 2, 3])


# What was sampled, and what is trained on.


def scale_of(tokenizer: Any, row: dict[str, Any]) -> Scale:
    (scale,) = resolve_asked(Template(tokenizer), row, read_scales({}))
    return scale


def test_what_was_sampled_stays_and_the_judges_tokens_go_on():
    tokenizer, row = make_tokenizer(), {"prompt": "is it polite? ->"}
    template, scale = Template(tokenizer), scale_of(make_tokenizer(), row)
    sampled = tokenizer(" it is short [RESULT] 4<|end|>", add_special_tokens=False)["input_ids"]
    rollout = as_rollout(template, template.ask(row), scale, sampled)
    assert rollout.scored
    assert rollout.ids[: rollout.sampled] == sampled[: rollout.sampled]
    assert tokenizer.decode(rollout.ids) == " it is short [RESULT] "
    assert not rollout.rewritten


def test_a_marker_that_melts_into_what_may_not_follow_it_is_replaced():
    tokenizer = make_merging_tokenizer([("]", "!")], chat_template=None)
    row = {"prompt": "ok?"}
    template, scale = Template(tokenizer), scale_of(tokenizer, row)
    sampled = tokenizer(" no [RESULT]! 4", add_special_tokens=False)["input_ids"]
    rollout = as_rollout(template, template.ask(row), scale, sampled, [-1.0] * len(sampled))
    assert rollout.scored
    assert rollout.rewritten
    assert tokenizer.decode(rollout.ids) == " no [RESULT] "
    assert rollout.ids[: rollout.sampled] == sampled[: rollout.sampled]
    assert rollout.logprobs == [-1.0] * rollout.sampled + [0.0] * (len(rollout.ids) - rollout.sampled)


def test_a_marker_inside_the_thinking_does_not_end_a_rationale():
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    template = Template(tokenizer, TemplateSettings(thinking="rationale"))
    row = {"prompt": [{"role": "user", "content": "is it polite?"}]}
    (scale,) = resolve_asked(template, row, read_scales({}))
    asked = template.ask(row)
    inside = tokenizer("I end with [RESULT] 4", add_special_tokens=False)["input_ids"]
    assert not as_rollout(template, asked, scale, inside).scored
    behind = tokenizer("I end with [RESULT] 4\n</think>\n\n[RESULT] 3", add_special_tokens=False)["input_ids"]
    rollout = as_rollout(template, asked, scale, behind)
    assert rollout.scored
    assert tokenizer.decode(rollout.ids) == "I end with [RESULT] 4\n</think>\n\n[RESULT] "


def test_a_prompt_is_asked_as_a_judge_asks_it(tmp_path):
    tokenizer = make_tokenizer()
    rows = [{"prompt": row["prompt"], "score": row["score"]} for row in make_rows(8, chat=True)]
    trainer = REALTrainer(
        make_model(),
        REALConfig(str(tmp_path), **{**REAL, "score_values": None, "score_marker": None}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.model.train()
    trainer._generate_and_score_completions(rows[:4] * 2)
    wanted = tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_dict=False)
    assert trainer._sampled_prompts[0] == wanted


# Killed and resumed.


def train_to_the_end(output_dir: Path) -> dict[str, torch.Tensor]:
    trainer = make(
        output_dir,
        max_steps=10,
        optim="adamw_torch",
        learning_rate=0.01,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir) is not None)
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.process
def test_a_training_that_is_killed_five_times_ends_with_the_same_weights(tmp_path):
    whole = train_to_the_end(tmp_path / "whole")
    for kill in range(5):
        process = processes.start(train_to_the_end, tmp_path / "parts")
        until = time.monotonic() + 60
        reached = f"checkpoint-{2 * kill + 1}"
        while not (tmp_path / "parts" / reached).exists() and process.exitcode is None and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()
        process.join()
    assert last_complete_checkpoint(tmp_path / "parts") is not None
    parts = train_to_the_end(tmp_path / "parts")
    for name, weight in whole.items():
        assert torch.equal(parts[name], weight), name
