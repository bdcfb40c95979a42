#!/usr/bin/env bash
# TRL: where the tokenizer has no padding token, a reward model never sees the EOS that RewardTrainer appends to each response.
#
# Guess beforehand: RewardTrainer appends EOS to responses of plain text, so that the reward is read at a token that comes
#   after the whole response and tells that it is complete. With a tokenizer that has no padding token it pads with EOS, as
#   documented, and masks the padding. The reward is then read at the appended EOS as well: the row's last real token.
# What happens: with a padding token it is, and a response that breaks off earns another reward than the complete one. Without
#   one, the reward is read at the token before EOS, in training and afterwards: it does not depend on EOS at all, and a
#   response with EOS and the same one without it earn the same to the last bit. There is no warning.
# Why: TRL sets `pad_token_id` to that of EOS, in the model's configuration as well. The model takes the last token whose id
#   is not the padding's; it does not look at the attention mask.
# Instead: give `pad_token` another token of the vocabulary (`RewardConfig(pad_token=...)`), such as a reserved one.
#
# Versions: Python 3.11, torch 2.13.0, trl 1.16.0, transformers 5.24.0, accelerate 1.15.0, datasets 5.2.0. CPU, about 20
#   seconds once installed.
# Seen (the reward after ten steps; "A B C" with and without the EOS that all training rows end with):
#   pad_token of the tokenizer:       A B C <eos> +1.0077, A B C +0.9390
#   pad_token of RewardConfig:        A B C <eos> +1.0077, A B C +0.9390
#   no pad_token:                     A B C <eos> +0.9817, A B C +0.9817
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
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PrinterCallback, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

WORDS = ["<reserved>", "<eos>", *"ABCDEF"]


def tokenizer(**tokens):
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<reserved>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", **tokens)


def case(name, tokens, **config):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    special = dict(bos_token_id=None, eos_token_id=1)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(WORDS), num_labels=1, **special, **sizes))
    settings = dict(per_device_train_batch_size=2, max_steps=10, learning_rate=1e-2, gradient_accumulation_steps=1)
    settings |= dict(use_cpu=True, bf16=False, disable_tqdm=True, report_to="none", save_strategy="no")
    rows = Dataset.from_dict({"chosen": ["A B C", "A B D"], "rejected": ["A E", "A F"]})
    args = RewardConfig("out", **settings, **config)
    trainer = RewardTrainer(model, args, train_dataset=rows, processing_class=tokenizer(**tokens))
    trainer.remove_callback(PrinterCallback)
    batch = next(iter(trainer.get_train_dataloader()))
    ends = {row[mask.bool()][-1].item() for row, mask in zip(batch["input_ids"], batch["attention_mask"])}
    trainer.train()
    model.eval()
    reward = {}
    with torch.no_grad():
        for text in ("A B C <eos>", "A B C"):
            ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
            reward[text] = model(ids, attention_mask=torch.ones_like(ids)).logits.item()
    print(f"{name + ':':33} " + ", ".join(f"{text} {value:+.4f}" for text, value in reward.items()))
    return ends == {1}, reward["A B C <eos>"] - reward["A B C"]


padded = case("pad_token of the tokenizer", {"pad_token": "<reserved>"})
given = case("pad_token of RewardConfig", {}, pad_token="<reserved>")
without = case("no pad_token", {})
holds = padded[0] and given[0] and without[0] and abs(padded[1]) > 0.01 and abs(given[1]) > 0.01 and without[1] == 0
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
