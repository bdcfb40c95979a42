"""Adapters in training: each variant starts at the seed and loads as it was saved, or is refused before it trains."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_rows, make_tokenizer, make_trainer
from peft import EvaConfig, FourierFTConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_tract import TransformersBackend

TOKENIZER = make_tokenizer()
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{start: {"init_lora_weights": start} for start in ("gaussian", "orthogonal", "pissa", "olora", "mica")},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "target_parameters": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}
CHANGED = ("pissa", "olora", "modules_to_save", "target_parameters")


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([TOKENIZER("is this polite? it is short [RESULT] ").input_ids])).logits


def trained(output_dir: Path, model: Any, **settings: Any) -> Any:
    settings = {"max_steps": 2, "optim": "adamw_torch", **settings}
    return make_trainer(output_dir, make_rows(8), model=model, tokenizer=TOKENIZER, **settings)


@pytest.fixture
def seed(tmp_path, request) -> Path:
    """A seed model's directory."""
    path = tmp_path / "seed"
    name = getattr(request, "param", "llama")
    make_model("qwen3_moe" if name == "target_parameters" else "llama", std=0.1).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")  # PEFT's: it is given no rows
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # likewise
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT:UserWarning")  # PEFT's: it is meant here
@pytest.mark.parametrize(("seed", "name"), [(name, name) for name in VARIANTS], indirect=["seed"])
def test_a_variant_starts_at_the_seed_and_loads_as_it_was_saved(tmp_path, seed, name):
    model = AutoModelForCausalLM.from_pretrained(seed)
    wanted = logits(model)
    trainer = trained(tmp_path, model, extra={"peft_config": lora(**VARIANTS[name])})
    torch.testing.assert_close(logits(trainer.model), wanted, rtol=0, atol=1e-4)
    trainer.train()
    trainer.save_model()
    after = logits(trainer.model)
    assert (after - wanted).abs().max() > 0.01
    torch.testing.assert_close(logits(TransformersBackend(str(tmp_path)).model), after, rtol=0, atol=1e-4)
    # Stage two with the same loaded model.
    if name in CHANGED:
        with pytest.raises(ValueError, match="no longer the seed model"):
            trained(tmp_path, model, extra={"peft_config": lora(**VARIANTS[name])})
    else:
        again = trained(tmp_path, model, extra={"peft_config": lora(**VARIANTS[name])})
        torch.testing.assert_close(logits(again.model), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "dora", "pissa", "olora", "modules_to_save"])
def test_an_unloaded_model_is_the_seed_or_refused(tmp_path, name):
    model = make_model(std=0.1)
    wanted = logits(model)
    settings = {"peft_config": lora(**VARIANTS[name])}
    trainer = trained(tmp_path, model, extra=settings)
    trainer.train()
    unloaded = trainer.model.unload()
    if name in CHANGED:
        with pytest.raises(ValueError, match="no longer the seed model"):
            trained(tmp_path, unloaded, extra=settings)
    else:
        torch.testing.assert_close(logits(trained(tmp_path, unloaded, extra=settings).model), wanted, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # PEFT's
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT:UserWarning")  # likewise
@pytest.mark.parametrize("again", [None, lora(target_modules=["gate_proj"])])
def test_a_model_with_layers_of_an_earlier_adapter_is_refused(tmp_path, seed, again):
    model = AutoModelForCausalLM.from_pretrained(seed)
    trained(tmp_path, model, extra={"peft_config": lora(target_modules=["q_proj"])})
    wanted = "holds the layers of an adapter" if again is None else r"where the new one has none \(.*q_proj\)"
    with pytest.raises(ValueError, match=wanted):
        trained(tmp_path, model, extra={"peft_config": again})


@pytest.mark.parametrize("again", [None, lora()])
def test_an_adapter_that_transformers_loaded_is_refused(tmp_path, seed, again):
    get_peft_model(AutoModelForCausalLM.from_pretrained(seed), lora()).save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds the layers of an adapter, but is no PeftModel"):
        trained(tmp_path, model, extra={"peft_config": again})


def test_an_adapter_beside_an_older_full_model_is_no_seed(tmp_path, seed):
    get_peft_model(AutoModelForCausalLM.from_pretrained(seed), lora()).save_pretrained(seed)
    with pytest.raises(ValueError, match="seed is an adapter, but training starts from a full model"):
        trained(tmp_path, str(seed))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_an_adapter_on_weights_that_were_not_saved_is_refused(tmp_path, seed, wrapped, shards):
    def on(model: Any, adapter: LoraConfig) -> Any:
        if wrapped:
            return trained(tmp_path, get_peft_model(model, adapter))
        return trained(tmp_path, model, extra={"peft_config": adapter})

    first = on(AutoModelForCausalLM.from_pretrained(seed), lora())
    first.train()
    merged = first.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", max_shard_size=shards)
    with pytest.raises(ValueError, match=r"of this model is not what it is in .*seed.*save_pretrained"):
        on(merged, lora())
    on(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16), lora())


