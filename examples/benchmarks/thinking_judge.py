"""Does a judge gain when its rationale is its thinking? `thinking="rationale"` beside `thinking="off"`, both stages.

    python examples/benchmarks/thinking_judge.py --output_dir out [--seeds 0 1] [--template qwen3]

Model, rows and settings are those of `trl-tract demo`, the chat template is that of a thinking model. The two modes
differ in nothing else, and judge the same held-out items. An interrupted run goes on with the same command. Tables
first; the last line is JSON with device, versions, arguments and figures.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers import AutoConfig

import trl_tract
from trl_tract import run_tract
from trl_tract.backends.device import fastest_dtype
from trl_tract.demo.run import COT_RAFT, GENERATION, LORA, SAMPLING, Size, demo_rows, training_settings, upper_layers
from trl_tract.demo.seed_model import save_seed_model
from trl_tract.evaluation.report import comparison_table
from trl_tract.files.journal import write_jsonl
from trl_tract.runs.judged import Judged
from trl_tract.runs.results import JUDGED

STAGES = {stage: folder for stage, folder in JUDGED.items() if folder in ("judged-stage1", "judged-tract")}
SIZE = Size(160, 60, epochs=1, batch_size=2, minutes=10, learning_rate=2e-3)
MODES = ("off", "rationale")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
NEW_TOKENS = 48
"""The demo's 36 and more than the end of a block takes: SmolLM2 writes it in six tokens."""


def train_and_judge(directory: Path, seed: int, mode: str, arguments: argparse.Namespace) -> None:
    """Both stages of one mode, and its judgements of the held-out items."""
    run_tract(
        arguments.model,
        str(directory.parent / "train.jsonl"),
        directory,
        eval_data=str(directory.parent / "eval.jsonl"),
        training={
            **training_settings(SIZE, seed),
            **COT_RAFT,
            "bf16": AutoConfig.from_pretrained(arguments.model).dtype == torch.bfloat16,
            "chat_template_path": str(TEMPLATES / f"{arguments.template}.jinja"),
            "thinking": mode,
        },
        model_args={
            **LORA,
            "lora_target_modules": upper_layers(AutoConfig.from_pretrained(arguments.model).num_hidden_layers),
        },
        generation={**SAMPLING, "max_new_tokens": NEW_TOKENS, "seed": seed},
        backend=GENERATION,
        objective="paper",  # what is set above, and nothing besides
        isolate=False,
    )


def compare_modes(directory: Path, seed: int) -> dict[str, Any]:
    """Print what came out of one seed; the same as figures."""
    judged = {
        (mode, stage): Judged(directory / f"{mode}-{seed}" / folder).scales[""]
        for mode in MODES
        for stage, folder in STAGES.items()
    }
    reports = {judge: scale.report() for judge, scale in judged.items()}
    rows = [
        {"judge": f"{mode}, {stage}", "report": report, "grid_mass": judged[mode, stage].mean_grid_mass}
        for (mode, stage), report in reports.items()
    ]
    print(f"\nSeed {seed}\n\n{comparison_table(rows)}\n")
    differences = {stage: judged["rationale", stage].minus(judged["off", stage]) for stage in STAGES}
    for stage, difference in differences.items():
        print(f"{stage}: `rationale` (a) minus `off` (b)\n\n{difference}\n")
    distilled = {
        mode: json.loads((directory / f"{mode}-{seed}" / "self-generated" / "summary.json").read_text())
        for mode in MODES
    }
    steps = {mode: json.loads((directory / f"{mode}-{seed}" / "report.json").read_text())["seconds"] for mode in MODES}
    return {
        "seed": seed,
        "judges": {f"{mode}, {stage}": report.to_dict() for (mode, stage), report in reports.items()},
        "rationale_minus_off": {stage: difference.to_dict() for stage, difference in differences.items()},
        "self_generated": distilled,
        "seconds": steps,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of training and sampling")
    parser.add_argument("--template", default="qwen3", help="a template that TRL ships, of a model that thinks")
    parser.add_argument("--model", help="seed model; SmolLM2-135M-Instruct by default, as in the demo")
    parser.add_argument("--rows", type=int, default=SIZE.training_rows, help="to train on")
    parser.add_argument("--items", type=int, default=SIZE.held_out_items, help="held out")
    arguments = parser.parse_args(argv)
    directory: Path = arguments.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    write_jsonl(directory / "train.jsonl", demo_rows("train", arguments.rows))
    write_jsonl(directory / "eval.jsonl", demo_rows("eval", arguments.items))
    given = {name: value for name, value in vars(arguments).items() if name != "output_dir"}
    if arguments.model is None:
        arguments.model = str(directory / "seed-model")
        if not (directory / "seed-model" / "config.json").exists():
            save_seed_model(directory / "seed-model", fastest_dtype())
    for seed in arguments.seeds:
        for mode in MODES:
            started = time.monotonic()
            train_and_judge(directory / f"{mode}-{seed}", seed, mode, arguments)
            print(f"thinking={mode}, seed {seed}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    results = [compare_modes(directory, seed) for seed in arguments.seeds]
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl, trl_tract)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    dtype = str(AutoConfig.from_pretrained(arguments.model).dtype)
    print(
        json.dumps(
            {
                "benchmark": "thinking_judge",
                "device": device,
                "threads": torch.get_num_threads(),
                "dtype": dtype,
                "versions": versions,
                "arguments": given,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
