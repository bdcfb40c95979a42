"""A script with which a shell completes commands and options. It is static: completing starts no Python.

The script is made by shtab from the parsers themselves. Knows nothing of what the commands do.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence

from trl_tract.commands.parsing import make_parser

SHELLS = ("bash", "zsh", "fish")
_FILES = {"config", "data", "eval_data", "rubric", "html"}
_FOLDERS = {"output_dir", "judgements", "model", "model_name_or_path"}


def completion(
    arguments: Sequence[str],
    commands: Sequence[str],
    options_of: Callable[[str], Sequence[type]],
    sentences: Mapping[str, str],
) -> int:
    """`trl-tract completion`: print the script of the shell that is named."""
    parser = argparse.ArgumentParser(
        prog="trl-tract completion",
        description='Print a script that completes commands and options. In bash: eval "$(trl-tract completion bash)"',
    )
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args(list(arguments)).shell
    print(completion_script(shell, {command: options_of(command) for command in commands}, sentences))
    return 0


def completion_script(shell: str, commands: Mapping[str, Sequence[type]], sentences: Mapping[str, str]) -> str:
    """The script of one shell."""
    try:
        import shtab
    except ImportError as error:
        raise ImportError('shell completion needs shtab: pip install "trl-tract[completion]"') from error

    parser = argparse.ArgumentParser(prog="trl-tract")
    parser.add_argument("--version", action="store_true", help="print the version")
    subparsers = parser.add_subparsers()
    for command, kinds in commands.items():
        own = make_parser(command, kinds)
        for action in own._actions:
            action.help = _brief(action.help)
            if action.dest in _FILES:
                action.complete = shtab.FILE
            elif action.dest in _FOLDERS:
                action.complete = shtab.DIRECTORY
        subparsers.add_parser(command, parents=[own], add_help=False, help=sentences[command])
    shells = subparsers.add_parser("completion", help=sentences["completion"])
    shells.add_argument("shell", choices=SHELLS)
    return str(shtab.complete(parser, shell=shell))


def _brief(text: str | None) -> str | None:
    """The first sentence of a help text; a shell shows no more, and some of TRL's hold pages."""
    return None if text is None else " ".join(text.split()).split(". ")[0][:100].replace("%", "%%")
