"""What a shell block runs: bash itself reads it, and each command is given to the parser of the program that it names.

Nothing that the block names is started: the commands on the path are recorders.
"""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from pages import ROOT
from trl import TrlParser

from trl_tract.cli import main

# In one write: the commands of a pipe are recorded at the same time.
# The end of a command is no newline: bash would write what stands behind it apart, amid another command of a pipe.
_RECORDER = """#!/bin/bash
printf '%s\\0' "$(basename "$0")" "$@" $'\\036' >> "$RECORD"
"""
_VENV = re.compile(r"(?<![\w/])(\.venv[\w-]*/bin)/")


def commands_of(code: str, directory: Path) -> list[list[str]]:
    """The commands of a shell block with their arguments, as bash splits them; it runs in `directory`.

    Raises:
        AssertionError: bash cannot read it, or it starts a program that `check` does not know.
    """
    tools, record = directory / ".recorders", directory / ".recorded"
    record.write_text("")
    for folder in (tools, *(directory / found for found in _VENV.findall(code))):
        folder.mkdir(parents=True, exist_ok=True)
        for name in PROGRAMS:
            (folder / name).write_text(_RECORDER.replace("basename", "/usr/bin/basename"))
            (folder / name).chmod(0o755)
        (folder / "activate").write_text(f"PATH={folder}:$PATH")
    environment = {"PATH": str(tools), "RECORD": str(record), "SLURM_ARRAY_TASK_ID": "2"}
    done = subprocess.run(
        ["/bin/bash", "-euc", code], cwd=directory, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"bash on\n{code}\n{done.stderr}"
    commands: list[list[str]] = [[]]
    for word in record.read_text().split("\0")[:-1]:
        if word == "\x1e":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands[:-1]


class _Parsed(BaseException):
    """What the options were; leaves the command before it does anything."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        super().__init__()
        self.values = values


def parse(arguments: Sequence[str]) -> tuple[Any, ...]:
    """The options of a `trl-tract` command line, parsed and checked by the command itself, which then stops.

    Raises:
        AssertionError: The command refused them; its message is in it.
    """
    original = TrlParser.parse_args_and_config

    def parse_and_stop(self: TrlParser, args: Any = None, **kwargs: Any) -> Any:
        # By itself TRL's parser refuses what it does not know.
        raise _Parsed(tuple(original(self, args)))

    said = io.StringIO()
    TrlParser.parse_args_and_config = parse_and_stop
    try:
        with contextlib.redirect_stderr(said):
            code = main(arguments)
    except _Parsed as parsed:
        return parsed.values
    except SystemExit as stopped:
        code = stopped.code
    finally:
        TrlParser.parse_args_and_config = original
    raise AssertionError(f"trl-tract {shlex.join(arguments)} ended with {code}: {said.getvalue()}")


def check(command: Sequence[str]) -> None:
    """Let a command's own parser read its arguments, and see that the files and extras it names are there."""
    PROGRAMS[command[0]](list(command[1:]))


def _tract(arguments: list[str]) -> None:
    parse(arguments)


def _module(name: str, arguments: list[str]) -> None:
    assert name == "trl_tract.cli", f"-m {name} is no module that is documented"
    parse(arguments)


def _accelerate(arguments: list[str]) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    args = launch_command_parser().parse_args(arguments[1:])
    if args.config_file:
        load_config_from_file(str(ROOT / args.config_file))
    assert args.module
    _module(args.training_script, args.training_script_args)


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(arguments)
    assert args.module
    _module(args.training_script, args.training_script_args)


def _pip(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert arguments[0] in ("install", "uninstall")
    for argument in arguments[1:]:
        if argument.startswith("-"):
            assert argument in ("-q", "-e", "-y", "--no-deps"), argument
            continue
        requirement = Requirement(argument.replace(".[", "trl-tract[", 1) if argument.startswith(".") else argument)
        if requirement.name == "trl-tract":
            assert requirement.extras <= set(project["optional-dependencies"]), argument


def _python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "venv"] or arguments[:2] == ["-m", "pip"]:
        return
    script = ROOT / arguments[0]
    assert script.is_file(), f"{arguments[0]} is not there"
    with stopped_by_its_parser(script, arguments[1:]) as read:
        assert read, f"{arguments[0]} does not parse its arguments with argparse"


def _bash(arguments: list[str]) -> None:
    """A script of ours: what its parts (`part NAME SECONDS SCRIPT OPTIONS`) start takes its options."""
    text = (ROOT / arguments[0]).read_text(encoding="utf-8").replace("\\\n", " ")
    if "#SBATCH" in text:
        return  # tests/test_launching.py reads these
    text = text.replace("$here", str(Path(arguments[0]).parent)).replace("$minutes", "1")
    parts = re.findall(r"^ *part \w+ \d+ (.*)$", text, re.MULTILINE)
    assert parts
    for part in parts:
        _python(shlex.split(part))


@contextlib.contextmanager
def stopped_by_its_parser(script: Path, arguments: Sequence[str]) -> Iterator[bool]:
    """Run the `main` of a script up to the point where its arguments are parsed."""
    import argparse

    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        raise _Parsed((original(self, list(arguments), namespace),))

    sys.path.insert(0, str(script.parent))
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    argparse.ArgumentParser.parse_args = parse_and_stop
    try:
        spec.loader.exec_module(module)
        module.main()
        read = False
    except _Parsed:
        read = True
    finally:
        argparse.ArgumentParser.parse_args = original
        sys.path.remove(str(script.parent))
        del sys.modules[script.stem]
    yield read


def _nothing(arguments: list[str]) -> None:
    """Programs whose arguments are not ours to check; a block that starts them says why it is not run."""


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "trl-tract": _tract,
    "accelerate": _accelerate,
    "torchrun": _torchrun,
    "pip": _pip,
    "bash": _bash,
    "sbatch": _bash,
    "python": _python,
    "python3": _python,
    "pytest": _nothing,
    "vllm": _nothing,
    "openssl": _nothing,
    "inspect": _nothing,
    "mkdocs": _nothing,
    "tee": _nothing,
}
PYTHON = os.fspath(sys.executable)
