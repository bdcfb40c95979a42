"""`trl-tract`: finds the command, calls it, and makes exit codes and one-line messages of what goes wrong."""

import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches

import trl_tract
from trl_tract.commands.entry_points import COMMANDS, USAGE
from trl_tract.text.display import visible
from trl_tract.text.terminal import as_options, hide_host_warnings


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0; 1 for a run that failed, or rows that would be refused; 2 for wrong usage (argparse's own
        errors end the process with it); 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(trl_tract.__version__)
        return 0
    name = arguments[0]
    command = COMMANDS.get(name)
    if command is None:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(
            f"trl-tract: error: unknown command {name!r}. Choose one of {', '.join(COMMANDS)}.{hint}", file=sys.stderr
        )
        return 2
    from trl_tract.text.progress import hide_bars_of_libraries  # here, because it imports tqdm

    hide_bars_of_libraries()
    hide_host_warnings()
    try:
        return command(arguments[1:])
    except KeyboardInterrupt:
        print(
            f"trl-tract {name}: stopped. Finished work is saved. Run the same command again to continue.",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has seen enough. Python would complain again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "--verbose" in arguments or os.environ.get("TRL_TRACT_DEBUG"):
            traceback.print_exc()
        print(f"trl-tract {name}: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: Exception) -> str:
    message = visible(" ".join(str(error).split()))
    if isinstance(error, ValueError | OSError | RuntimeError | ImportError) and message:
        return as_options(message)  # written for the user
    kind = type(error).__name__
    return f"{kind}: {message}. This is a bug. Please report it with the output of --verbose and of `trl-tract env`"


if __name__ == "__main__":
    sys.exit(main())
