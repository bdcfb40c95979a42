"""The demo: seed model, cross-entropy judge, stage one and TRACT on the same held-out items, in one table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from trl_tract.backends.device import fastest_dtype
from trl_tract.demo.seed_model import save_seed_model
from trl_tract.demo.task import ONE_TO_FIVE, SCALES, Scale, make_rows
from trl_tract.evaluation.pairs import Floats
from trl_tract.evaluation.report import ScoreReport, comparison_table, score_report
from trl_tract.files.fingerprint import made_by
from trl_tract.files.journal import read_jsonl, write_jsonl
from trl_tract.runs.judged import Judged
from trl_tract.runs.results import write_run_page
from trl_tract.runs.run import Run
from trl_tract.runs.steps import DistillStep, JudgeStep
from trl_tract.runs.train_steps import TrainStep

# What `trl-tract run` derives for these rows (docs/defaults.md).
DERIVED = {"raft_weight": 0.5, "annotator_loss": "distribution", "annotator_weight": 1.0}
# Not the defaults: with a weight of 1 and the score out of the cross-entropy, stage two once ended with all probability
# on the score 1, where the squared error has no gradient, and the rationales came out worse. See docs/demo.md.
COT_RAFT = {"raft_weight": 0.2, "score_in_ce": True}
CROSS_ENTROPY = {"raft_weight": 0.0, "score_in_ce": True}


@dataclass(frozen=True)
class Size:
    """How much of everything a form of the demo uses, and the objective of its two stages."""

    training_rows: int
    held_out_items: int
    epochs: float
    batch_size: int
    minutes: int
    learning_rate: float = 1e-3
    objective: Mapping[str, Any] = field(default_factory=lambda: DERIVED)


QUICK = Size(training_rows=160, held_out_items=60, epochs=3, batch_size=4, minutes=8)
FULL = Size(480, 120, epochs=2, batch_size=4, minutes=35, learning_rate=2e-3, objective=COT_RAFT)

GENERATION = {"name": "transformers", "batch_size": 32}
LORA = {"dtype": "auto", "use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
SAMPLING = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.03, "max_new_tokens": 36}

JUDGES = {
    "seed model": "judged-seed",
    "cross-entropy, sampled score": "judged-ce",
    "stage one, expected score": "judged-stage1",
    "TRACT": "judged-tract",
}


def run_demo(
    output_dir: str, *, full: bool, seed: int = 0, model: str | None = None, scale: str = "1-5"
) -> dict[str, ScoreReport]:
    """Train and compare the four judges; print the table, two worked examples and where the report page is.

    Args:
        output_dir: Holds one run; an interrupted one goes on where it stopped.
        full: The longer form.
        seed: Of training and sampling.
        model: Seed model; SmolLM2-135M-Instruct by default.
        scale: `1-5`, or `0-100`: the same rows with the scores 0, 25, 50, 75 and 100, on a grid of 101 scores.

    Returns:
        Judge name -> its agreement with the gold scores, on 1 to 5 whatever the scale, so that errors compare.

    Raises:
        ValueError: An unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown: choose one of {', '.join(SCALES)}")
    size, scores = FULL if full else QUICK, SCALES[scale]
    directory = Path(output_dir)
    settings = {"demo": "full" if full else "quick", "seed": seed, "model": model or "default", **vars(size)}
    if scores != ONE_TO_FIVE:
        settings["scale"] = scale
    run = Run(directory, settings | made_by(None, model), total=9)
    print(
        f"This takes about {size.minutes} minutes on two CPU cores. If it is interrupted, run the same command again."
    )
    train_file, eval_file, seed_model = directory / "train.jsonl", directory / "eval.jsonl", directory / "seed-model"

    def prepare() -> None:
        write_jsonl(train_file, demo_rows("train", size.training_rows, scores))
        write_jsonl(eval_file, demo_rows("eval", size.held_out_items, scores))
        if model is None:
            dtype = fastest_dtype()
            print(f"    seed model: {save_seed_model(seed_model, dtype)}, {dtype}")

    title = f"{size.training_rows} training rows, {size.held_out_items} held-out items"
    run.step("prepare", title, prepare, makes=["train.jsonl", "eval.jsonl", "seed-model"])
    start = model or str(seed_model)
    config = AutoConfig.from_pretrained(start)
    # A model that was saved in bfloat16 is also trained in it; a float32 one is, on most CPUs, faster as it is.
    bf16 = config.dtype == torch.bfloat16
    lora = {**LORA, "lora_target_modules": upper_layers(config.num_hidden_layers)}

    def train(name: str, rows: Path, objective: Mapping[str, Any]) -> TrainStep:
        training = {**training_settings(size, seed), "bf16": bf16, **objective, "score_values": scores.values()}
        # The error is in squared units of the scale, so a step of 25 makes it 625 times what it is on 1 to 5.
        training["raft_weight"] /= scores.step**2
        return TrainStep(start, str(rows), str(directory / name), None, training, lora)

    def judge(name: str, trained: str | None, **changes: Any) -> JudgeStep:
        return JudgeStep(
            start if trained is None else str(directory / trained),
            str(eval_file),
            str(directory / JUDGES[name]),
            {**SAMPLING, "seed": seed, **changes},
            GENERATION,
            untrained=trained is None,
        )

    def train_step(name: str, title: str, rows: Path, objective: Mapping[str, Any], of: list[str]) -> None:
        run.step(name, title, train(name, rows, objective), makes=[name], of=["prepare", *of])

    def judge_step(name: str, title: str, step: JudgeStep, of: list[str]) -> None:
        run.step(name, f"Judging: {title}", step, makes=[Path(step.output_dir).name], of=["prepare", *of])

    train_step("ce", "Baseline: cross-entropy on rationale and score", train_file, CROSS_ENTROPY, [])
    train_step("stage1", "Stage one: CoT-RAFT on the given rationales", train_file, size.objective, [])
    distill = DistillStep(
        str(directory / "stage1"),
        str(train_file),
        str(directory / "self-generated"),
        {**SAMPLING, "seed": seed},
        GENERATION,
    )
    title = "Self-generation: the stage-one model writes its own rationales"
    run.step("distill", title, distill, makes=["self-generated"], of=["prepare", "stage1"])
    stage_two_rows = directory / "self-generated" / "rows.jsonl"
    title = "Stage two: the seed model again, on its own rationales"
    train_step("tract", title, stage_two_rows, size.objective, ["distill"])
    # The seed model does not write the marker, so it is put behind whatever it wrote.
    untrained = judge("seed model", None, append_marker=True, score_values=scores.values())
    judge_step("judge-seed", "seed model", untrained, [])
    sampled = judge("cross-entropy, sampled score", "ce", decision="sampled")
    judge_step("judge-ce", "cross-entropy judge, its score sampled", sampled, ["ce"])
    judge_step("judge-stage1", "stage-one model", judge("stage one, expected score", "stage1"), ["stage1"])
    judge_step("judge-tract", "TRACT", judge("TRACT", "tract"), ["tract"])
    return _report(directory, run, scores)


