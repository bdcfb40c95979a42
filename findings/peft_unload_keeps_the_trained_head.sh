#!/usr/bin/env bash
# PEFT's `unload()` does not give the base model back where the adapter has `modules_to_save`: the trained copy stays.
#
# Guess beforehand: `unload()` "returns the base model by removing all the PEFT modules", without merging. So the model that
#   it returns computes what it computed before the adapter, as it does within `disable_adapter()`, which puts the original
#   module back: PEFT keeps it beside the copy all along. For an adapter of LoRA alone that is so.
# What happens: with `modules_to_save=["lm_head"]`, `disable_adapter()` is exactly the base model, but `unload()` leaves the
#   trained copy of the head in the model, and the original head is gone. PEFT's own advice for a second adapter on a model
#   ("make sure to call `.unload()` before") therefore starts that adapter at another model than the first one.
# Why: `ModulesToSaveWrapper.unload_and_optionally_merge_module` returns `modules_to_save[active_adapter]`, whether it is
#   asked to merge or not. Which is right for `merge_and_unload()`.
# Instead: copy the original state beforehand, or load the base model again.
#
# Versions: Python 3.11, torch 2.13.0, peft 0.21.2, transformers 5.24.0, accelerate 1.15.0. CPU, a few seconds once installed.
# Seen (largest difference from the base model's logits):
#   lora alone:      trained 5.8e-05, adapter disabled 0.0e+00, unloaded 0.0e+00
#   lora and head:   trained 3.9e+00, adapter disabled 0.0e+00, unloaded 3.9e+00
#   a second adapter on the unloaded model, before any step: 3.9e+00
#
# Exits 0 if the libraries still behave so, 1 if they no longer do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 numpy==2.3.5
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = torch.arange(8)[None]


def base_model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=32, num_hidden_layers=2, tie_word_embeddings=False, **sizes)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def distance(model):
    return (model(TOKENS).logits - base_model()(TOKENS).logits).abs().max().item()


def differences(**saved):
    model = get_peft_model(base_model(), LoraConfig(r=2, target_modules=["q_proj"], **saved)).eval()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0)
    for _ in range(2):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = distance(model)
    with model.disable_adapter():
        disabled = distance(model)
    unloaded = model.unload()
    return trained, disabled, distance(unloaded), unloaded


*lora, _ = differences()
*head, unloaded = differences(modules_to_save=["lm_head"])
second = distance(get_peft_model(unloaded, LoraConfig(r=2, target_modules=["q_proj"])).eval())
for name, (trained, disabled, after) in (("lora alone", lora), ("lora and head", head)):
    print(f"{name + ':':16} trained {trained:.1e}, adapter disabled {disabled:.1e}, unloaded {after:.1e}")
print(f"a second adapter on the unloaded model, before any step: {second:.1e}")
same = lora[1] == lora[2] == head[1] == 0 and head[2] > 1 and second > 1
print("as described" if same else "CHANGED: not what is described at the top")
sys.exit(not same)
PYTHON
