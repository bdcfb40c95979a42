"""Is the loss on this device what it should be, and what does four-bit training cost there? Parts of `gpu.sh`.

    python examples/benchmarks/gpu_checks.py exactness     # loss and gradients against float64 logits of all positions
    python examples/benchmarks/gpu_checks.py qlora         # a step of TRACTTrainer and of SFTTrainer on 4-bit weights
    python examples/benchmarks/gpu_checks.py model OUT     # SmolLM2-135M-Instruct, or with --dry a tiny one, into OUT
    python examples/benchmarks/gpu_checks.py collect OUT   # the last lines of OUT/*.txt as one OUT/gpu.json

On CUDA TRL's fused head takes another path than on a CPU. In float32 the errors should be about 1e-6; in bfloat16 they
are to be read beside those of plain bfloat16 logits. `--dry` is tiny, for a CPU. The last line of stdout is JSON.
"""

import argparse
import copy
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from contenders import SHAPES, Cell, make_model, make_rows, make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import trl_tract
from trl_tract import TRACTConfig, TRACTTrainer
from trl_tract.backends.device import fastest_dtype
from trl_tract.demo.seed_model import save_seed_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RAFT_WEIGHT = 0.7


def settings(folder: str, **more: Any) -> dict[str, Any]:
    """Of every trainer here."""
    plain = {"output_dir": folder, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    return {**plain, "use_cpu": DEVICE == "cpu", "bf16": False, "max_length": None, "max_grad_norm": 0.0, **more}


def step(trainer: Any, batch: dict[str, Any]) -> float:
    """Forward and backward of one batch, counted as the Trainer counts."""
    trainer.current_gradient_accumulation_steps = 1
    samples, num_items = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
    return trainer.training_step(trainer.model, samples[0], num_items).item()


def full_loss(model: Any, batch: dict[str, Any], grid: Any) -> torch.Tensor:
    """CoT-RAFT from logits of every position, in float32 or, for a float64 model, in float64."""
    labels, gold = batch["labels"][:, 1:], batch["score_labels"][:, 1:].double()
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scored = ~gold.isnan()
    values = torch.tensor(grid.values, dtype=logits.dtype, device=logits.device)
    expected = logits[scored].softmax(-1)[:, list(grid.token_ids)] @ values
    squared_error = (expected - gold[scored].to(logits.dtype)).square().mean()
    return (
        functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        + RAFT_WEIGHT * squared_error
    )


def gradient(model: Any) -> torch.Tensor:
    """All of it, in float64."""
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def exactness(dry: bool) -> list[dict[str, Any]]:
    """Relative errors of loss and gradient, of TRACTTrainer and of full logits in the same precision."""
    lines = []
    sizes = ("tiny", 512, 48) if dry else ("small", 49152, 512)
    for dtype in ("float32", "bfloat16"):
        for tied in (True, False):
            for share in (False, True):
                cell = Cell(*sizes, 4, 0.25, tied, False, False, DEVICE, dtype)
                lines.append({"dtype": dtype, "tied": tied, "share_prompts": share, **errors(cell, share)})
                print(json.dumps(lines[-1]), flush=True)
    return lines


def errors(cell: Cell, share: bool) -> dict[str, float]:
    """Of one model and batch."""
    model = make_model(cell)
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    rows = make_rows(cell.batch, cell.length, cell.completion_share)
    rows = [{**row, "prompt": rows[0]["prompt"]} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        args = TRACTConfig(
            **settings(folder, per_device_train_batch_size=cell.batch, gradient_checkpointing=False),
            raft_weight=RAFT_WEIGHT,
            share_prompts=share,
        )
        trainer = TRACTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer())
        batch = next(iter(trainer.get_train_dataloader()))
        loss = step(trainer, batch)
    batch = {name: tensor.to(DEVICE) for name, tensor in batch.items() if torch.is_tensor(tensor)}
    losses = {"tract": loss}
    for name, own in (("exact", exact), ("plain", plain)):
        own_loss = full_loss(own, batch, trainer.scales[0].grid)
        own_loss.backward()
        losses[name] = own_loss.item()
    truth = gradient(exact)
    return {
        "loss": abs(losses["tract"] / losses["exact"] - 1),
        "gradient": float((gradient(trainer.model) - truth).norm() / truth.norm()),
        "plain_loss": abs(losses["plain"] / losses["exact"] - 1),
        "plain_gradient": float((gradient(plain) - truth).norm() / truth.norm()),
    }


def qlora(dry: bool) -> list[dict[str, Any]]:
    """Seconds and peak memory of a step on four-bit and on 16-bit weights, with LoRA of rank 16."""
    lines = []
    shape, vocab, length, batch, rounds = ("tenth", 4096, 64, 2, 2) if dry else ("1b", 128256, 1024, 4, 8)
    cell = Cell(shape, vocab, length, batch, 0.25, True, False, False, "cpu" if dry else DEVICE, "bfloat16")
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with tempfile.TemporaryDirectory() as folder:
        make_model(cell).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        rows = Dataset.from_list(make_rows(batch, length, 0.25))
        for bits, quantisation in ((4, four_bit), (16, None)):
            for name, kind, config in (("tract", TRACTTrainer, TRACTConfig), ("sft", SFTTrainer, SFTConfig)):
                init = {"dtype": "bfloat16"}
                args = config(**settings(folder, per_device_train_batch_size=batch, model_init_kwargs=init))
                lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
                more: dict[str, Any] = {"quantization_config": quantisation, "peft_config": lora}
                trainer = kind(folder, args, train_dataset=rows, **more)
                own = next(iter(trainer.get_train_dataloader()))
                seconds, peak = timed(lambda trainer=trainer, own=own: step(trainer, own), rounds)
                lines.append({"bits": bits, "trainer": name, "seconds": seconds, "peak_gib": peak})
                print(json.dumps(lines[-1]), flush=True)
                del trainer
    return lines


def timed(work: Callable[[], Any], rounds: int) -> tuple[float, float | None]:
    """The median seconds of some rounds behind one that warms up, and the most memory in use, GiB; None on a CPU."""
    work()
    cuda = DEVICE == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2], torch.cuda.max_memory_allocated() / 2**30 if cuda else None


