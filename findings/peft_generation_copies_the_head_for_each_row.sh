#!/usr/bin/env bash
# PEFT: under a LoRA, the first pass of a bfloat16 generation on a CPU copies the output head once for each row.
#
# Guess beforehand: a LoRA on `q_proj` adds two small products to each attention layer. The head is not adapted, so that
#   `logits_to_keep=1`, which `generate` passes, costs the same as without the adapter.
# What happens: without the adapter the head is one product by its weight, (64, 32000). With it, it is a batched product
#   by (16, 64, 32000), a copy of the weight for each of the 16 rows: 62.5 MiB in one piece, where nothing else in the
#   pass needs more than 1. With SmolLM2-135M and 32 rows it is 1.7 GiB, and took two fifths of the time of writing 36 tokens.
# Why: of (16, 1, 64) hidden states cut out of (16, 50, 64) the rows have gaps, and `torch.matmul` then only folds the rows
#   into one product if the weight wants a gradient. PEFT freezes it; a model that was just loaded has all its weights open,
#   under `torch.no_grad()` too. In float32 the same batched product is made without the copy.
# Instead: hidden states without gaps (a forward pre-hook on the head that clones them), or open weights.
#
# Versions: Python 3.11, torch 2.13.0, transformers 5.24.0, peft 0.21.2. CPU, seconds once installed. What decides below are
#   the products' shapes; what a batched product allocates is up to the kernel (here that of a CPU with AVX512-BF16).
# Seen:
#   base: aten.mm.default by (64, 32000), largest allocation 1.0 MiB
#   lora: aten.bmm.default by (16, 64, 32000), largest allocation 62.5 MiB
#   lora, head closed to gaps: aten.mm.default by (64, 32000), largest allocation 1.0 MiB
#
# Exits 0 if the libraries still behave so, 1 if they no longer do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 peft==0.21.2 numpy==2.3.5
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

ROWS, LENGTH, HIDDEN, VOCABULARY = 16, 50, 64, 32_000
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)


class Heads(TorchDispatchMode):
    """Products by the head's weight: operator and shape."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function in PRODUCTS and arguments[1].shape[-1] == VOCABULARY:
            self.seen.append((str(function), tuple(arguments[1].shape)))
        return function(*arguments, **(keywords or {}))


def look(name, model):
    """The head's products in a pass as `generate` begins with, and the most MiB that an operator took by itself; the shape."""
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Heads() as heads:
        model(input_ids=ids, logits_to_keep=1)
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with torch.no_grad(), profile:
        model(input_ids=ids, logits_to_keep=1)
    most = max(event.self_cpu_memory_usage for event in profile.events()) / 2**20
    ((operator, shape),) = heads.seen
    print(f"{name}: {operator} by {shape}, largest allocation {most:.1f} MiB")
    return shape


torch.manual_seed(0)
sizes = dict(intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, **sizes)).bfloat16().eval()
plain = look("base", base)
adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).bfloat16().eval()
lora = look("lora", adapted)
base.lm_head.register_forward_pre_hook(lambda head, inputs: (inputs[0].clone(memory_format=torch.contiguous_format),))
closed = look("lora, head closed to gaps", adapted)
sys.exit(0 if plain == closed == (HIDDEN, VOCABULARY) and lora == (ROWS, HIDDEN, VOCABULARY) else 1)
PYTHON
