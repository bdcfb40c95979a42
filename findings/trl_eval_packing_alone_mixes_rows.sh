#!/usr/bin/env bash
# TRL: with `eval_packing=True` and without `packing`, the rows of a packed evaluation see each other.
#
# Guess beforehand: `eval_packing` packs the evaluation set as `packing` packs the training set. With sdpa and the strategy
#   `bfd`, rows in one pack are kept apart, so `eval_loss` is that of separate rows, whatever is set for training.
# What happens: with `packing=True` beside it, it is. With `eval_packing=True` alone, `eval_loss` is another: each row is
#   computed behind the rows before it in its pack.
# Why: packs are kept apart by positions that start again at each row. The collator writes these only if it is padding-free,
#   and TRL decides that by `packing` and `padding_free`, not by `eval_packing`. Both sets share the one collator.
# Instead: evaluate without packing, or pack both sets.
#
# Versions: Python 3.11, torch 2.13.0, trl 1.16.0, transformers 5.24.0, accelerate 1.15.0, datasets 5.2.0. CPU, about 20
#   seconds once installed.
# Seen (eval_loss of 16 rows of equal length, 63 tokens of vocabulary, random weights):
#   packing=False, eval_packing=False:  5.1550
#   packing=True,  eval_packing=True:  5.1550
#   packing=False, eval_packing=True:  5.4359
#   No message says so.
#
# Exits 0 if the libraries still behave so, 1 if they no longer do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet trl==1.16.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.3.5
cd "$folder"
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import SFTConfig, SFTTrainer

WORDS = ["<pad>", "<eos>", *(f"w{number}" for number in range(61))]
words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, bos_token_id=None, eos_token_id=1, initializer_range=0.3, **sizes)
)
# Of one length, so that the mean over packs is the mean over rows.
rows = Dataset.from_dict({"text": [" ".join(f"w{(7 * row + 3 * at) % 61}" for at in range(7)) for row in range(16)]})


def loss(**settings):
    """`eval_loss` of the same model on the same rows."""
    config = SFTConfig(
        "out", max_length=64, use_cpu=True, bf16=False, disable_tqdm=True, report_to="none", **settings
    )
    trainer = SFTTrainer(model, config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer.evaluate()["eval_loss"]


settings = {
    "packing=False, eval_packing=False": dict(packing=False, eval_packing=False),
    "packing=True,  eval_packing=True": dict(packing=True, eval_packing=True),
    "packing=False, eval_packing=True": dict(packing=False, eval_packing=True),
}
seen = {name: loss(**each) for name, each in settings.items()}
for name, value in seen.items():
    print(f"{name}:  {value:.4f}")
apart, packed, alone = seen.values()
holds = abs(packed - apart) < 1e-4 and abs(alone - apart) > 0.02
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
