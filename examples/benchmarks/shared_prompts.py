"""What do rows cost that share a prompt, computed as one tree (`share_prompts`), against rows by themselves?

Both trainers work on one set of weights and take the same batch; they alternate in one process, a ratio is taken inside
a round, and what is reported is the median of the rounds' ratios with their spread. Peak memory is counted by torch's
allocator, to the byte, in steps of their own.

    python examples/benchmarks/shared_prompts.py --smoke                       # seconds, tiny: does it run?
    python examples/benchmarks/shared_prompts.py --plot shared-prompts.png     # a CPU, minutes
    python examples/benchmarks/shared_prompts.py --shape 1b --rounds 9         # a GPU
    python examples/benchmarks/shared_prompts.py --epoch rows.csv --tokenizer MODEL [--base OTHER_CHECKOUT]

`--epoch` trains one epoch on rows of Short Answer Feedback in processes of their own, alternating: batches by question,
shared, with the response last, against today's prompts in random order; on another build, if `--base` says where it is.

A markdown table grows on stdout, a row per cell; the last line is JSON with device, versions, arguments and rows.
Weights are random: they do not change what a step costs.
"""

import argparse
import copy
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import SCORES, SHAPES, WORDS, Cell, make_model, make_tokenizer
from datasets import Dataset
from step_cost import GIB, conditions, peak_bytes, seconds, spread

import trl_tract
from trl_tract import TRACTConfig, TRACTTrainer

# Rows, tokens of the prompt, of the completion, and whether the rows have one prompt.
CELLS = [(8, 1000, 150, True), (4, 1000, 150, True), (4, 300, 300, True), (8, 1000, 150, False)]
SMOKE = {"shape": "tiny", "vocab": 512, "cells": [(4, 40, 8, True), (4, 40, 8, False)], "rounds": 3}


def make_rows(rows: int, prompt: int, completion: int, shared: bool) -> list[dict[str, str]]:
    """Rows of `prompt` and `completion` tokens; where they share nothing, not even their first token is the same."""
    rng = random.Random(0)
    made = []
    words = rng.choices(WORDS, k=prompt - 1)
    for row in range(rows):
        if not shared:
            words = rng.choices(WORDS, k=prompt - 1)
        first = WORDS[0] if shared else sorted(set(WORDS))[row]
        rationale = " ".join(rng.choices(WORDS, k=completion - 3))
        made.append({"prompt": " ".join([first, *words]), "completion": f" {rationale} [RESULT] {SCORES[row % 5]}"})
    return made


