"""The Markdown of the repository: its code blocks, its links and its headings. Knows nothing of what they say."""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
)
_FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<language>\w*)\n(?P<code>.*?)^(?P=ticks)[ \t]*$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+?) -->\s*\Z")
_LINK = re.compile(r"(?<!\\)\]\((?P<target>[^)\s]+)\)")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        page: Where it stands.
        line: The line of its fence.
        language: Of the fence; may be empty.
        code: Its text.
        output: The text block that follows it, which it has to print; None if none does.
        not_run: Why it is only checked, from a comment right above it; None if it is run.
    """

    page: str
    line: int
    language: str
    code: str
    output: str | None
    not_run: str | None


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    text = text_of(page)
    fences = list(_FENCE.finditer(text))
    found = []
    for number, fence in enumerate(fences):
        after = fences[number + 1] if number + 1 < len(fences) else None
        follows = after is not None and after["language"] == "text" and not text[fence.end() : after.start()].strip()
        why = _NOT_RUN.search(text[: fence.start()])
        line = text.count("\n", 0, fence.start()) + 1
        output = after["code"] if after is not None and follows else None
        found.append(Block(page, line, fence["language"], fence["code"], output, why and why["reason"]))
    return found


def links_of(page: str) -> list[str]:
    """Targets of the links of a page; what is code is none."""
    text = _FENCE.sub("", text_of(page))
    return [match["target"] for match in _LINK.finditer(re.sub(r"`[^`\n]*`", "", text))]


def anchors_of(page: str) -> set[str]:
    """What a link to a heading of the page may say behind its `#`, as GitHub and the site make it of the heading."""
    headings = re.findall(r"^#{1,6} (.+)$", _FENCE.sub("", text_of(page)), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings)
    return {
        re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFC", each)).strip().lower().replace(" ", "-") for each in plain
    }
