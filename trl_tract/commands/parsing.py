"""The parser of a command: its own options first, TRL's behind them, each under a heading, each spelled once.

Knows nothing of what the commands do.
"""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import TrlParser

_MODEL = ("model", "model_name_or_path")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of an option (`--output-dir` is understood too) and what kind of value it takes."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = [option for option in action.option_strings if "-" not in option.lstrip("-")] or action.option_strings
        if not action.option_strings:
            return super()._format_action_invocation(action)
        is_switch = action.nargs == 0 or (action.nargs == "?" and action.const is True)
        values = "" if is_switch else f" {self._format_args(action, self._kind_of_value(action))}"
        return f"{', '.join(shown)}{values}"

    @staticmethod
    def _kind_of_value(action: argparse.Action) -> str:
        if _is_bool(action):
            return "{true,false}"
        return {int: "N", float: "X", score: "X"}.get(action.type, "TEXT")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        unsaid = (None, False, "", argparse.SUPPRESS)
        if text is None or action.default in unsaid or action.required or "%(default)" in text:
            return text
        return f"{text.rstrip()} (default: %(default)s)"


class _Parser(TrlParser):
    """TRL's parser; a model may be called `model` or `model_name_or_path` everywhere, in a YAML file too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # of a range too: -2..2 is no option
        for action in self._actions:
            if action.dest in _MODEL:
                options = [f"--{name}" for name in _MODEL]
                action.option_strings = [*options, *(set(action.option_strings) - set(options))]
                self._option_string_actions.update(dict.fromkeys(options, action))

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        known = {action.dest for action in self._actions}
        for name, other in (_MODEL, _MODEL[::-1]):
            if name not in known and other in known and name in kwargs and other not in kwargs:
                kwargs[other] = kwargs.pop(name)
        for action in self._actions:
            if action.type is str and (number := _number_in(kwargs.get(action.dest))) is not None:
                raise ValueError(
                    f"{action.dest} must be text, but YAML read it as the number {number} (YAML reads 010 as 8). Put "
                    f'it in quotes in the YAML file: {action.dest}: "{number}"'
                )
        return list(super().set_defaults_with_config(**kwargs))


def _number_in(value: Any) -> float | None:
    """A number where text belongs, or in a list of texts; None if there is none."""
    values = value if isinstance(value, list) else [value]
    return next((each for each in values if isinstance(each, int | float) and not isinstance(each, bool)), None)


def _is_bool(action: argparse.Action) -> bool:
    """Whether an option is true or false; TRL has a copy of transformers' parser, and of this function."""
    return getattr(action.type, "__name__", "") == "string_to_bool"


def score(text: str) -> float | str:
    """A score of a grid; a range of them (`0..100`) stays text, which `ScoreGrid.from_values` writes out."""
    return text if ".." in text else float(text)


def make_parser(command: str, dataclass_types: Sequence[type], description: str = "") -> TrlParser:
    """A parser of dataclasses' fields, all of which may also stand in a YAML file.

    Args:
        dataclass_types: Its options; each class's docstring is their heading.
    """
    kinds = list(dataclass_types)
    parser = _Parser(
        kinds,
        prog=f"trl-tract {command}",
        description=description,
        usage=f"trl-tract {command} [--config FILE.yaml] [options]",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help="YAML file with options.")
    parser.add_argument(
        "--verbose", action="store_true", default=argparse.SUPPRESS, help="Print the traceback of an error."
    )
    for action in parser._actions:
        if action.dest == "score_values":
            action.type = score
        elif _is_bool(action) and action.nargs is None:
            action.nargs, action.const = "?", True  # also a switch whose default depends on something else
    headings = {field.name: _heading(kind, field.name) for kind in kinds for field in dataclasses.fields(kind)}
    # A stable sort: as in `kinds`, but TRL's last. argparse prints groups in the order in which they are made.
    order = sorted(dict.fromkeys(headings.values()), key=lambda heading: heading.startswith("TRL"))
    groups = {heading: parser.add_argument_group(heading) for heading in order}
    general = parser._optionals
    for action in list(general._group_actions):
        if action.dest in headings:
            general._group_actions.remove(action)
            groups[headings[action.dest]]._group_actions.append(action)
    general.title = "general"
    parser._action_groups.sort(key=lambda group: group is general)
    return parser


