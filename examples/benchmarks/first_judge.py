"""What does a first judge by the defaults come to on few rows? `run` with no tuning flags beside `--objective paper`.

    python examples/benchmarks/first_judge.py --output_dir out --saf FOLDER --vicuna vicuna_eval.json [--seeds 0 1 2]

Three tasks: 160 rows of the demo's; 150 answers of Short Answer Feedback (`saf_train.csv`, judged on
`saf_unseen_answers.csv`); 80 rows of Vicuna Bench, judged on other questions. What is said of the rows is their
columns, rubric and grid, and nothing else. `--objective paper` alone is also told how long a rationale may be: its
default of 1,024 tokens, three times for each that never reaches its marker, would take days on a CPU.

A run that is finished is kept, an interrupted one goes on: the same command again does the rest. `--table` prints what
is there. Order: the first seed of all tasks with `auto`, the same with `paper`, then the next seeds.
"""

import argparse
import csv
import json
import platform
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import trl

import trl_tract
from trl_tract import run_tract
from trl_tract.backends.device import fastest_dtype
from trl_tract.demo.seed_model import save_seed_model
from trl_tract.demo.task import make_rows
from trl_tract.files.journal import read_json, write_json, write_jsonl
from trl_tract.runs.judged import Judged
from trl_tract.runs.results import JUDGED

TASKS = {"demo": 160, "saf": 150, "vicuna": 80}
OBJECTIVES = ("auto", "paper")
CHOICE_SEED = 7
"""Of the rows: they are the same for every seed of training."""
RUBRIC = """\
criterion: Is the student's answer to the question correct and complete?
scores:
  "0": Wrong, off the question, or empty.
  "0.25": A small part is correct.
  "0.5": About half is correct.
  "0.75": Mostly correct, with a gap or a mistake.
  "1": Correct and complete.
"""
PAPER_TOKENS = {"demo": 64, "saf": 128, "vicuna": 384}


class Job(NamedTuple):
    """One run."""

    objective: str
    task: str
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.objective}-{self.task}-{self.seed}"


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """The runs in their order: one that is stopped early has something of everything."""
    for seed in arguments.seeds:
        for objective in arguments.objectives:
            for task in arguments.tasks:
                yield Job(objective, task, seed)