def make_steps(
    cell: Cell, rows: list[dict[str, str]], folder: str
) -> tuple[dict[bool, Callable[[], float]], int, dict[bool, int]]:
    """A step with sharing and one without, bytes of weights and optimizer, and tokens that go into the model."""
    model = make_model(cell)
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    tokens = dict.fromkeys((True, False), 0)

    def trainer_of(share: bool) -> TRACTTrainer:
        config = TRACTConfig(
            folder,
            per_device_train_batch_size=len(rows),
            learning_rate=0.0,  # the weights stay, at the full price of a step
            max_length=None,
            share_prompts=share,
            use_cpu=cell.device == "cpu",
            bf16=False,  # no autocast: the weights have the type that was asked for
            gradient_checkpointing=cell.checkpointing,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        own = copy.deepcopy(model, dict(parameters))
        made = TRACTTrainer(own, config, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer())

        def count(module: Any, inputs: Any, output: Any) -> None:
            tokens[share] = inputs[0].numel()

        own.get_input_embeddings().register_forward_hook(count)
        return made

    trainers = {share: trainer_of(share) for share in (False, True)}
    batches = {share: next(iter(trainer.get_train_dataloader())) for share, trainer in trainers.items()}
    optimizer = trainers[False].create_optimizer()

    def step(share: bool) -> float:
        trainer = trainers[share]
        trainer.current_gradient_accumulation_steps = 1
        samples, num_items = trainer.get_batch_samples(iter([dict(batches[share])]), 1, trainer.args.device)
        loss = trainer.training_step(trainer.model, samples[0], num_items)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    step(False)  # the optimizer makes its state in its first step
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    resident = sum(tensor.nbytes for tensor in [*parameters.values(), *state])
    return {share: lambda share=share: step(share) for share in trainers}, resident, tokens


def measure(args: argparse.Namespace, rows: int, prompt: int, completion: int, shared: bool) -> dict[str, Any]:
    """One row of the table."""
    cell = Cell(
        args.shape,
        args.vocab,
        prompt + completion,
        rows,
        completion_share=completion / (prompt + completion),
        tied=True,
        checkpointing=args.checkpointing,
        same_positions=False,
        device=args.device,
        dtype=args.dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        steps, resident, tokens = make_steps(cell, make_rows(rows, prompt, completion, shared), folder)
        losses = {share: step() for share, step in steps.items()}  # the warm-up
        peaks = {share: resident + peak_bytes(step, cell.device) for share, step in steps.items()}
        orders = itertools.islice(itertools.cycle(itertools.permutations(steps)), args.rounds)
        clocks = [{share: clocked(steps[share]) for share in order} for order in orders]
    times, cpu = ([{share: both[at] for share, both in each.items()} for each in clocks] for at in (0, 1))
    return {
        "rows": rows,
        "prompt": prompt,
        "completion": completion,
        "shared": shared,
        "tokens": {"separate": tokens[False], "shared": tokens[True]},
        "loss_difference": abs(losses[True] - losses[False]) / abs(losses[False]),
        "peak_bytes": {"separate": peaks[False], "shared": peaks[True]},
        "peak_ratio": round(peaks[True] / peaks[False], 4),
        "seconds": {
            "separate": spread([each[False] for each in times]),
            "shared": spread([each[True] for each in times]),
        },
        "time_ratio": spread([each[True] / each[False] for each in times]),
        "cpu_ratio": spread([each[True] / each[False] for each in cpu]),
    }


def clocked(step: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a step, and of this process's CPU time, which other work on the machine moves less."""
    before = time.process_time()
    return seconds(step), time.process_time() - before


HEADER = [
    "rows",
    "prompt",
    "completion",
    "share",
    "tokens",
    "shared / separate, time",
    "CPU time",
    "shared / separate, peak",
    "GiB",
]


def table_row(row: dict[str, Any]) -> str:
    ratio, tokens, peaks = row["time_ratio"], row["tokens"], row["peak_bytes"]
    cells = [row["rows"], row["prompt"], row["completion"], "the prompt" if row["shared"] else "nothing"]
    cells += [f"{tokens['shared']:,} of {tokens['separate']:,}"]
    cells += [f"{each['median']:.3f} ({each['q1']:.3f} to {each['q3']:.3f})" for each in (ratio, row["cpu_ratio"])]
    cells += [f"{row['peak_ratio']:.3f}"]
    cells += [f"{peaks['shared'] / GIB:.3f} of {peaks['separate'] / GIB:.3f}"]
    return f"| {' | '.join(map(str, cells))} |"


def epochs(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an epoch, shared and as the other build has it, in pairs."""
    worker = [sys.executable, str(Path(__file__).with_name("saf_epoch.py")), args.epoch, "--tokenizer", args.tokenizer]
    worker += ["--rows", str(args.epoch_rows), "--layers", str(SHAPES[args.shape][2])]
    here = str(Path(trl_tract.__file__).parents[1])
    sides = {
        "shared": ([*worker, "--order", "shared-first", "--share"], here),
        "base": ([*worker, "--order", "standard"], args.base or here),
    }
    pairs: list[dict[str, dict[str, Any]]] = []
    for number in range(args.rounds):
        pair = {}
        for name in sorted(sides, reverse=bool(number % 2)):
            command, path = sides[name]
            environment = os.environ | {"PYTHONPATH": path}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            pair[name] = json.loads(done.stdout.splitlines()[-1])
        pairs.append(pair)
        cells = [f"{pair[name]['seconds']:.1f}" for name in sides] + [f"{each:.3f}" for each in epoch_ratios(pair)]
        print("| " + " | ".join([str(number + 1), *cells]) + " |", flush=True)
    time_ratios, cpu_ratios = zip(*map(epoch_ratios, pairs), strict=True)
    return {"pairs": pairs, "time_ratio": spread(list(time_ratios)), "cpu_ratio": spread(list(cpu_ratios))}


def epoch_ratios(pair: dict[str, dict[str, Any]]) -> tuple[float, float]:
    """Of seconds, and of CPU seconds."""
    time_ratio, cpu_ratio = (pair["shared"][unit] / pair["base"][unit] for unit in ("seconds", "cpu_seconds"))
    return time_ratio, cpu_ratio


def draw(result: dict[str, Any], path: str) -> None:
    """Time and memory of shared rows, as parts of those of separate rows."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The plot needs matplotlib: pip install "trl-tract[demo]"') from error
    rows = result["rows"]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panel = figure.subplots()
    places = range(len(rows))
    ratios = [row["time_ratio"] for row in rows]
    whiskers = [[r["median"] - r["q1"] for r in ratios], [r["q3"] - r["median"] for r in ratios]]
    panel.barh([place - 0.2 for place in places], [r["median"] for r in ratios], 0.36, xerr=whiskers, label="time")
    panel.barh([place + 0.2 for place in places], [row["peak_ratio"] for row in rows], 0.36, label="peak memory")
    labels = [
        f"{row['rows']} rows, {row['prompt']:,} + {row['completion']}" + ("" if row["shared"] else ", nothing shared")
        for row in rows
    ]
    panel.set_yticks(list(places), labels=labels)
    panel.invert_yaxis()
    panel.axvline(1, color="0.4", linewidth=1, linestyle="--")
    panel.set(title="A training step with share_prompts, against separate rows", xlabel="ratio (1: as without)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", choices=SHAPES, default="tenth", help="the model's layers (default: tenth)")
    parser.add_argument("--vocab", type=int, default=4915, help="vocabulary size (default: 4915)")
    parser.add_argument(
        "--cell", type=_cell, nargs="+", dest="cells", default=CELLS, metavar="ROWSxPROMPTxCOMPLETION",
        help="such as 8x1000x150; 8x1000x150x0 shares nothing",
    )  # fmt: skip
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, as SFTConfig does")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights; bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each that are timed (default: 5)")
    parser.add_argument("--epoch", metavar="CSV", help="time an epoch on these rows instead")
    parser.add_argument("--epoch-rows", type=int, default=240, help="rows of the epoch (default: 240)")
    parser.add_argument("--tokenizer", help="directory or hub id of the epoch's tokenizer")
    parser.add_argument("--base", metavar="CHECKOUT", help="another build of trl_tract to compare the epoch with")
    parser.add_argument("--plot", metavar="PNG", help="draw the ratios")
    parser.add_argument("--replot", metavar="FILE", help="draw from the last line of a saved output; measure nothing")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and 3 rounds, to see that it runs")
    args = parser.parse_args(argv)
    if args.replot and not args.plot:
        parser.error("--replot needs --plot, the PNG to draw")
    if args.epoch and not args.tokenizer:
        parser.error("--epoch needs --tokenizer")
    if args.smoke:
        vars(args).update(SMOKE)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


def _cell(text: str) -> tuple[int, int, int, bool]:
    rows, prompt, completion, *shared = (int(part) for part in text.split("x"))
    return rows, prompt, completion, not shared or bool(shared[0])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.replot:
        draw(json.loads(Path(args.replot).read_text().splitlines()[-1]), args.plot)
        return
    result = conditions("shared_prompts", args)
    if args.epoch:
        print("| pair | shared, s | separate, s | ratio | CPU time |\n|" + " --- |" * 5, flush=True)
        print(json.dumps(result | epochs(args)))
        return
    print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER), flush=True)
    result["rows"] = []
    for cell in args.cells:
        result["rows"].append(measure(args, *cell))
        print(table_row(result["rows"][-1]), flush=True)
    if args.plot:
        draw(result, args.plot)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
