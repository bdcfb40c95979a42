#!/usr/bin/env bash
# PEFT: the "linear" average of an adapter with itself, a half of each, is twice the adapter; the "ties" average is half of it.
#
# Guess beforehand: `add_weighted_adapter(["a", "b"], weights=[0.5, 0.5], combination_type=...)` makes the weighted sum of two
#   adapters, exactly or nearly. Where both are the same adapter, and nothing is pruned (`density=1.0`), every way of
#   combining gives that adapter back, since halves of the same thing add up to it.
# What happens: "svd" and "cat" do. "linear", "dare_linear" and "magnitude_prune" give twice the adapter, "ties" and
#   "dare_ties" half of it. With four copies at a quarter each, "linear" gives four times the adapter. So the strength of an
#   average grows with the number of what is averaged. There is no warning.
# Why: these types combine the matrices A and B of LoRA one by one, each with the square root of the weight, and the product
#   of two sums has the cross terms as well: (√½ A + √½ A)(√½ B + √½ B) is 2AB. The means of "ties" are over the adapters
#   that agree in sign, so there only the roots are left: √½ A √½ B. The documentation calls "linear" a very rough
#   approximation; of adapters that are alike, such as checkpoints of one run, the cross terms are most of the result.
# Instead: "cat", which is exact, or "svd"; or average the merged weights.
#
# Versions: Python 3.11, torch 2.13.0, peft 0.21.2, transformers 5.24.0, accelerate 1.15.0. CPU, a few seconds once installed.
# Seen (the average of equal adapters as a multiple of the adapter; over its weights this spreads by less than 1e-4):
#   2 at 0.50:  svd 1.00, cat 1.00, linear 2.00, dare_linear 2.00, magnitude_prune 2.00, ties 0.50, dare_ties 0.50
#   4 at 0.25:  svd 1.00, cat 1.00, linear 4.00, dare_linear 4.00, magnitude_prune 4.00, ties 0.25, dare_ties 0.25
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

KINDS = ["svd", "cat", "linear", "dare_linear", "magnitude_prune", "ties", "dare_ties"]


def multiples(count):
    """Of each way of combining: how many times the adapter the average of `count` copies of it is."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes))
    names = [f"copy_{number}" for number in range(count)]
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name=names[0])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    for name in names[1:]:
        model.add_adapter(name, config)
        for matrices in (layer.lora_A, layer.lora_B):
            matrices[name].load_state_dict(matrices[names[0]].state_dict())
    adapter = layer.get_delta_weight(names[0])
    found = {}
    for kind in KINDS:
        density = {} if kind in ("svd", "cat", "linear") else {"density": 1.0}
        model.add_weighted_adapter(names, [1 / count] * count, kind, combination_type=kind, **density)
        ratios = layer.get_delta_weight(kind) / adapter
        assert ratios.std() < 1e-4
        found[kind] = ratios.mean().item()
    print(f"{count} at {1 / count:.2f}:  " + ", ".join(f"{kind} {multiple:.2f}" for kind, multiple in found.items()))
    return found


holds = True
for count in (2, 4):
    expected = dict.fromkeys(KINDS, float(count)) | {"svd": 1.0, "cat": 1.0, "ties": 1 / count, "dare_ties": 1 / count}
    holds &= all(abs(multiple - expected[kind]) < 0.01 for kind, multiple in multiples(count).items())
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
