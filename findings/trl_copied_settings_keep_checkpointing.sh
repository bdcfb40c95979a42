#!/usr/bin/env bash
# TRL: a copy of an SFTConfig with `gradient_checkpointing=False` still checkpoints.
#
# Guess beforehand: `SFTConfig` documents `gradient_checkpointing`, which it turns on. `dataclasses.replace` with False, or a
#   configuration made again from `to_dict()` with False in it, turns it off, as `SFTConfig(gradient_checkpointing=False)`
#   does. If the name is on its way out, there is a warning that names the new one.
# What happens: each layer still runs twice per step, and the copy has `gradient_checkpointing=True`. There is no warning:
#   the value given is replaced. Other defaults of TRL's, such as `logging_steps`, are changed by the same call.
# Why: transformers has called it `activation_checkpointing` since. The first configuration fills in the new name from TRL's
#   default for the old one. The copy then has both, and the new name counts; the warning is only for the old name alone.
# Instead: change `activation_checkpointing`.
#
# Versions: Python 3.11, torch 2.13.0, trl 1.16.0, transformers 5.24.0, accelerate 1.15.0, datasets 5.2.0. CPU, about 20
#   seconds once installed.
# Seen (how often the first layer runs in one step):
#   SFTConfig():                                            2, gradient_checkpointing True
#   SFTConfig(gradient_checkpointing=False):                1, gradient_checkpointing False
#   replace(SFTConfig(), gradient_checkpointing=False):     2, gradient_checkpointing True
#   to_dict() with gradient_checkpointing=False:            2, gradient_checkpointing True
#   replace(SFTConfig(), activation_checkpointing=False):   1, gradient_checkpointing False
#   warnings about the copies: 0
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
import warnings
from dataclasses import replace

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

WORDS = ["<pad>", "<eos>", *"ABCDEF"]
SETTINGS = dict(output_dir="out", max_steps=1, use_cpu=True, bf16=False, disable_tqdm=True, report_to="none")
SETTINGS |= dict(save_strategy="no", per_device_train_batch_size=1)


def tokenizer():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def runs(config):
    """How often the first layer runs in one step."""
    sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, bos_token_id=None, eos_token_id=1, **sizes))
    counted = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: counted.append(1))
    rows = Dataset.from_dict({"text": ["A B C D"]})
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return len(counted)


first = SFTConfig(**SETTINGS)
# to_dict() writes a placeholder for every field whose name ends in "_token".
known = {name: value for name, value in first.to_dict().items() if not name.endswith("_token")}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    replaced = replace(first, gradient_checkpointing=False, logging_steps=3)
    again = SFTConfig(**{**known, "gradient_checkpointing": False})
said = [warning for warning in caught if "checkpointing" in str(warning.message)]
configs = {
    "SFTConfig()": first,
    "SFTConfig(gradient_checkpointing=False)": SFTConfig(**SETTINGS, gradient_checkpointing=False),
    "replace(SFTConfig(), gradient_checkpointing=False)": replaced,
    "to_dict() with gradient_checkpointing=False": again,
    "replace(SFTConfig(), activation_checkpointing=False)": replace(first, activation_checkpointing=False),
}
shown = {name: config.gradient_checkpointing for name, config in configs.items()}
seen = {name: runs(config) for name, config in configs.items()}
for name, count in seen.items():
    print(f"{name + ':':55} {count}, gradient_checkpointing {shown[name]}")
print(f"warnings about the copies: {len(said)}")
holds = list(seen.values()) == [2, 1, 2, 2, 1] and not said and replaced.logging_steps == 3
holds &= [shown[name] for name in seen] == [True, False, True, True, False]
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
