"""What a row and a prompt are, as types."""

from typing import Any

Row = dict[str, Any]


Prompt = str | list[dict[str, str]]
