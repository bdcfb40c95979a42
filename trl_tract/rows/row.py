"""What a row and a prompt are, as types."""

from typing import Any

Row = dict[str, Any]

ROW_NUMBER = "__row__"
"""Column with the number that a row has in the file it came from; without it a row is named by its place."""

REFUSED = "__refused__"
"""Column that says, of a row that stands for a record that could not be read, why; it is that item's error."""

RENDERED_WITH = ("tools", "chat_template_kwargs", "prompt_is_text")
"""Columns that say how a row's prompt is rendered, wherever it is asked."""

Prompt = str | list[dict[str, str]]
