#!/usr/bin/env bash
# transformers: `gradient_accumulation_steps=4` makes a mixture of experts balance its experts four times as hard.
#
# Guess beforehand: Trainer makes the update independent of how a batch is cut into micro-batches, since the cross-entropy is
#   divided by the tokens of all of them (`num_items_in_batch`). Four equal rows at once or one after the other give the
#   same gradient, with the load-balancing loss of `output_router_logits=True` as without it.
# What happens: without this loss the gradients are the same. With it, the router's gradient is four times as large where the
#   rows come one by one, as if `router_aux_loss_coef` were four times as large. The logged loss grows as well. No warning.
# Why: the model adds `router_aux_loss_coef * aux_loss`, a mean over a micro-batch's tokens, to a cross-entropy that is divided
#   already by the tokens of the whole update. Trainer sees that the model takes `num_items_in_batch`, so it does not divide
#   the sum by the number of micro-batches. TRL's SFTTrainer divides this term itself.
# Instead: divide `router_aux_loss_coef` by `gradient_accumulation_steps`.
#
# Versions: Python 3.11, torch 2.13.0, transformers 5.24.0, accelerate 1.15.0. CPU, a few seconds once installed.
# Seen (norm of the router's gradient that is due to the balancing loss; of the head's, which is due to the cross-entropy):
#   4 rows at once, 1 accumulated: router 0.2703, head 1.1797, loss 5.461 (without balancing 3.453)
#   1 row at once, 4 accumulated:  router 1.0811, head 1.1797, loss 11.487 (without balancing 3.453)
#
# Exits 0 if the libraries still behave so, 1 if they no longer do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0 numpy==2.3.5
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from transformers import PrinterCallback, Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

TOKENS = torch.randint(32, (12,), generator=torch.Generator().manual_seed(1)).tolist()
ROWS = [{"input_ids": TOKENS, "labels": TOKENS}] * 4
ROUTER, HEAD = "model.layers.0.mlp.gate.weight", "lm_head.weight"


class Recorder(Trainer):
    """Keeps the gradients that are there after the last micro-batch."""

    def training_step(self, *arguments, **keywords):
        loss = super().training_step(*arguments, **keywords)
        self.gradients = {name: weight.grad.clone() for name, weight in self.model.named_parameters()}
        return loss


def gradients(rows, steps, coefficient):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, output_router_logits=True)
    config = Qwen3MoeConfig(vocab_size=32, head_dim=8, router_aux_loss_coef=coefficient, **experts, **sizes)
    batches = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=steps, max_steps=1, max_grad_norm=0)
    quiet = dict(use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1)
    trainer = Recorder(Qwen3MoeForCausalLM(config), TrainingArguments("out", **batches, **quiet), train_dataset=ROWS)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.gradients, trainer.state.log_history[0]["loss"]


def case(rows, steps):
    (without, plain), (balanced, loss) = gradients(rows, steps, 0.0), gradients(rows, steps, 1.0)
    router = (balanced[ROUTER] - without[ROUTER]).norm().item()
    head = balanced[HEAD].norm().item()
    name = f"{rows} row{'s' if rows > 1 else ''} at once, {steps} accumulated:"
    print(f"{name:30} router {router:.4f}, head {head:.4f}, loss {loss:.3f} (without balancing {plain:.3f})")
    return router, head, plain


whole, parts = case(4, 1), case(1, 4)
holds = abs(parts[0] / whole[0] - 4) < 0.01 and abs(parts[1] / whole[1] - 1) < 1e-4 and abs(parts[2] - whole[2]) < 1e-3
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
