"""What does a training step of TRACTTrainer cost, in seconds and in bytes?

Three trainers take the same rows through one and the same set of weights:

- `sft`: TRL's SFTTrainer, which knows nothing of scores;
- `tract`: TRACTTrainer;
- `full`: TRACTTrainer's loss written plainly, from the logits of every position (`contenders.py`).

A step is the trainer's own `training_step`, then the optimizer's. The three alternate in one process, in every order
in turn; a ratio is taken inside a round, and what is reported is the median of the rounds' ratios with their spread.
Peak memory is counted by torch's allocator, to the byte, in steps of their own.

    python examples/benchmarks/step_cost.py --smoke                      # 20 seconds, tiny: does it run?
    python examples/benchmarks/step_cost.py --plot step-cost.png         # on a CPU: hours, see --cell-seconds
    python examples/benchmarks/step_cost.py --shape 1b --rounds 12       # a GPU
    python examples/benchmarks/step_cost.py --replot saved.txt --plot step-cost.png

A markdown table grows on stdout, a row per cell; the last line is JSON with device, versions, arguments and rows.
Weights are random and text is made up: neither changes what a step costs.
"""

import argparse
import gc
import itertools
import json
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from contenders import SHAPES, Cell, make_contenders

import trl_tract

SMOKE = {"shape": "tiny", "vocab": [512, 2048], "length": [48], "batch": [2], "rounds": 3}
NAMES = ["sft", "tract", "full"]
FLOAT32 = 4  # bytes
GIB = 2**30


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(step: Callable[[], Any]) -> float:
    synchronise()
    start = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """The most bytes of torch's allocator that were live at once during `step`, beyond those live before it."""
    if device == "cuda":
        synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronise()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()  # or what earlier steps have left would be freed, and counted, at some moment of this one
    gc.disable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
    finally:
        gc.enable()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def operator_calls(step: Callable[[], Any]) -> int:
    """The calls of torch's operators during `step`, those that operators make of each other included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum(event.name().startswith("aten::") for event in profile.profiler.kineto_results.events())


def peak_rss_bytes(step: Callable[[], Any]) -> int | None:
    """Do `step`; the process's largest resident set during it, or None where Linux does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    except OSError:
        step()
        return None
    step()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else None


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else sys.maxsize


def spread(ratios: list[float]) -> dict[str, float]:
    quantiles = np.quantile(ratios, [0, 0.25, 0.5, 0.75, 1]).round(4).tolist()
    return dict(zip(["min", "q1", "median", "q3", "max"], quantiles, strict=True))


def measure(cell: Cell, rounds: int, cell_seconds: float) -> dict[str, Any]:
    """One cell of the sweep: losses, peaks, and the ratios of step times within each round."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = make_contenders(cell, folder)
        row: dict[str, Any] = {"vocab": cell.vocab, "length": cell.length, "batch": cell.batch}
        row |= {name: value for name, value in vars(contenders).items() if name != "steps"}
        steps = contenders.steps
        # Log-softmax, its gradient and the one that goes into it; a tenth for everything else.
        needed = 1.1 * 3 * contenders.tokens * cell.vocab * FLOAT32
        free = free_bytes(cell.device)
        if needed > 0.9 * free:
            del steps["full"]
            row["full_left_out"] = f"needs {needed / GIB:.1f} GiB, free {free / GIB:.1f} GiB"
        # The warm-up: losses, and what the system saw.
        losses: dict[str, float] = {}
        rss = {name: peak_rss_bytes(lambda name=name: losses.update({name: steps[name]()})) for name in steps}
        row |= {"loss": losses} | ({"peak_rss_bytes": rss} if cell.device == "cpu" else {})
        peaks = {name: contenders.resident_bytes + peak_bytes(step, cell.device) for name, step in steps.items()}
        row["peak_bytes"] = peaks
        row["operators"] = {name: operator_calls(step) for name, step in steps.items()}
        row["score_rows_bytes"] = score_rows_bytes = contenders.scores * cell.vocab * FLOAT32
        row["extra_in_score_rows"] = round((peaks["tract"] - peaks["sft"]) / score_rows_bytes, 3)
        row["within_memory_bound"] = peaks["tract"] <= 1.02 * peaks["sft"] + score_rows_bytes

        times: list[dict[str, float]] = []
        deadline = time.perf_counter() + cell_seconds
        for order in itertools.islice(itertools.cycle(itertools.permutations(steps)), rounds):
            if len(times) >= 3 and time.perf_counter() > deadline:
                break
            times.append({name: seconds(steps[name]) for name in order})
    row["rounds"] = len(times)
    row["seconds"] = {name: spread([each[name] for each in times]) for name in steps}
    row["tract_over_sft"] = spread([each["tract"] / each["sft"] for each in times])
    if "full" in steps:
        row["full_over_tract"] = spread([each["full"] / each["tract"] for each in times])
    return row


HEADER = ["vocabulary", "length", "batch", "rounds", "TRACT / SFT, time", "full / TRACT, time"]
HEADER += ["SFT, GiB", "TRACT, GiB", "full, GiB", "TRACT - SFT, in S x V x 4"]


def table_row(row: dict[str, Any]) -> str:
    def ratio(key: str) -> str:
        found = row.get(key)
        return f"{found['median']:.3f} ({found['q1']:.3f} to {found['q3']:.3f})" if found else row["full_left_out"]

    cells = [row[name] for name in ("vocab", "length", "batch", "rounds")]
    cells += [ratio("tract_over_sft"), ratio("full_over_tract")]
    cells += [f"{row['peak_bytes'][name] / GIB:.3f}" if name in row["peak_bytes"] else "-" for name in NAMES]
    cells += [row["extra_in_score_rows"]]
    return f"| {' | '.join(map(str, cells))} |"


def draw(result: dict[str, Any], path: str) -> None:
    """How many times TRACTTrainer's time and memory the full logits cost, by vocabulary."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The plot needs matplotlib: pip install "trl-tract[demo]"') from error
    rows = [row for row in result["rows"] if "full_over_tract" in row]
    figure = Figure(figsize=(9, 4), layout="constrained")
    time_panel, memory_panel = figure.subplots(1, 2)
    for length, batch in sorted({(row["length"], row["batch"]) for row in rows}):
        line = [row for row in rows if (row["length"], row["batch"]) == (length, batch)]
        vocab = [row["vocab"] for row in line]
        ratios = [row["full_over_tract"] for row in line]
        medians = [ratio["median"] for ratio in ratios]
        whiskers = [
            [ratio["median"] - ratio["q1"] for ratio in ratios],
            [ratio["q3"] - ratio["median"] for ratio in ratios],
        ]
        label = f"{batch} x {length} tokens"
        time_panel.errorbar(vocab, medians, yerr=whiskers, marker="o", capsize=3, label=label)
        peaks = [row["peak_bytes"]["full"] / row["peak_bytes"]["tract"] for row in line]
        memory_panel.plot(vocab, peaks, marker="o", label=label)
    ticks = sorted({row["vocab"] for row in rows})
    for panel, title in ((time_panel, "Step time"), (memory_panel, "Peak memory")):
        panel.set(title=f"{title}: full logits / TRACTTrainer", xlabel="vocabulary (tokens)", ylabel="ratio")
        panel.set_xscale("log")
        panel.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
        panel.minorticks_off()
        panel.axhline(1, color="0.4", linewidth=1, linestyle="--")
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    time_panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