def write_task(task: str, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write a task's rows; the arguments of `run_tract` that say what they are."""
    count, items = TASKS[task], arguments.items
    if arguments.smoke:
        count, items = 12, 4
    chosen = random.Random(CHOICE_SEED)
    if task == "demo":
        train, held_out = directory / "demo-train.jsonl", directory / "demo-eval.jsonl"
        write_jsonl(train, make_rows("train", count))
        write_jsonl(held_out, make_rows("eval", items))
        return {"data": str(train), "eval_data": str(held_out)}
    if task == "saf":
        rubric = directory / "saf-rubric.yaml"
        rubric.write_text(RUBRIC, encoding="utf-8")
        files = {}
        for name, wanted in (("saf_train", count), ("saf_unseen_answers", items)):
            with (arguments.saf / f"{name}.csv").open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            chosen.shuffle(rows)
            files[name] = directory / f"{name}.jsonl"
            write_jsonl(files[name], rows[:wanted])
        columns = {"instruction": "question", "response": "answer", "rationale": "feedback"}
        return {
            "data": str(files["saf_train"]),
            "eval_data": str(files["saf_unseen_answers"]),
            "rubric": str(rubric),
            "columns": columns,
            "training": {"score_values": [0, 0.25, 0.5, 0.75, 1]},
        }
    rows = json.loads(arguments.vicuna.read_text(encoding="utf-8"))
    questions = sorted({_question(row) for row in rows})
    chosen.shuffle(questions)
    train_on, judge_on = questions[: count // 4], questions[count // 4 :][: items // 4]
    # One of the three annotations each: 80 rows.
    train_rows = [
        {**row, **{name: row[name][:1] for name in ("gpt4_score", "gpt4_feedback")}}
        for row in rows
        if _question(row) in train_on
    ]
    train, held_out = directory / "vicuna-train.json", directory / "vicuna-eval.json"
    write_json(train, train_rows)
    write_json(held_out, [row for row in rows if _question(row) in judge_on])
    return {"data": str(train), "eval_data": str(held_out)}


def _question(row: dict[str, Any]) -> str:
    return str(row["instruction"]).split("###Response to evaluate")[0]


def do(job: Job, directory: Path, arguments: argparse.Namespace) -> None:
    """Do one run, or go on with it."""
    given = write_task(job.task, directory, arguments)
    training = {"seed": job.seed, "report_to": "none", "save_strategy": "no", **given.pop("training", {})}
    generation: dict[str, Any] = {"seed": job.seed}
    if job.objective == "paper":
        generation["max_new_tokens"] = PAPER_TOKENS[job.task]
    if arguments.smoke:
        training["max_steps"], generation["max_new_tokens"] = 1, 4
    run_tract(
        arguments.model,
        output_dir=directory / job.folder,
        training=training,
        generation=generation,
        objective=job.objective,
        isolate=False,
        **given,
    )


def figures(job: Job, folder: Path) -> dict[str, Any] | None:
    """What came out of one run; None while it is not finished."""
    if not (folder / "report.json").is_file():
        return None
    seconds = sum(step.get("seconds", 0.0) for step in read_json(folder / "steps.json").values())
    found: dict[str, Any] = {**job._asdict(), "minutes": seconds / 60, "judges": {}}
    for name, judged in JUDGED.items():
        if not (folder / judged).is_dir():
            continue
        report = Judged(folder / judged).scales[""].report()
        found["judges"][name] = report.to_dict()
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    titles = ["task", "objective", "seed", "judge", "RMSE", "of the mean", "difference [95 %]", "spread"]
    titles += ["Pearson [95 %]", "failed", "minutes"]
    lines = [f"| {' | '.join(titles)} |", "|---|---|---:|---|---:|---:|---|---:|---|---:|---:|"]
    for result in sorted(results, key=lambda each: (each["task"], each["objective"], each["seed"])):
        for name, report in result["judges"].items():
            standing = report.get("standing")
            cells = ["-"] * 5
            if standing:
                cells = [
                    f"{report['rmse']['value']:.3f}",
                    f"{standing['mean']['rmse']:.3f}",
                    _interval(standing["minus_mean"]),
                    f"{standing['spread']:.2f}",
                    _interval(report["pearson"]),
                ]
            last = [str(report["failed"]), f"{result['minutes']:.0f}"]
            lines.append(
                f"| {' | '.join([result['task'], result['objective'], str(result['seed']), name, *cells, *last])} |"
            )
    return "\n".join(lines)


def _interval(measured: dict[str, Any]) -> str:
    numbers = [measured[name] for name in ("value", "low", "high")]
    if any(number is None or number != number for number in numbers):
        return "-" if numbers[0] is None or numbers[0] != numbers[0] else f"{numbers[0]:.3f}"
    return "{:.3f} [{:.3f}, {:.3f}]".format(*numbers)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", help="seed model; SmolLM2-135M-Instruct by default")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--items", type=int, default=60, help="held-out items")
    parser.add_argument("--saf", type=Path, help="folder with saf_train.csv and saf_unseen_answers.csv")
    parser.add_argument("--vicuna", type=Path, help="vicuna_eval.json of prometheus-eval")
    parser.add_argument("--table", action="store_true", help="print what is there, and do nothing")
    parser.add_argument("--smoke", action="store_true", help="a step each, on a few rows: does it run?")
    arguments = parser.parse_args(argv)
    for task in ("saf", "vicuna"):
        if task in arguments.tasks and getattr(arguments, task) is None:
            parser.error(f"--{task}: give the task's rows, or leave it out of --tasks")
    directory: Path = arguments.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    if arguments.model is None:
        arguments.model = str(directory / "seed-model")
        if not (directory / "seed-model" / "config.json").exists():
            save_seed_model(directory / "seed-model", fastest_dtype())
    if not arguments.table:
        for job in jobs(arguments):
            print(f"\n=== {job.folder}", flush=True)
            do(job, directory, arguments)
    found = [figures(job, directory / job.folder) for job in jobs(arguments)]
    results = [each for each in found if each is not None]
    print(table(results))
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl, trl_tract)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    summary = {"benchmark": "first_judge", "device": device, "threads": torch.get_num_threads(), "versions": versions}
    aside = ("saf", "vicuna", "output_dir", "model")
    summary["arguments"] = {name: value for name, value in vars(arguments).items() if name not in aside}
    write_json(directory / "results.json", {**summary, "results": results})
    print(json.dumps({**summary, "results": results}))


if __name__ == "__main__":
    main()