def _heading(kind: type, name: str) -> str:
    """Under what an option is listed: the class that it was first written in."""
    if issubclass(kind, TrainingArguments):
        if name not in host_fields(kind):
            return kind.__name__.removesuffix("Config")
        inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
        host = next(each for each in kind.__mro__ if each.__module__.startswith("trl."))
        return f"TRL: training ({'TrainingArguments' if name in inherited else host.__name__})"
    if kind.__module__.startswith("trl."):
        return "TRL: model, LoRA and quantisation (ModelConfig)"
    return str(kind.__doc__).strip().rstrip(".").lower()


def host_fields(kind: type) -> set[str]:
    """The fields that a configuration has from TRL's own one, without those whose meaning or default it changes."""
    host = next((each for each in kind.__mro__[1:] if each.__module__.startswith("trl.")), None)
    if host is None:
        return set()
    theirs = {field.name for field in dataclasses.fields(host)}
    return theirs - {"output_dir"} - {name for name in vars(kind).get("__annotations__", {})}


def parse(
    command: str, dataclass_types: Sequence[type], arguments: Sequence[str], description: str = ""
) -> tuple[Any, ...]:
    """The options of a command, as instances of their dataclasses; wrong usage ends the process with exit code 2.

    Raises:
        ValueError, OSError: A value is refused, or the YAML file cannot be read.
    """
    parser = make_parser(command, dataclass_types, description)
    given: list[str] = []
    for argument in arguments:
        # TrlParser knows the file by an argument of its own alone.
        given += argument.split("=", 1) if argument.startswith("--config=") else [argument]
    if given[-1:] == ["--config"]:
        parser.error("--config needs the path of a YAML file")
    *parsed, in_file, on_line = _parsed(parser, given)
    unknown = [name for name in in_file[::2]] + [word for word in on_line if word.startswith("-")] + on_line
    if unknown:
        where = f" (in {given[given.index('--config') + 1]})" if in_file else ""
        parser.error(_unknown(parser, unknown[0].partition("=")[0], command, where))
    return tuple(parsed)


def names_given(command: str, dataclass_types: Sequence[type], arguments: Sequence[str]) -> set[str]:
    """The options that a command is given, on its line or in its YAML file, by the names of their fields."""
    import yaml

    parser = make_parser(command, dataclass_types)
    actions = parser._option_string_actions
    words = [word.partition("=") for word in arguments]
    found = {actions[word].dest for word, _, _ in words if word in actions} - {"config"}
    file = next((value or arguments[i + 1] for i, (word, _, value) in enumerate(words) if word == "--config"), None)
    if file is not None:
        found.update(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    return found


def _parsed(parser: TrlParser, given: Sequence[str]) -> tuple[Any, ...]:
    import yaml

    try:
        return tuple(
            parser.parse_args_and_config(given, return_remaining_strings=True, separate_remaining_strings=True)
        )
    except yaml.YAMLError as error:
        raise ValueError(f"{given[given.index('--config') + 1]} is not YAML: {error}") from error


def _unknown(parser: TrlParser, word: str, command: str, where: str) -> str:
    known = [option for action in parser._actions for option in action.option_strings]
    if not word.startswith("-"):
        return f"{word!r} does not belong to any option{where}. Put quotes around values that contain spaces"
    near = difflib.get_close_matches(word.replace("-", "_").replace("__", "--", 1), known, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"trl-tract {command} --help lists the options"
    return f"trl-tract {command} has no option {word}{where}. {hint}"
