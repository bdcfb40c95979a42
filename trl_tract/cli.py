"""`trl-tract`: parses and calls. Heavy imports wait until a command is known, so that `--help` answers at once."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import trl_tract
from trl_tract.options import (
    DemoArguments,
    DistillArguments,
    GenerationArguments,
    JudgeArguments,
    ReportArguments,
    RunArguments,
    TrainArguments,
    WorkerArguments,
)

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

    from trl_tract.distill_summary import read_summary
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
    if rows.decision == "quantile":
        settings["quantile"] = rows.quantile
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
    from itertools import takewhile
    from pathlib import Path

    from trl_tract.report import compare, score_report
    from trl_tract.results import item_groups, judged_grid, judged_items, page_file, with_aspect
    from trl_tract.steps import check_same_items, count_errors, judged_aspects, mean_grid_mass, read_judgements

    # `report A B` is short for `report --judgements A B`.
    named = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    (args,) = _parse(
        "report", (ReportArguments,), [*(["--judgements"] if named else []), *named, *arguments[len(named) :]]
    )
    # A YAML file may name a single directory without making it a list.
    folders = [args.judgements] if isinstance(args.judgements, str) else args.judgements
    if len(folders) > 2:
        raise ValueError(f"{len(folders)} directories were given: one is reported on, two are compared")
    aspects = [judged_aspects(Path(folder)) for folder in folders]
    if aspects[0] != aspects[-1]:
        named = [", ".join(aspect or "one score" for aspect in of) for of in aspects]
        raise ValueError(
            f"{folders[0]} has judgements of {named[0]}, {folders[1]} of {named[1]}: they cannot be compared"
        )
    for aspect in aspects[0]:
        judged = [read_judgements(Path(folder), aspect) for folder in folders]
        if len(folders) == 2:
            check_same_items(judged[0], judged[1], folders)
        groups = item_groups(judged[0]["records"])
        grid = args.score_values or judged_grid(Path(folders[0]), aspect)
        options: dict[str, Any] = {"groups": groups, "n_bootstrap": args.n_bootstrap, "grid": grid}
        reports = [score_report(each["score"], each["reference"], **options) for each in judged]
        for folder, each, report in zip(folders, judged, reports, strict=True):
            mass = mean_grid_mass(each)
            print(f"{with_aspect(folder, aspect)} (grid mass {'unknown' if mass is None else f'{mass:.3f}'})")
            print(report)
            _print_errors(count_errors(each["records"]))
            print()
        if len(folders) == 2:
            a, b = judged
            print(f"a: {with_aspect(folders[0], aspect)}, b: {with_aspect(folders[1], aspect)}")
            print(compare(a["score"], b["score"], a["reference"], **options))
        if args.html:
            from trl_tract.page import write_page

            others = {folder: (Path(folder), report) for folder, report in zip(folders[1:], reports[1:], strict=True)}
            items = judged_items(Path(folders[0]), reports[0], data=args.data, others=others, aspect=aspect)
            page, *pictures = write_page(items, page_file(Path(args.html), aspect))
            print(f"The page is {page}; its {len(pictures)} pictures are in {page.stem}-plots beside it")


def _demo(arguments: Sequence[str]) -> None:
    from trl_tract.demo.run import run_demo

    (args,) = _parse("demo", (DemoArguments,), arguments)
    run_demo(args.output_dir, full=args.full, seed=args.seed, model=args.model, scale=args.scale)


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
