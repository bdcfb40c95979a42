"""What a judge is given: several items, each of them a prompt or a row. Knows nothing of models or of scores."""

from collections.abc import Mapping, Sequence
from typing import Any

from trl_tract.rows.golds import is_missing
from trl_tract.rows.row import Row


def check_rows(rows: Any) -> None:
    """Whether these are several items.

    Raises:
        TypeError: They are one item, a table or an iterator; what to give instead is said.
    """
    if isinstance(rows, str | Mapping):
        raise TypeError(f"rows is a single {type(rows).__name__}. Put it into a list, as in judge.judge([row])[0]")
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        raise TypeError("rows is a table. Pass its rows as dicts, as in judge.judge(table.to_dict('records'))")
    if not hasattr(rows, "__len__"):
        raise TypeError(f"rows is a {type(rows).__name__}. Make it a list, as in judge.judge(list(rows))")


def read_item(row: Any, chat: bool | None) -> Row:
    """An item as a row with a prompt, text or chat messages; `chat`: which of them the judge was trained on, if known.

    Raises:
        TypeError, ValueError: It is neither; what it is is said.
    """
    if isinstance(row, Mapping) and "prompt" not in row:
        raise ValueError(f"the row has no `prompt`; its columns are {', '.join(sorted(map(str, row)))}")
    item: Row = dict(row) if isinstance(row, Mapping) else {"prompt": row}
    prompt = item["prompt"]
    if is_missing(prompt):
        raise ValueError("it is missing")
    if isinstance(prompt, str) and chat:
        raise TypeError(
            "it is plain text, but the judge was trained on chat messages. Pass "
            '[{"role": "user", "content": prompt}], or use judge_response'
        )
    if isinstance(prompt, str):
        return item
    if chat is False:
        raise TypeError(
            "it is chat messages, and the judge was trained on plain text: give the text of the prompt as in training"
        )
    if not isinstance(prompt, Sequence):
        raise TypeError(f"it is {type(prompt).__name__}, not text or a list of chat messages")
    if not prompt:
        raise ValueError("it has no messages")
    for message in prompt:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"a chat message needs `role` and `content`, but one is {message!r}")
    return item
