"""Chat messages as a template takes them: content as text, and what spells control tokens in it set apart.

Knows nothing of templates or tokenizers.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from trl_tract.scale.text import ScoreNotFoundError

# Set around what spells a control token in a message. Noncharacters of the private use planes: in no real text.
_FROM, _TO = "\U000ffffc", "\U000ffffd"
_SPELLED = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content|from|value)["']\s*:.*\}\s*\]\s*""", re.DOTALL)


def text_of(content: Any) -> str:
    """A message's content as text: text itself, or its parts of type text put together."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ScoreNotFoundError("not text", f"a message's content is {type(content).__name__}, not text")
    for part in content:
        if not isinstance(part, str) and not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ScoreNotFoundError("not text", f"a message holds a part of type {kind!r}. A judge reads text only")
    return "".join(part if isinstance(part, str) else part["text"] for part in content)


def json_cell(row: Mapping[str, Any], name: str) -> Any:
    """A column such as `tools`, which a table holds as JSON; None where it is missing, empty or NaN.

    Raises:
        ScoreNotFoundError: A text that is not JSON.
    """
    cell = row.get(name)
    cell = (cell if cell == cell else None) or None
    try:
        return json.loads(cell) if isinstance(cell, str) else cell
    except json.JSONDecodeError as error:
        raise ScoreNotFoundError("template", f"`{name}` is not JSON: {error}") from error


def no_spelled_messages(name: str, text: str) -> None:
    """Refuse a text that is a list of chat messages as JSON or Python writes it.

    Raises:
        ScoreNotFoundError: It is; `name` is the column.
    """
    if _SPELLED.fullmatch(text):
        raise ScoreNotFoundError(
            "not text",
            f"the {name} is a list of chat messages written as text, as in a CSV table. Give the list itself in JSONL "
            "or Parquet. If it is meant as text, add words around it",
        )


def shows(text: str, said: str) -> bool:
    """Whether rendered text holds what a message says: as it is or as JSON, up to white space and switches of thinking.

    Example:
        >>> shows("<user> Is it polite?", " Is it  polite? "), shows("<user>", "Is it polite?")
        (True, False)
    """

    def bare(text: str) -> str:
        return re.sub(r"/(?:no_?)?think\b", "", "".join(text.split()))

    held = bare(text)
    return bare(said) in held or bare(json.dumps(said, ensure_ascii=False)[1:-1]) in held


def whole_characters(text: str) -> None:
    """Refuse half a character, as text has it that was cut in the middle of an emoji."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ScoreNotFoundError("no Unicode", f"it contains half a character ({text[error.start]!r})") from error


def turn(role: str, text: str, parts: bool) -> dict[str, Any]:
    """A message of text, as one part where a template needs parts."""
    return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}


def marked(message: Any, control: re.Pattern[str], parts: bool) -> dict[str, Any]:
    """A message with its content as text, or as one part, and what spells control tokens set apart."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise ScoreNotFoundError("template", f"a chat message needs `role` and `content`, but one is {message!r}")

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return control.sub(f"{_FROM}\\g<0>{_TO}", value.replace(_FROM, "").replace(_TO, ""))
        if isinstance(value, Mapping):
            return {key: mark(each) for key, each in value.items() if each is not None}
        return [mark(each) for each in value] if isinstance(value, list | tuple) else value

    rest = {key: mark(value) for key, value in message.items() if key not in ("role", "content") and value is not None}
    if message.get("content") in (None, [], ()) or message["content"] != message["content"]:
        if message["role"] != "assistant":  # whose turn may be a call of a tool alone
            raise ScoreNotFoundError("empty", f"a message with the role {message['role']} is empty")
        return {"role": message["role"], **rest}
    return turn(message["role"], mark(text_of(message["content"])), parts) | rest


def stand_in(message: Mapping[str, Any], number: int, parts: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """A message with words that stand nowhere else for its text and its tools' names, and each word's kind."""
    words = {f"says{number}end": "text"} if message.get("content") else {}
    changed = {**message, **turn(message["role"], next(iter(words)), parts)} if words else dict(message)
    calls: list[Any] = []
    for place, call in enumerate(message.get("tool_calls") or ()):
        word = f"calls{number}x{place}end"
        words[word] = "call"
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            calls.append({**call, "function": {**function, "name": word}})
        else:
            calls.append({**call, "name": word} if isinstance(call, Mapping) else word)
    return changed | ({"tool_calls": calls} if calls else {}), words


def cut(text: str, control: re.Pattern[str]) -> tuple[str, tuple[int, ...]]:
    """Rendered text without the marks around what spells control tokens, and where to cut these."""
    if _FROM not in text and _TO not in text:
        return text, ()
    pieces, cuts, length, inside = [], [], 0, False
    for piece in re.split(f"({_FROM}|{_TO})", text):
        if piece in (_FROM, _TO):
            inside = piece == _FROM
            cuts.append(length)  # what stands on either side may not join into a token
            continue
        if inside:
            cuts += [length + match.start() + 1 for match in control.finditer(piece)]
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces), tuple(sorted({cut for cut in cuts if 0 < cut < length}))
