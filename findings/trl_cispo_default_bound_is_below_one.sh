#!/usr/bin/env bash
# TRL: with `loss_type="cispo"` and the other defaults, the gradient of an unchanged policy is a fifth of what it should be.
#
# Guess beforehand: CISPO clips the importance ratio from above, and a ratio of 1, where the policy has not changed since it
#   sampled, is not clipped under any loss type. So the first step on fresh samples has the same gradient under "cispo" as
#   under "dapo", which normalizes alike, whatever bound `epsilon_high=None` stands for: 1.2 as elsewhere, or the
#   recommended 5.0.
# What happens: the gradient of "cispo" is a fifth of that of "dapo". With `epsilon_high=5.0` it is the same. There is no
#   warning; only the metric `cispo_clip_ratio` shows it, which counts all tokens with a positive advantage as clipped.
# Why: `epsilon_high=None` becomes `epsilon`, 0.2. Elsewhere the bound is `1 + epsilon_high`, but for "cispo" it is
#   `epsilon_high` itself, so every ratio above 0.2 becomes 0.2: one of 0.5 weighs as much as one of 1 or 2, and hardly any
#   importance weight is left. AdamW divides a constant factor away, but not beside a KL term (`beta`).
# Instead: set `epsilon_high=5.0`, which the documentation recommends for this loss.
#
# Versions: Python 3.11, torch 2.13.0, trl 1.16.0, transformers 5.24.0, accelerate 1.15.0, datasets 5.2.0. CPU, about 20
#   seconds once installed.
# Seen (norm of the gradient of one step on fresh samples, the same for all):
#   loss_type=cispo:                      0.0736, cispo_clip_ratio 0.46
#   loss_type=cispo, epsilon_high=5.0:    0.3680, cispo_clip_ratio 0.00
#   loss_type=dapo:                       0.3680
#   loss_type=bnpo:                       0.3680
#
# Exits 0 if the libraries still behave so, 1 if they no longer do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet trl==1.16.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.3.5
cd "$folder"
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import math
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

WORDS = ["<pad>", "<eos>", *"ABCDEF"]


def tokenizer():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, bos_token_id=None, eos_token_id=1, **sizes))


def step(**loss):
    sampled = []

    def reward(completions, **kwargs):
        sampled.extend(completions)
        return [float(completion.count("A") + len(completion)) for completion in completions]

    settings = dict(per_device_train_batch_size=8, num_generations=8, max_completion_length=6, gradient_accumulation_steps=1)
    settings |= dict(use_cpu=True, bf16=False, disable_tqdm=True, report_to="none")
    args = GRPOConfig("out", max_steps=1, logging_steps=1, save_strategy="no", **settings, **loss)
    rows = Dataset.from_dict({"prompt": ["A B C"]})
    trainer = GRPOTrainer(model(), reward, args, rows, processing_class=tokenizer())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = trainer.state.log_history[0]
    clipped = f", cispo_clip_ratio {log['cispo_clip_ratio']:.2f}" if "cispo_clip_ratio" in log else ""
    name = ", ".join(f"{name}={value}" for name, value in loss.items())
    print(f"{name + ':':37} {log['grad_norm']:.4f}{clipped}")
    return log["grad_norm"], sampled


default, bounded = step(loss_type="cispo"), step(loss_type="cispo", epsilon_high=5.0)
dapo, bnpo = step(loss_type="dapo"), step(loss_type="bnpo")
holds = default[1] == bounded[1] == dapo[1] == bnpo[1]
holds &= all(math.isclose(other[0], 5 * default[0], rel_tol=1e-4) for other in (bounded, dapo, bnpo))
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
