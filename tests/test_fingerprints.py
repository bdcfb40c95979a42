"""A loaded model's fingerprint names what changed, and nothing else changes it."""

import pytest
import torch
from conftest import make_model, make_tokenizer, save_seed
from peft import LoraConfig, get_peft_model

from trl_tract import TransformersBackend


def made():
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(make_model(), lora), make_tokenizer()


def test_the_same_model_loaded_again_and_used_has_the_same():
    model, tokenizer = made()
    backend = TransformersBackend(model, tokenizer)
    before = backend.fingerprint()
    backend.generate([[5, 6]], max_new_tokens=3)
    backend.next_token_logprobs([[5, 6]], [7])
    tokenizer(["a", "a long one"], padding=True, truncation=True, max_length=2)
    assert backend.fingerprint() == before == TransformersBackend(*made()).fingerprint()
    assert set(before) == {
        *("model weights", "adapter weights", "adapter configuration", "configuration", "tokenizer", "chat template")
    }


def train(model, tokenizer, part):
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if ("lora" in name) == (part == "adapter weights"):
            weight.data += 1e-4 * torch.randn_like(weight)


CHANGES = {
    "model weights": train,
    "adapter weights": train,
    "adapter configuration": lambda model, *_: setattr(model.peft_config["default"], "lora_alpha", 99),
    "configuration": lambda model, *_: setattr(model.config, "rms_norm_eps", 0.1),
    "tokenizer": lambda model, tokenizer, _: tokenizer.add_tokens(["<new>"]),
    "chat template": lambda model, tokenizer, _: setattr(tokenizer, "chat_template", "{{ messages }}"),
}


@pytest.mark.parametrize("part", CHANGES)
def test_what_changed_is_named(part):
    model, tokenizer = made()
    backend = TransformersBackend(model, tokenizer)
    before = backend.fingerprint()
    CHANGES[part](model, tokenizer, part)
    after = backend.fingerprint()
    assert {name for name in before if before[name] != after[name]} == {part}


SWITCHES = {
    "another adapter": ("adapter configuration", lambda model, _: model.set_adapter("second")),
    "no adapter": ("adapter configuration", lambda model, _: model.base_model.disable_adapter_layers()),
    "a stronger adapter": (
        "adapter configuration",
        lambda model, _: [layer.scale_layer(2.0) for layer in model.modules() if hasattr(layer, "scale_layer")],
    ),
    "other ends of a text": ("configuration", lambda model, _: setattr(model.generation_config, "eos_token_id", 2)),
    "another end of a turn": ("tokenizer", lambda _, tokenizer: setattr(tokenizer, "eos_token", "<|im_end|>")),
    "more bits": ("model weights", lambda model, _: model.get_base_model().float()),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_in_a_loaded_model_is_named(switch):
    part, change = SWITCHES[switch]
    model, tokenizer = made()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.get_base_model().to(torch.bfloat16)
    before = TransformersBackend(model, tokenizer).fingerprint()
    change(model, tokenizer)
    after = TransformersBackend(model, tokenizer).fingerprint()
    assert part in {name for name in before if before[name] != after[name]}


def test_a_model_that_was_loaded_here_is_told_by_its_files(tmp_path):
    save_seed(tmp_path)
    assert TransformersBackend(tmp_path).fingerprint() == {}


def test_a_parameter_that_is_not_in_memory_is_passed_over():
    model = make_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"))
    assert TransformersBackend(model, make_tokenizer()).fingerprint()["model weights"]
