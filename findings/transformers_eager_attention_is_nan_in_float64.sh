#!/usr/bin/env bash
# transformers: in float64, eager attention gives NaN for every real token of a row that is padded on the left.
#
# Guess beforehand: float64 is what one takes for a reference. A padded batch gives in it what float32 gives, with smaller
#   errors, whichever attention is set: the two differ by rounding alone.
# What happens: with `attn_implementation="eager"` all real tokens of a row with padding on the left have NaN logits. The same
#   row without padding or padded on the right, the same model in float32, and float64 with "sdpa" are all finite and agree
#   to 1e-7. There is no warning.
# Why: the mask is filled with the lowest number of the model's type, so that a token that may see nothing (padding on the
#   left, which sees only padding) gets equal weights. `eager_attention_forward` takes the softmax in float32, where the
#   lowest float64 is -inf: a softmax of -inf alone is NaN. In the next layer, the real tokens give these places the weight
#   0, and 0 times NaN is NaN.
# Instead: `attn_implementation="sdpa"` for float64; or no padding on the left.
#
# Versions: Python 3.11, torch 2.13.0, transformers 5.24.0. CPU, a few seconds once installed.
# Seen (logits of the real tokens, and their largest difference from float64, "sdpa", without padding):
#   float32 sdpa,  padding none:    0 of 160 NaN, off by 4e-08
#   float32 sdpa,  padding right:   0 of 160 NaN, off by 4e-08
#   float32 sdpa,  padding left:    0 of 160 NaN, off by 4e-08
#   float32 eager, padding none:    0 of 160 NaN, off by 4e-08
#   float32 eager, padding right:   0 of 160 NaN, off by 4e-08
#   float32 eager, padding left:    0 of 160 NaN, off by 4e-08
#   float64 sdpa,  padding none:    0 of 160 NaN, off by 0e+00
#   float64 sdpa,  padding right:   0 of 160 NaN, off by 1e-17
#   float64 sdpa,  padding left:    0 of 160 NaN, off by 1e-17
#   float64 eager, padding none:    0 of 160 NaN, off by 1e-08
#   float64 eager, padding right:   0 of 160 NaN, off by 1e-08
#   float64 eager, padding left:  160 of 160 NaN, off by nan
#
# Exits 0 if the libraries still behave so, 1 if they no longer do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 numpy==2.3.5
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = torch.arange(1, 6)
PADDING = torch.zeros(3, dtype=torch.long)
LEFT, RIGHT = torch.cat([PADDING, TOKENS]), torch.cat([TOKENS, PADDING])


@torch.no_grad()
def logits(attention, dtype, row):
    """Of the real tokens of the row, which has no other row beside it."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=32, num_hidden_layers=2, attn_implementation=attention, **sizes)
    real = row != 0
    positions = (real.long().cumsum(0) - 1).clamp(min=0)[None]
    model = LlamaForCausalLM(config).to(dtype).eval()
    return model(row[None], attention_mask=real.long()[None], position_ids=positions).logits[0, real]


reference = logits("sdpa", torch.float64, TOKENS)
nans = {}
largest = 0.0
for dtype in (torch.float32, torch.float64):
    for attention in ("sdpa", "eager"):
        for side, row in (("none", TOKENS), ("right", RIGHT), ("left", LEFT)):
            seen = logits(attention, dtype, row)
            count = nans[dtype, attention, side] = seen.isnan().sum().item()
            difference = (seen - reference).abs().max().item()
            name = f"{str(dtype)[6:]} {attention + ',':6} padding {side + ':':6}"
            print(f"{name} {count:3} of {seen.numel()} NaN, off by {difference:.0e}")
            largest = max(largest, 0 if count else difference)
only = [case for case, count in nans.items() if count]
holds = only == [(torch.float64, "eager", "left")] and nans[only[0]] == reference.numel() and largest < 1e-5
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
