#!/usr/bin/env bash
# TRL: a GRPO run that is resumed after its first epoch sees other prompts than the run that was not interrupted.
#
# Guess beforehand: with `ignore_data_skip=False`, the default, `resume_from_checkpoint` goes on in the data where the run
#   stopped. So the resumed run gets the same prompts at the same steps, as `SFTTrainer` does: each prompt once an epoch.
# What happens: `GRPOTrainer` does so in the first epoch only. Resumed in the second, it takes the rest of the first epoch's
#   order, so that in this epoch it sees some prompts twice and others never. Resumed at the end of the first epoch, it sees
#   the first epoch again, in the same order. There is no warning.
# Why: `RepeatSampler` draws the order of each epoch from one generator, seeded once, and has no `set_epoch`. The resumed
#   run skips the earlier epochs without drawing their orders, so its first draw, the first epoch's order, is used for the
#   epoch it is in. `SFTTrainer` has Accelerate's sampler, which seeds itself for each epoch in `set_epoch`.
# Instead: stop at a checkpoint within the first epoch; or `shuffle_dataset=False`, with rows shuffled beforehand.
#
# Versions: Python 3.11, torch 2.13.0, trl 1.16.0, transformers 5.24.0, accelerate 1.15.0, datasets 5.2.0. CPU, about 20
#   seconds once installed.
# Seen (one prompt a step, six prompts, two epochs; "|" is where the run was stopped and resumed):
#   grpo, uninterrupted:                   ADCEBFFBCEAD
#   grpo, resumed after 3:                 ADC|EBFFBCEAD
#   grpo, resumed after 6:                 ADCEBF|ADCEBF
#   grpo, resumed after 9:                 ADCEBFFBC|EBF
#   grpo, not shuffled, uninterrupted:     ABCDEFABCDEF
#   grpo, not shuffled, resumed after 9:   ABCDEFABC|DEF
#   sft, uninterrupted:                    ADCEBFEAFBCD
#   sft, resumed after 3:                  ADC|EBFEAFBCD
#   sft, resumed after 6:                  ADCEBF|EAFBCD
#   sft, resumed after 9:                  ADCEBFEAF|BCD
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
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

logging.disable_progress_bar()
PROMPTS = "ABCDEF"
WORDS = ["<pad>", "<eos>", *PROMPTS]


def tokenizer():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, bos_token_id=None, eos_token_id=1, **sizes))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def grpo(settings, callbacks, seen):
    def reward(prompts, completions, **kwargs):
        seen.append(prompts[0])
        return [float(len(completion)) for completion in completions]

    rows = Dataset.from_dict({"prompt": list(PROMPTS)})
    args = GRPOConfig(per_device_train_batch_size=2, num_generations=2, max_completion_length=2, **settings)
    return GRPOTrainer(model(), reward, args, rows, processing_class=tokenizer(), callbacks=callbacks)


def sft(settings, callbacks, seen):
    class Seen(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(WORDS[inputs["input_ids"][0, 0]])
            return super().compute_loss(model, inputs, *args, **kwargs)

    rows = Dataset.from_dict({"text": [f"{prompt} {prompt}" for prompt in PROMPTS]})
    args = SFTConfig(per_device_train_batch_size=1, **settings)
    return Seen(model(), args, train_dataset=rows, processing_class=tokenizer(), callbacks=callbacks)


def run(make, stop=None, **settings):
    """The prompt of each step, of a run as a whole or of one that is stopped and resumed."""
    settings |= dict(output_dir=f"{make.__name__}-{stop}-{len(settings)}", num_train_epochs=2, save_steps=stop or 100)
    settings |= dict(gradient_accumulation_steps=1, use_cpu=True, bf16=False, disable_tqdm=True, report_to="none")
    parts = []
    for step in (None,) if stop is None else (stop, None):
        seen = []
        trainer = make(settings, [StopAt(step)] if step else [], seen)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=bool(parts))
        parts.append("".join(seen))
    after = "uninterrupted" if stop is None else f"resumed after {stop}"
    name = f"{make.__name__}{', not shuffled' if 'shuffle_dataset' in settings else ''}, {after}:"
    print(f"{name:38} {'|'.join(parts)}")
    return "".join(parts)


whole = run(grpo)
within, between, later = (run(grpo, stop) for stop in (3, 6, 9))
fixed, fixed_later = (run(grpo, stop, shuffle_dataset=False) for stop in (None, 9))
sft_whole, *sft_resumed = (run(sft, stop) for stop in (None, 3, 6, 9))
holds = within == whole and between == whole[:6] * 2 != whole and later == whole[:9] + whole[3:6] != whole
holds &= fixed == fixed_later and sft_resumed == [sft_whole] * 3
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