def conditions(benchmark: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a benchmark's line of JSON says beside its figures: where, with what and how it was run."""
    return {
        "benchmark": benchmark,
        "device": device_name(args.device),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: str(module.__version__) for module in (torch, transformers, trl, trl_tract)},
        },
        "arguments": {name: value for name, value in vars(args).items() if name not in ("plot", "replot")},
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", choices=SHAPES, default="small", help="the model's layers (default: small)")
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 128256, 262144], help="vocabulary sizes")
    parser.add_argument("--length", type=int, nargs="+", default=[256, 1024], help="tokens a row")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="rows a step")
    parser.add_argument("--completion-share", type=float, default=0.25, help="of a row's tokens (default: 0.25)")
    parser.add_argument("--untied", action="store_true", help="give the LM head a weight of its own")
    parser.add_argument(
        "--no-checkpointing", action="store_true", help="keep all activations (SFTConfig recomputes them by default)"
    )
    parser.add_argument(
        "--same-positions",
        action="store_true",
        help="SFTTrainer leaves the prompt out of its head on a CPU too, as it does on a GPU, and TRACTTrainer keeps "
        "the score's label (score_in_ce): what is left between them is the cost of the score rows",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights; bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each trainer that are timed (default: 12)")
    parser.add_argument(
        "--cell-seconds", type=float, default=300, help="stop timing a cell after this long, but not before 3 rounds"
    )
    parser.add_argument("--plot", metavar="PNG", help="draw the ratios to full logits by vocabulary")
    parser.add_argument("--replot", metavar="FILE", help="draw from the last line of a saved output; measure nothing")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and 3 rounds, to see that it runs")
    args = parser.parse_args(argv)
    if args.replot and not args.plot:
        parser.error("--replot needs --plot, the PNG to draw")
    if args.smoke:
        vars(args).update(SMOKE)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.replot:
        draw(json.loads(Path(args.replot).read_text().splitlines()[-1]), args.plot)
        return
    result = conditions("step_cost", args) | {"rows": []}
    print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER), flush=True)
    for vocab, length, batch in itertools.product(args.vocab, args.length, args.batch):
        cell = Cell(
            args.shape,
            vocab,
            length,
            batch,
            completion_share=args.completion_share,
            tied=not args.untied,
            checkpointing=not args.no_checkpointing,
            same_positions=args.same_positions,
            device=args.device,
            dtype=args.dtype,
        )
        result["rows"].append(measure(cell, args.rounds, args.cell_seconds))
        print(table_row(result["rows"][-1]), flush=True)
    if args.plot:
        draw(result, args.plot)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
