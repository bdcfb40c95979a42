"""What must not stand in a file: tokens, keys, and passwords in addresses. Knows settings by their names."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_NAMES = re.compile(
    r"(.*_)?((hub|hf|auth|access|refresh|bearer|session|api|sas)_?token|(api|access|private|secret)_?key"
    r"|password|passwd|secret|credentials?)|token|authorization",
    re.IGNORECASE,
)
# Also where an address carries them, as one that is signed for a while does.
_IN_TEXT = re.compile(
    r"(?<=://)[^/\s@]+(?=@)|\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|(?<=\bBearer )\S{8,}"
    r"|(?<=token=|ature=|ntial=)[^&\s#]+|(?<=[?&]key=|[?&]sig=|_key=|-key=)[^&\s#]+",
    re.IGNORECASE,
)


def key_of(variable: str) -> str | None:
    """The key in an environment variable, without the white space that its file ends in; None where there is none."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{variable} contains characters that are not allowed in an HTTP header")
    return key or None


def without_secrets(value: Any) -> Any:
    """A copy of settings, at any depth, in which what is secret by its name or its form is `***`.

    Example:
        >>> without_secrets({"hub_token": "x", "eos_token": "</s>", "base_url": "http://me:x@host/v1"})
        {'hub_token': '***', 'eos_token': '</s>', 'base_url': 'http://***@host/v1'}
    """
    if isinstance(value, Mapping):
        hide = [name for name, one in value.items() if one and _NAMES.fullmatch(str(name).replace("-", "_"))]
        return {name: HIDDEN if name in hide else without_secrets(one) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(without_secrets, value))
    return _IN_TEXT.sub(HIDDEN, value) if type(value) is str else value  # an enumeration's member stays one
