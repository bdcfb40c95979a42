"""Text of unknown origin in Markdown: as code, in a fenced block, in a line. Knows nothing of cards or models."""

import pprint
import re
from typing import Any

from trl_tract.text.display import visible


def python_literal(prompt: Any) -> str:
    """A prompt as Python source, a line of text on a line of code; running it gives the prompt back.

    None, an unknown prompt, becomes "...". An HTML comment's opening is written as an escape, so that none begins here.

    Example:
        >>> print(python_literal("Judge.\\nReply: fine"))
        (
            "Judge.\\n"
            "Reply: fine"
        )
    """
    if prompt is None:
        return '"..."  # a prompt written like the training rows'
    if isinstance(prompt, str):
        return _lines(prompt, 4)
    if all(set(turn) == {"role", "content"} and isinstance(turn["content"], str) for turn in prompt):
        turns = (f'{{"role": {turn["role"]!r}, "content": {_lines(turn["content"], 8)}}}' for turn in prompt)
        return "[\n    " + ",\n    ".join(turns) + ",\n]"
    return pprint.pformat(prompt, width=110, sort_dicts=False).replace("<!--", "<\\x21--")


def fenced(text: str, language: str = "") -> str:
    """A Markdown code block whose fence is longer than any run of backticks in it.

    Example:
        >>> print(fenced("a ``` b"))
        ````
        a ``` b
        ````
    """
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def code_span(text: str) -> str:
    """A piece of text as inline code, on one line, whatever is in it.

    Example:
        >>> print(code_span("[RESULT]"), code_span("a`b"))
        `[RESULT]` `` a`b ``
    """
    text = visible(text).replace("\n", "\\n")
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{fence} {text} {fence}"


def plain_line(text: str) -> str:
    """Text of unknown origin in a line of Markdown: nothing in it is markup.

    Example:
        >>> print(plain_line("a <b> | *c*"))
        a \\<b\\> \\| \\*c\\*
    """
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(visible(text).split()))


def _lines(text: str, indent: int) -> str:
    parts = [_quoted(line) for line in text.splitlines(keepends=True)] or ['""']
    if len(parts) == 1:
        return parts[0]
    inner, outer = " " * indent, " " * (indent - 4)
    return "(\n" + "\n".join(inner + part for part in parts) + f"\n{outer})"


def _quoted(line: str) -> str:
    body = repr(line)[1:-1] if repr(line)[0] == '"' else repr(line)[1:-1].replace("\\'", "'").replace('"', '\\"')
    return f'"{body}"'.replace("<!--", "<\\x21--")
