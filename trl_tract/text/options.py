"""Options as fields of dataclasses: what each means stands beside it, for `--help` and the documentation.

Knows no option. (`transformers.HfArg` does the same, but importing it takes longer than all of `--help`.)
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field
from typing import Any


def option(default: Any, help: str, *, choices: Sequence[str] | None = None) -> Any:
    """A field with its help text, in which a percent sign is written `%%`; a list is made anew for each instance."""
    metadata = {"help": help} if choices is None else {"help": help, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(help: str) -> Any:
    """The same where the user has to say something."""
    return option(MISSING, help)


def read_mapping(name: str, given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """An option that is a mapping, on the command line as JSON; empty where nothing is given.

    Args:
        name: What a message calls it.

    Raises:
        ValueError: It is something else.
    """
    try:
        found = json.loads(given) if isinstance(given, str) and given else given or {}
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}={given!r} is not a mapping of names to values")
    return dict(found)
