"""The commands that train, and what several commands need: a model, columns, one process that speaks."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from trl_tract.commands import deploying, options
from trl_tract.text.terminal import uses_colour


def train(arguments: Sequence[str], rows: Any, columns: Any, processes: Any, training: Any, model: Any) -> int:
    """`trl-tract train`."""
    from trl_tract.backends.loading import tokenizer_to_train
    from trl_tract.runs.launching import Launch
    from trl_tract.runs.train_steps import TrainStep
    from trl_tract.sources.door import Bare, Source, rows_file
    from trl_tract.training.config import field_values

    name, own, fields = required_model(model), own_columns(columns), field_values(training)
    if rows.eval_data and training.eval_strategy == "no":
        raise ValueError(
            "--eval_data is given, but evaluation is off. Set --eval_strategy to epoch or steps, or leave the data out"
        )
    launch = Launch.planned(processes.num_processes, processes.accelerate_config)
    if launch.starts:
        print(f"Training in {launch}: {launch.update(fields)}", flush=True)
    if rows.dry_run:
        from trl_tract.commands.dry_run import dry_train

        colour = uses_colour(sys.stdout)
        settings: dict[str, Any] = {"own": own, "training": fields, "eval_data": rows.eval_data, "colour": colour}
        settings["revision"] = model.model_revision
        return int(not dry_train(name, rows.data, training.output_dir, **settings))
    if launch.starts:
        launch, each = launch.shared(fields)
        shared = [word for name, count in each.items() for word in (f"--{name}", str(count))]
        return deploying.start_again(launch, "train", [*arguments, *shared])
    tell_of_neighbours()
    chat = bool(tokenizer_to_train(name, training.chat_template_path, model.model_revision).chat_template)

    def read(source: str) -> AbstractContextManager[Path]:
        bare: Bare = "all" if training.drop_rationale else "none"
        return rows_file(Source(source, training.scales, own, training.invalid_rows, bare=bare).training_rows(chat))

    return _trained("model", partial(TrainStep, name), rows, training.output_dir, fields, model, own, read)


def rl(arguments: Sequence[str], rows: Any, columns: Any, training: Any, model: Any) -> int:
    """`trl-tract rl`, likewise."""
    from trl_tract.commands.parsing import names_given
    from trl_tract.runs.launching import Launch
    from trl_tract.runs.train_steps import RLStep
    from trl_tract.saved.judge_config import FILE_NAME, JudgeConfig
    from trl_tract.sources.door import Source, rows_file
    from trl_tract.training.config import field_values
    from trl_tract.training.starting import policy_tokenizer

    launch = Launch()  # one process, which is shown one accelerator
    if launch.starts:  # the first of several: its groups of completions were tried in one process alone
        return deploying.start_again(launch, "rl", arguments)
    name = required_model(model)
    trained = (Path(name) / FILE_NAME).is_file()
    own = own_columns(columns, name if trained else None)
    judge = JudgeConfig.load(name) if trained else JudgeConfig(training.scales)
    scales, chat = judge.scales, judge.asks_chat(policy_tokenizer(name, model.model_revision))
    tell_of_neighbours()

    def read(source: str) -> AbstractContextManager[Path]:
        items = Source(source, scales, own, training.invalid_rows)
        return rows_file(items.rows(chat, lambda item: [item.reference]))

    given = names_given("rl", [type(each) for each in (rows, columns, training, model)], arguments)
    fields = {field: value for field, value in field_values(training).items() if field in given}
    return _trained("judge", partial(RLStep, name), rows, training.output_dir, fields, model, own, read)


def _trained(
    what: str,
    step: Callable[..., Any],
    rows: Any,
    out: str,
    fields: dict[str, Any],
    model: Any,
    own: Any,
    read: Callable[[str], AbstractContextManager[Path]],
) -> int:
    """Train on the rows that `read` makes a file of."""
    kept = None if own is None else own.to_dict()
    with read(rows.data) as data, read(rows.eval_data) if rows.eval_data else nullcontext() as eval_data:
        evaluated = None if eval_data is None else str(eval_data)
        step(str(data), out, evaluated, fields, asdict(model), own=kept).run()
    if is_first_process():
        print(f"The {what} is in {out}")
    return 0


def own_columns(columns: options.ColumnArguments, judge: str | None = None) -> Any:
    """The columns and the rubric that were given; for the rest those that were saved with a judge."""
    from trl_tract.sources.columns import OwnColumns

    if judge is None:
        return OwnColumns.to_train_on(columns.columns, columns.rubric)
    return OwnColumns.beside(OwnColumns.parse(columns.columns, columns.rubric), OwnColumns.load(judge))


def tell_of_neighbours() -> None:
    """Say which other training libraries are there, and what they ask of TRL."""
    from trl_tract.training.neighbours import neighbours

    if is_first_process():
        for line in neighbours():
            print(line, file=sys.stderr)


def is_first_process() -> bool:
    """Whether this is the process that speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def required_model(model: Any) -> str:
    """The model that is trained."""
    if not model.model_name_or_path:
        raise ValueError("--model is missing. Give the directory or hub id of the model to train")
    return str(model.model_name_or_path)
