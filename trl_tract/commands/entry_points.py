"""The commands: each parses its options and calls. Heavy imports wait until a command is known.

Knows nothing of exit codes for errors, or of how they are printed: that is `cli`.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from trl_tract.commands import bootstrap, deploying, looking, options, reporting
from trl_tract.commands.training import is_first_process, own_columns, required_model, rl, tell_of_neighbours, train
from trl_tract.text.terminal import as_options, can_write, uses_colour

USAGE = """\
usage: trl-tract COMMAND [options]      trl-tract COMMAND --help lists the options of a command

start here:
  demo         train a small judge on built-in rows and compare it with baselines
  check        inspect your rows before training: lengths, scores, rows that would be refused
  run          train a judge on your rows in two stages and evaluate it; run again to continue

one step at a time:
  bootstrap    write rationales for rows that have only scores
  train        train one stage on rows with rationales and scores
  distill      let the stage-one model write new rationales for the training rows
  rl           continue training a judge by reinforcement learning, on prompts and scores
  judge        score rows or pairs of responses with a trained judge
  serve        serve a trained judge over HTTP
  merge        merge a judge's adapter into its base model, in 16 bits
  report       compare judgements with gold scores
  recalibrate  fit a correction of a judge's scores on held-out items

  env          print versions and devices for a bug report
  completion   print a shell completion script: trl-tract completion bash | zsh | fish

Options can also be given in a YAML file: --config FILE. run and train have --dry-run, which shows what would happen
without training. --verbose (or TRL_TRACT_DEBUG=1) prints the traceback of an error.

exit codes: 0 success; 1 failure, or rows would be refused; 2 wrong usage; 130 stopped by Ctrl-C
"""

SENTENCES = {
    line.split()[0]: " ".join(line.split()[1:]) for line in USAGE.splitlines() if line.startswith("  ") and line.strip()
}


def _option_groups(command: str) -> list[type]:
    """The dataclasses of a command's options."""
    generation = [options.GenerationArguments, options.EngineArguments]
    written = [options.ScoreArguments, options.ColumnArguments]
    workers = [options.WorkerArguments, deploying.LaunchArguments, deploying.ClusterArguments]
    if command in ("run", "train", "rl"):
        from trl import ModelConfig

        if command == "rl":
            from trl_tract.training.real_config import REALConfig

            return [options.RLArguments, options.ColumnArguments, REALConfig, ModelConfig]

        from trl_tract.training.config import TRACTConfig

        trained = [TRACTConfig, ModelConfig]
        if command == "run":
            kinds = [options.RunArguments, options.ColumnArguments, options.GenerationArguments]
            return [*kinds, deploying.LaunchArguments, *trained]
        return [options.TrainArguments, options.ColumnArguments, deploying.LaunchArguments, *trained]
    groups: dict[str, list[type]] = {
        "demo": [options.DemoArguments],
        "check": [looking.CheckArguments, *written],
        "bootstrap": [bootstrap.BootstrapArguments, *written, generation[1], options.WorkerArguments],
        "distill": [options.DistillArguments, options.ColumnArguments, *generation, *workers],
        "judge": [*(options.JudgeArguments, options.RuleArguments, options.ColumnArguments), *(*generation, *workers)],
        "serve": [deploying.ServeArguments, options.RuleArguments, *generation],
        "merge": [deploying.MergeArguments],
        "report": [looking.ReportArguments],
        "recalibrate": [looking.RecalibrateArguments],
        "env": [],
    }
    return groups[command]


def _parse(command: str, arguments: Sequence[str], *, positional: str | None = None) -> tuple[Any, ...]:
    """The options of a command; words before the first option are short for the option `positional`."""
    from trl_tract.commands.parsing import parse

    named = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    if positional and named:
        arguments = [positional, *named, *arguments[len(named) :]]
    return parse(command, _option_groups(command), arguments, f"{SENTENCES[command]}.")


def _say(line: str) -> None:
    print(as_options(line), flush=True)


def _run(arguments: Sequence[str]) -> int:
    from trl_tract.commands.parsing import names_given
    from trl_tract.runs.launching import Launch
    from trl_tract.runs.pipeline import carry_out
    from trl_tract.runs.spec import RunSpec
    from trl_tract.training.config import field_values

    run, own, generation, processes, training, model = _parse("run", arguments)
    spec = RunSpec(
        required_model(model),
        run.data,
        **run.choices(),
        own=own_columns(own),
        training=field_values(training),
        model_args=asdict(model),
        generation=generation.sampling(),
        num_generations=generation.num_generations,
        bootstrap=run.bootstrap_settings(),
        rl=run.rl_settings(),
        backend=generation.engine(),
        given=frozenset(names_given("run", _option_groups("run"), arguments)),
    )
    launch = Launch.planned(processes.num_processes, processes.accelerate_config)
    if run.dry_run:
        from trl_tract.commands.dry_run import dry_run

        if launch.starts:
            print(f"Each step runs in {launch}")
        return int(not dry_run(spec, training.output_dir, colour=uses_colour(sys.stdout), say=_say))
    tell_of_neighbours()
    result = carry_out(spec, Path(training.output_dir), launch=launch, say=_say)
    for name, report in result.reports.items():
        mass = result.grid_mass[name]
        print(f"\n{name} (grid mass {'unknown' if mass is None else f'{mass:.3f}'})\n{report}")
        reporting.print_errors(result.errors[name])
    print(f"\nThe judge is in {result.model}. The full report is in {training.output_dir}/report.json")
    print(f"To judge other rows: trl-tract judge --model {result.model} --data FILE --output_dir DIRECTORY")
    return 0


