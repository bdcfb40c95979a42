#!/usr/bin/env bash
# TRL: on a CPU, the fused head of SFT and GRPO holds tensors far larger than the logits that it is there to avoid.
#
# Guess beforehand: `add_fused_lm_head` projects in tiles, so that the (batch, length, vocabulary) logits never exist; a
#   step needs less than with the plain head, or as much where the vocabulary is no larger than a tile.
# What happens: with 4 rows of 300 tokens and a vocabulary of 2,000, all logits are 9.2 MiB, and that is the largest tensor
#   of a step with the plain head. With the fused head it is 149.5 MiB, 16 times as much. The loss is the same.
# Why: a tile is 32,768 tokens of the vocabulary wide, whatever the vocabulary; where there is no Triton kernel the buffer
#   has that width for each position, up to 4,096 of them, the prompt's included, and most of its columns hold nothing.
# Instead: nothing in the configuration; the width is a constant of the module. Models with small vocabularies (tests, bytes)
#   and CPUs pay for it.
#
# Versions: Python 3.11, torch 2.13.0, transformers 5.24.0, trl 1.16.0. CPU, seconds once installed.
# Seen:
#   all logits of the batch: 9.2 MiB
#   plain head: largest tensor    9.2 MiB, loss 7.6018
#   fused head: largest tensor  149.5 MiB, loss 7.6018
#
# Exits 0 if the libraries still behave so, 1 if they no longer do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet trl==1.16.0 transformers==5.24.0 numpy==2.3.5
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

VOCABULARY, LENGTH, ROWS = 2_000, 300, 4


class Largest(TorchDispatchMode):
    """The largest storage behind any tensor that an operator gives back, MiB."""

    mib = 0.0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        given = function(*arguments, **(keywords or {}))
        for each in given if isinstance(given, (tuple, list)) else [given]:
            if isinstance(each, torch.Tensor):
                self.mib = max(self.mib, each.untyped_storage().nbytes() / 2**20)
        return given


def step(fused):
    """Largest tensor of a forward and backward pass, and the loss."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=1, **sizes))
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    options = {}
    if fused:
        add_fused_lm_head(model)
        options = {"fused_lm_head": True}
    with Largest() as largest:
        loss = model(ids, labels=ids, **options).loss
        loss.backward()
    return largest.mib, loss.item()


plain, fused = step(False), step(True)
logits = ROWS * LENGTH * VOCABULARY * 4 / 2**20
print(f"all logits of the batch: {logits:.1f} MiB")
print(f"plain head: largest tensor {plain[0]:6.1f} MiB, loss {plain[1]:.4f}")
print(f"fused head: largest tensor {fused[0]:6.1f} MiB, loss {fused[1]:.4f}")
holds = abs(plain[1] - fused[1]) < 1e-4 and plain[0] < 1.5 * logits and fused[0] > 10 * logits
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
