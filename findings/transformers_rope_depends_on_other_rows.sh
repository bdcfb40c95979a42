#!/usr/bin/env bash
# transformers: with "longrope" a row's logits depend on the longest row of its batch, with "dynamic" on earlier batches too.
#
# Guess beforehand: padding is masked and rows do not see each other, so the logits of a row are the same alone and in a batch,
#   to rounding; and a model in `eval()` without a cache gives the same logits for the same input whenever it is asked.
#   RoPE that is scaled for long texts depends on the length of the text.
# What happens: it depends on the length of the batch. A row of 6 tokens, within the original length of 8, has other logits if a
#   row of 12 is beside it, by as much as logits differ at all. Under "dynamic" a row of 12 also has other logits after the
#   model has seen a row of 24, until a batch that is shorter than the original length comes. Other kinds ("linear", "yarn",
#   "llama3") do none of this. There is no warning.
# Why: the frequencies are buffers of the model. "longrope" sets them in each forward pass by the largest position of the batch;
#   "dynamic" makes them for the largest position seen so far, and goes back only below the original length.
# Instead: batches of rows on one side of `original_max_position_embeddings` for "longrope" (Phi 3 with a long context, for
#   one); for "dynamic" rows of one length.
#
# Versions: Python 3.11, torch 2.13.0, transformers 5.24.0. CPU, a few seconds once installed.
# Seen (largest change of a row's logits, whose standard deviation is 1.6):
#   default:  6 tokens, beside 12: 3e-06; 12 tokens, after 24: 0e+00
#   linear:   6 tokens, beside 12: 2e-06; 12 tokens, after 24: 0e+00
#   llama3:   6 tokens, beside 12: 2e-06; 12 tokens, after 24: 0e+00
#   yarn:     6 tokens, beside 12: 2e-06; 12 tokens, after 24: 0e+00
#   dynamic:  6 tokens, beside 12: 1e+00; 12 tokens, after 24: 1e+00
#   longrope: 6 tokens, beside 12: 5e+00; 12 tokens, after 24: 0e+00
#
# Exits 0 if the libraries still behave so, 1 if they no longer do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 numpy==2.3.5
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ORIGINAL, HEAD = 8, 16
KINDS = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "longrope": {"factor": 4.0, "short_factor": [1.0] * (HEAD // 2), "long_factor": [4.0] * (HEAD // 2)},
}


def make(kind):
    torch.manual_seed(0)
    sizes = dict(hidden_size=2 * HEAD, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2)
    length = ORIGINAL if kind == "dynamic" else 4 * ORIGINAL
    original = {} if kind in ("default", "linear", "dynamic") else {"original_max_position_embeddings": ORIGINAL}
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **KINDS[kind], **original}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=2, max_position_embeddings=length, rope_parameters=rope, **sizes)
    config.initializer_range = 0.3
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model, *rows):
    """Of the first row, in a batch with the others, padded on the right."""
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return model(ids, attention_mask=mask, use_cache=False).logits[0, : len(rows[0])]


def case(kind):
    short, long, longer = (torch.arange(1, length + 1) for length in (6, 12, 24))
    alone = logits(make(kind), short)
    beside = logits(make(kind), short, long)
    model = make(kind)
    before = logits(model, long)
    logits(model, longer)
    after = logits(model, long)
    changes = (alone - beside).abs().max().item(), (before - after).abs().max().item()
    print(f"{kind + ':':9} 6 tokens, beside 12: {changes[0]:.0e}; 12 tokens, after 24: {changes[1]:.0e}")
    return changes


found = {kind: case(kind) for kind in KINDS}
moved = {kind: tuple(change > 0.1 for change in changes) for kind, changes in found.items()}
still = all(change < 1e-4 or change > 0.1 for changes in found.values() for change in changes)
expected = dict.fromkeys(KINDS, (False, False)) | {"dynamic": (True, True), "longrope": (True, False)}
holds = still and moved == expected
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
