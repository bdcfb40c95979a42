"""Does a judge agree less with people when the response comes last in its prompt (`order: shared-first`)?

For each seed, one seed model is trained twice on the same rows, in the same micro-batches, with the same settings: once
with prompts in the standard order, once shared-first. Both judges read the same held-out answers. Rows are those of
Short Answer Feedback, or others with its columns (question, reference, answer, feedback, score).

    python examples/benchmarks/prompt_order.py train.csv held-out.csv --model SEED_MODEL --output_dir order

Started again with the same arguments, it goes on where it was stopped: trainings at their last checkpoint, judges at
their last block. The table has a row per training; the last line is JSON.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saf_epoch import CRITERION, DESCRIPTIONS

from trl_tract.runs.judged import Judged

ORDERS = ["standard", "shared-first"]
COLUMNS = ["instruction=question", "response=answer", "reference=reference", "rationale=feedback", "score=score"]


def sample(source: str, count: int, target: Path) -> None:
    """Write `count` rows by chance, the same each time; empty answers are none."""
    with open(source, newline="", encoding="utf-8") as file:
        records = [record for record in csv.DictReader(file) if record["answer"].strip()]
    if len(records) > count:
        records = random.Random(0).sample(records, count)
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def command(*arguments: str) -> None:
    print("trl-tract", *arguments, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "trl_tract.cli", *arguments], check=True, stdout=sys.stderr)


def judged(args: argparse.Namespace, order: str, seed: int) -> dict[str, Any]:
    """Train and judge, as far as that has not been done."""
    base = Path(args.output_dir)
    folder = base / f"{order}-{seed}"
    rubric = base / f"{order}.yaml"
    rubric.write_text(json.dumps({"criterion": CRITERION, "scores": DESCRIPTIONS, "order": order}), encoding="utf-8")
    if not (folder / "trained").exists():
        command(
            *("train", "--model", args.model, "--data", str(base / "train.csv"), "--rubric", str(rubric)),
            *("--columns", *COLUMNS, "--score_values", *DESCRIPTIONS, "--output_dir", str(folder / "judge")),
            *("--use_peft", "true", "--lora_r", "16", "--lora_target_modules", "all-linear", "--lora_dropout", "0"),
            *("--learning_rate", str(args.learning_rate), "--num_train_epochs", str(args.epochs)),
            *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--seed", str(seed)),
            *("--share_prompts", "true", "--share_batches", "question", "--score_in_ce", "true"),
            *("--bf16", str(args.bf16).lower(), "--save_steps", "10", "--save_total_limit", "1"),
            *("--gradient_checkpointing", "false"),
        )
        (folder / "trained").touch()
    command(
        *("judge", "--model", str(folder / "judge"), "--data", str(base / "held-out.csv")),
        *("--output_dir", str(folder / "judged"), "--max_new_tokens", "60"),
    )
    (scale,) = Judged(folder / "judged").scales.values()
    return {"order": order, **scale.report().to_dict(), "seed": seed}


def measured(measure: dict[str, Any]) -> str:
    if measure["value"] is None:
        return "undefined"
    interval = "" if measure["low"] is None else f" ({measure['low']:.3f} to {measure['high']:.3f})"
    return f"{measure['value']:.3f}{interval}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="CSV of rows to train on")
    parser.add_argument("held_out", help="CSV of rows to judge")
    parser.add_argument("--model", required=True, help="seed model: directory or hub id")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--rows", type=int, default=400, help="rows to train on (default: 400)")
    parser.add_argument("--items", type=int, default=120, help="items to judge (default: 120)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="where the processor has units for it")
    args = parser.parse_args(argv)
    base = Path(args.output_dir)
    base.mkdir(parents=True, exist_ok=True)
    sample(args.train, args.rows, base / "train.csv")
    sample(args.held_out, args.items, base / "held-out.csv")
    print("| order | seed | pearson | rmse | failed |\n| --- | --- | --- | --- | --- |", flush=True)
    found = []
    for seed in args.seeds:
        for order in ORDERS:
            row = judged(args, order, seed)
            found.append(row)
            cells = [order, seed, measured(row["pearson"]), measured(row["rmse"]), row["failed"]]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(json.dumps({"benchmark": "prompt_order", "arguments": vars(args), "rows": found}))


if __name__ == "__main__":
    main()