def _train(arguments: Sequence[str]) -> int:
    return train(arguments, *_parse("train", arguments))


def _bootstrap(arguments: Sequence[str]) -> int:
    return bootstrap.write_rationales(*_parse("bootstrap", arguments))


def _rl(arguments: Sequence[str]) -> int:
    return rl(arguments, *_parse("rl", arguments))


def _distill(arguments: Sequence[str]) -> int:
    from trl_tract.backends.loading import load_tokenizer
    from trl_tract.distill.summary import read_summary
    from trl_tract.runs.steps import DistillStep
    from trl_tract.saved.judge_config import JudgeConfig
    from trl_tract.sources.door import Source, rows_file

    rows, columns, generation, engine, worker, processes, cluster = _parse("distill", arguments)
    backend, launch = deploying.for_generation(processes, cluster, engine.options(generation), worker.shard)
    if launch.starts:
        print(f"By {launch}", flush=True)
        return deploying.start_again(launch, "distill", arguments)
    settings = {
        **generation.sampling(),
        "num_generations": generation.num_generations,
        "on_failure": rows.on_failure,
        "allow_leaks": rows.allow_leaks,
        "keep_annotated": rows.keep_annotated,
        "block_size": worker.block_size,
    }
    judge = JudgeConfig.load(rows.model)
    source = Source(rows.data, judge.scales, own_columns(columns, rows.model), rows.invalid_rows)
    chat = judge.asks_chat(load_tokenizer(rows.model))
    # Where no annotated rationale is fallen back on, none is needed.
    needed = rows.on_failure == "keep_gold" or rows.keep_annotated
    given = source.training_rows(chat) if needed else source.rows(chat, lambda item: item.training or [item.reference])
    with rows_file(given) as data:
        who = deploying.who(processes, cluster)
        step = DistillStep(rows.model, str(data), rows.output_dir, settings, backend, worker.shard, **who)
        written = step.run()
    if written is not None and is_first_process():
        print(f"{read_summary(Path(rows.output_dir))}\nThe stage-two rows are in {written}")
        deploying.deliver(cluster, written)
    return 0


def _judge(arguments: Sequence[str]) -> int:
    from trl_tract.backends.loading import load_tokenizer
    from trl_tract.files.journal import read_jsonl, write_jsonl
    from trl_tract.runs.steps import JudgeStep
    from trl_tract.saved.judge_config import JudgeConfig
    from trl_tract.sources.door import Source, rows_file

    rows, rules, columns, generation, engine, worker, processes, cluster = _parse("judge", arguments)
    backend, launch = deploying.for_generation(processes, cluster, engine.options(generation), worker.shard)
    if launch.starts:
        print(f"By {launch}", flush=True)
        return deploying.start_again(launch, "judge", arguments)
    settings = {**generation.sampling(), "num_generations": generation.num_generations, **rules.rules()}
    judge = JudgeConfig.load(rows.model)
    source = Source(rows.data, judge.scales, own_columns(columns, rows.model))
    with rows_file(source.judged_rows(judge.asks_chat(load_tokenizer(rows.model)))) as data:
        who = {**deploying.who(processes, cluster), "block_size": worker.block_size}
        written = JudgeStep(rows.model, str(data), rows.output_dir, settings, backend, worker.shard, **who).run()
        if written is not None and is_first_process():
            # The report page shows the prompts, and the temporary file is about to go.
            write_jsonl(written.with_name("rows.jsonl"), read_jsonl(data))
    if written is not None and is_first_process():
        reporting.print_judged(rows.model, rows.output_dir)
        deploying.deliver(cluster, written)
    return 0


def _serve(arguments: Sequence[str]) -> int:
    from trl_tract.commands.serving import serve

    return serve(*_parse("serve", arguments))


def _merge(arguments: Sequence[str]) -> int:
    from trl_tract.commands.merging import merge

    return merge(*_parse("merge", arguments))


def _check(arguments: Sequence[str]) -> int:
    from trl_tract.commands.check import check

    rows, scores, columns = _parse("check", arguments, positional="--data")
    training, mark = rows.training() | vars(scores), "█" if can_write(sys.stdout, "█") else "#"
    return int(not check(rows.data, rows.model, training, own=own_columns(columns), rows=rows.rows, mark=mark))


def _recalibrate(arguments: Sequence[str]) -> int:
    return reporting.recalibrate(*_parse("recalibrate", arguments, positional="--judgements"))


def _report(arguments: Sequence[str]) -> int:
    return reporting.report(*_parse("report", arguments, positional="--judgements"))


def _demo(arguments: Sequence[str]) -> int:
    (args,) = _parse("demo", arguments)
    from trl_tract.demo.run import run_demo

    run_demo(args.output_dir, full=args.full, seed=args.seed, model=args.model, scale=args.scale)
    return 0


def _env(arguments: Sequence[str]) -> int:
    _parse("env", arguments)
    from trl_tract.commands.environment import environment, in_columns

    print(in_columns(environment()))
    return 0


def _completion(arguments: Sequence[str]) -> int:
    from trl_tract.commands.completion import completion

    return completion(arguments, [name for name in COMMANDS if name != "completion"], _option_groups, SENTENCES)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": _demo,
    "check": _check,
    "run": _run,
    "train": _train,
    "bootstrap": _bootstrap,
    "distill": _distill,
    "rl": _rl,
    "judge": _judge,
    "serve": _serve,
    "merge": _merge,
    "report": _report,
    "recalibrate": _recalibrate,
    "env": _env,
    "completion": _completion,
}
