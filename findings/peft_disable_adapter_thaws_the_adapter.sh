#!/usr/bin/env bash
# PEFT: an adapter that was loaded frozen is trainable after one pass within `disable_adapter()`, and training changes it.
#
# Guess beforehand: `disable_adapter()` is a context for a pass through the base model, for a reference say, and leaves the
#   model behind it as it was. An adapter that `PeftModel.from_pretrained` loaded for inference (`is_trainable=False`, frozen)
#   is frozen afterwards, so that a regression head on top of it trains alone.
# What happens: within the context nothing of the adapter is trainable, behind it all of it is, also what one had frozen by
#   hand. An optimizer of all that "requires a gradient" then trains the adapter with the head. There is no warning.
# Why: leaving the context calls `enable_adapter_layers()`, which is `set_adapter(active)` in each layer, and that sets
#   `requires_grad` of the active adapter to True. What it was before, and `inference_mode` of its configuration, which
#   stays True, are not looked at.
# Instead: freeze again after each such context (`model.set_requires_grad("default", False)`), or give the optimizer the
#   parameters by name.
#
# Versions: Python 3.11, torch 2.13.0, peft 0.21.2, transformers 5.24.0, accelerate 1.15.0. CPU, a few seconds once installed.
# Seen (parameters of the adapter that are trainable, and how far one training step moves its weights):
#   without the context:     loaded 0 of 128, at last   0, moved by 0.0e+00
#   a pass within it:        loaded 0 of 128, at last 128, moved by 8.1e-03
#   frozen again behind it:  loaded 0 of 128, at last   0, moved by 0.0e+00
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
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaModel

TOKENS = torch.arange(8)[None]


def base_model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2)
    return LlamaModel(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes)).eval()


def trainable(weights):
    return sum(each.numel() for each in weights if each.requires_grad)


def case(name, context, again):
    """A head is trained for one step on the hidden states of a model with an adapter that is loaded frozen."""
    model = PeftModel.from_pretrained(base_model(), "adapter").eval()
    head = torch.nn.Linear(16, 1)
    adapter = [each for parameter, each in model.named_parameters() if "lora_" in parameter]
    loaded, before = trainable(adapter), [each.detach().clone() for each in adapter]
    if context:
        with model.disable_adapter(), torch.no_grad():
            model(TOKENS)
            assert trainable(adapter) == 0
    if again:
        model.set_requires_grad("default", False)
    optimizer = torch.optim.SGD([each for each in [*model.parameters(), *head.parameters()] if each.requires_grad], lr=0.1)
    (head(model(TOKENS).last_hidden_state[:, -1]) - 3).square().sum().backward()
    optimizer.step()
    moved = max((now - then).abs().max().item() for now, then in zip(adapter, before))
    size = sum(each.numel() for each in adapter)
    print(f"{name + ':':24} loaded {loaded} of {size}, at last {trainable(adapter):3}, moved by {moved:.1e}")
    return loaded, trainable(adapter), moved


get_peft_model(base_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained("adapter")
without = case("without the context", False, False)
passed = case("a pass within it", True, False)
frozen = case("frozen again behind it", True, True)
holds = without == frozen == (0, 0, 0.0) and passed[:2] == (0, 128) and passed[2] > 1e-4
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
