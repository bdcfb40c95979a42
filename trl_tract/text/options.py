"""Options as fields of dataclasses: what each means stands beside it, for `--help` and the documentation.

Knows no option. (`transformers.HfArg` does the same, but importing it takes longer than all of `--help`.)
"""

import copy
from collections.abc import Sequence
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
