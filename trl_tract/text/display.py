"""Text from models and data, made safe to look at: cut to a length, and nothing in it invisible.

Escaping is the template's. Knows nothing of HTML, scores or files.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Joiners shape emoji and Persian; without them correct text looks broken.
_HARMLESS = {"\n", "\t", "\u200c", "\u200d"}
_REWRITTEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_PRINTABLE_ASCII = re.compile(r"[\n\t\x20-\x7e]*")


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a text, and how long the whole is.

    Attributes:
        length: Characters of the whole text.
        shown: Characters of it that are shown.
    """

    text: str
    length: int
    shown: int

    @property
    def is_cut(self) -> bool:
        """Whether anything is left out."""
        return self.shown < self.length


def visible(text: str) -> str:
    """Write out characters that a reader cannot see: controls, direction marks, lone surrogates, tag characters.

    They hide words, turn lines around, or cannot be written as UTF-8 at all. Each becomes its code point, which any
    font can show. Line ends become newlines.

    Example:
        >>> visible("a" + chr(0) + "b" + chr(0x202E) + "c")
        'a⟨U+0000⟩b⟨U+202E⟩c'
    """
    if _PRINTABLE_ASCII.fullmatch(text):
        return text
    text = text.replace("\r\n", "\n")
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in _HARMLESS or unicodedata.category(character) not in _REWRITTEN:
        return character
    return f"⟨U+{ord(character):04X}⟩"


def excerpt(text: str, limit: int) -> Excerpt:
    """The first `limit` characters of `text`, made visible.

    Example:
        >>> excerpt("a long story", 6)
        Excerpt(text='a long', length=12, shown=6)
    """
    return Excerpt(visible(text[:limit]), len(text), min(limit, len(text)))


def short(text: str, limit: int) -> str:
    """A text that fits a line: its first `limit` characters, made visible, with an ellipsis where more follow.

    Example:
        >>> short("a long story", 6)
        'a long…'
    """
    beginning = excerpt(text, limit)
    return f"{beginning.text}…" if beginning.is_cut else beginning.text


def common_prefix(texts: Sequence[str]) -> int:
    """How many characters all texts begin with.

    Example:
        >>> common_prefix(["Judge: a", "Judge: b"])
        7
    """
    # Whatever the first and the last in order share, all between them share too.
    first, last = min(texts), max(texts)
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def prompt_text(prompt: Any) -> str:
    """A prompt as one text: plain as it is, chat messages behind the name of their role.

    Example:
        >>> print(prompt_text([{"role": "user", "content": "Judge this."}]))
        user: Judge this.
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence):
        return str(prompt)
    turns = (turn if isinstance(turn, Mapping) else {"content": turn} for turn in prompt)
    return "\n\n".join(f"{turn.get('role', 'message')}: {turn.get('content', '')}" for turn in turns)