def save_model(folder: Path, dry: bool) -> None:
    """The seed model of the replication; dry, a tiny random one with its tokenizer."""
    save_seed_model(folder, fastest_dtype())
    if dry:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        hidden, between, layers, heads, key_value_heads = SHAPES["tiny"]
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=between,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            max_position_embeddings=4096,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)


def collect(folder: Path) -> dict[str, Any]:
    """What each part ended with: its JSON, or that it did not end with one."""
    parts: dict[str, Any] = {}
    for file in sorted(folder.glob("*.txt")):
        lines = file.read_text(encoding="utf-8").splitlines() or [""]
        try:
            parts[file.stem] = json.loads(lines[-1])
        except ValueError:
            parts[file.stem] = {"unfinished": lines[-1][-300:]}
    return parts


def machine() -> dict[str, Any]:
    """What it was measured on."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl, trl_tract)}
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    return {"device": device, "versions": versions}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["exactness", "qlora", "model", "collect"])
    parser.add_argument("out", type=Path, nargs="?", help="of `model` and `collect`")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, for a CPU")
    args = parser.parse_args(argv)
    if args.what == "model":
        save_model(args.out, args.dry)
        return
    if args.what == "collect":
        result = {**machine(), "dry": args.dry, "parts": collect(args.out)}
        (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for name, part in result["parts"].items():
            print(f"{name}: {'did not finish' if 'unfinished' in part else 'finished'}")
        return
    lines = exactness(args.dry) if args.what == "exactness" else qlora(args.dry)
    assert all(math.isfinite(number) for line in lines for number in line.values() if isinstance(number, float))
    print(json.dumps({"benchmark": args.what, **machine(), "rows": lines}))


if __name__ == "__main__":
    main()