def upper_layers(layers: int) -> list[str]:
    """Linear modules of the upper half of a Llama-like model: below them no backward pass is needed."""
    modules = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    return [f"{layer}.{module}" for layer in range(layers * 7 // 15, layers) for module in modules]


def training_settings(size: Size, seed: int) -> dict[str, Any]:
    """Fields of TRACTConfig that all trainings of the demo have alike."""
    return {
        "num_train_epochs": size.epochs,
        "per_device_train_batch_size": size.batch_size,
        "learning_rate": size.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "max_length": 512,
    }


def demo_rows(split: str, count: int, scale: Scale = ONE_TO_FIVE) -> list[dict[str, Any]]:
    """The committed rows, or the same on another scale."""
    if scale != ONE_TO_FIVE:
        return make_rows(split, count, scale=scale)
    lines = files("trl_tract.demo").joinpath(f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def _report(directory: Path, run: Run, scale: Scale) -> dict[str, ScoreReport]:
    judged = {name: Judged(directory / folder).scales[""] for name, folder in JUDGES.items()}
    on_own_scale = {name: each.report() for name, each in judged.items()}

    def from_one(scores: Floats) -> Floats:
        return scores if scale == ONE_TO_FIVE else (scores - scale.lowest) / scale.step + 1

    pairs = {name: (from_one(each.score), from_one(each.reference)) for name, each in judged.items()}
    reports = {name: score_report(*pair) for name, pair in pairs.items()}
    trained = {
        "seed model": ["judge-seed"],
        "cross-entropy, sampled score": ["ce", "judge-ce"],
        "stage one, expected score": ["stage1", "judge-stage1"],
        "TRACT": ["stage1", "distill", "tract", "judge-tract"],
    }
    rows = [
        {
            "judge": name,
            "report": report,
            "grid_mass": judged[name].mean_grid_mass,
            "seconds": sum(run.seconds[step] for step in trained[name]),
        }
        for name, report in reports.items()
    ]
    table = comparison_table(rows)
    (directory / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nTRACT: {reports['TRACT'].verdict[0].text}\n")
    if scale != ONE_TO_FIVE:
        print(f"RMSE is on a scale of 1 to 5, for comparison. On the judge's own scale, multiply it by {scale.step}.\n")
    _worked_examples(directory, judged["TRACT"].records)
    print("Report page:")
    write_run_page(directory, judged, on_own_scale, print)
    print(f"Judge: {directory / 'tract'}    load it with CoTRAILJudge.from_pretrained(...)")
    return reports


def _worked_examples(directory: Path, records: Sequence[dict[str, Any]]) -> None:
    """Print an ordinary and a hostile item: the text, the judge's rationale, its score and the gold score."""
    rows = list(read_jsonl(directory / "eval.jsonl"))
    for hostile in (False, True):
        shown = next(
            ((row, record) for row, record in zip(rows, records, strict=True) if row["hostile"] is hostile), None
        )
        if shown is None:
            continue
        row, record = shown
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        print(f"--- {'A hostile item' if hostile else 'An item'} ({row['rubric']}) ---\n{prompt.strip()}")
        if record["error"]:
            print(f"=> no score: {record['error']}\n")
            continue
        print(f"=> {record['rationales'][0].strip()}\n=> score {record['score']:.2f}, gold {row['score']:g}\n")