@pytest.mark.parametrize("row", [0, 20, -1])
def test_a_row_of_the_embeddings_that_was_changed_by_hand_is_noticed_unless_it_is_saved(tmp_path, seed, row):
    model = AutoModelForCausalLM.from_pretrained(seed)
    with torch.no_grad():
        model.get_input_embeddings().weight[row] += 1.0
    trained(tmp_path, model, extra={"peft_config": lora(modules_to_save=["embed_tokens", "lm_head"])})
    model = AutoModelForCausalLM.from_pretrained(seed)
    with torch.no_grad():
        model.get_input_embeddings().weight[row] += 1.0
    with pytest.raises(ValueError, match=r"of this model is not what it is in .*seed"):
        trained(tmp_path, model, extra={"peft_config": lora()})


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga"])
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'corda':UserWarning")  # PEFT's
def test_a_start_that_loading_does_not_repeat_is_refused(tmp_path, start):
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}'"):
        trained(tmp_path, make_model(), extra={"peft_config": lora(init_lora_weights=start)})


@pytest.mark.parametrize(
    ("setting", "config"),
    [
        ("init_lora_weights", lora(init_lora_weights=False)),
        ("init_weights", FourierFTConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")),  # False by default
        ("layer_replication", lora(layer_replication=[(0, 1), (0, 2)])),
    ],
)
def test_a_start_that_is_not_the_seed_model_is_refused(tmp_path, setting, config):
    with pytest.raises(ValueError, match=f"{setting}.* does not start from the seed model"):
        trained(tmp_path, make_model(), extra={"peft_config": config})


@pytest.mark.parametrize(("names", "trains"), [(["default", "judge"], "judge"), (["judge"], "judge"),
                                               (["default", "old"], "default")])  # fmt: skip
def test_the_adapter_that_was_trained_is_the_one_that_is_saved(tmp_path, seed, names, trains):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(seed), lora(), adapter_name=names[0])
    for other in names[1:]:
        model.add_adapter(other, lora())
    model.set_adapter(trains)
    trainer = trained(tmp_path, model, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    wanted = logits(trainer.model)
    for saved in (tmp_path, tmp_path / "checkpoint-2"):
        torch.testing.assert_close(logits(TransformersBackend(str(saved)).model), wanted, rtol=0, atol=1e-5)
        assert not [path.name for path in saved.iterdir() if path.name in ("default", "judge", "old")]


def test_training_of_a_named_adapter_goes_on_from_its_checkpoint(tmp_path, seed):
    def run(output_dir: Path, **settings: Any) -> Any:
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(seed), lora(), adapter_name="judge")
        trainer = trained(output_dir, model, save_strategy="steps", save_steps=1, **settings)
        trainer.train(resume_from_checkpoint=(output_dir / "checkpoint-1").exists())
        return trainer

    whole = run(tmp_path / "whole", max_steps=2)
    run(tmp_path / "cut", max_steps=1)
    torch.testing.assert_close(logits(run(tmp_path / "cut", max_steps=2).model), logits(whole.model))


@pytest.mark.parametrize("now", [{"lora_alpha": 16}, {"use_rslora": True}, None])
def test_a_checkpoint_of_another_adapter_is_refused_by_what_differs(tmp_path, now):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trained(tmp_path, make_model(), extra={"peft_config": lora()}, **settings).train()
    config = None if now is None else lora(**now)
    trainer = trained(tmp_path, make_model(), extra={"peft_config": config}, **{**settings, "max_steps": 2})
    with pytest.raises(ValueError, match=rf"adapter\.{next(iter(now or ['r']))} was .+ and is "):
        trainer.train(resume_from_checkpoint=True)


def test_nothing_is_saved_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    names = ("config.json", "training_args.bin", "model.safetensors", "tract_config.json")
    for name in names:
        (tmp_path / name).write_text("mine")
        (out / name).symlink_to(tmp_path / name)
    for name in ("checkpoint-1", "notes"):
        (out / name).symlink_to(tmp_path / "elsewhere")
    trainer = trained(out, make_model(), save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    assert {(tmp_path / name).read_text() for name in names} == {"mine"}
    assert not list((tmp_path / "elsewhere").iterdir())
    assert [path.name for path in out.iterdir() if path.is_symlink()] == ["notes"]


def test_a_whole_model_in_the_directory_of_an_adapter_is_the_judge(tmp_path, seed):
    old = get_peft_model(AutoModelForCausalLM.from_pretrained(seed), lora())
    old.save_pretrained(tmp_path / "judge")
    trainer = trained(tmp_path / "judge", make_model(seed=5))
    trainer.save_model()
    loaded = TransformersBackend(str(tmp_path / "judge")).model
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=1e-5)


def test_what_was_fitted_to_an_earlier_judge_of_the_directory_is_not_the_new_ones(tmp_path):
    files = [tmp_path / name for name in ("tract_calibration.json", "tract_prompt.json")]
    for file in files:
        file.write_text("{}")
        os.utime(file, (1e9, 1e9))
    trainer = trained(tmp_path, make_model(), max_steps=1)
    trainer.train()
    trainer.save_model()
    assert not any(file.exists() for file in files)
    files[0].write_text("{}")
    trainer.save_model()
    assert files[0].exists()


def test_several_adapters_at_once_are_refused(tmp_path):
    model = get_peft_model(make_model(), lora())
    model.add_adapter("judge", lora())
    model.base_model.set_adapter(["default", "judge"])
    with pytest.raises(ValueError, match="default, judge are active at once"):
        trained(tmp_path, model)


def test_an_adapter_that_is_frozen_is_refused(tmp_path):
    model = get_peft_model(make_model(), lora())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable weights in the adapter default"):
        trained(tmp_path, model)
