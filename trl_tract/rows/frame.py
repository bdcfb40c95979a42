"""What a chat template writes around a rationale, found by rendering words that stand in for it.

Knows how families write their thinking; nothing of tokenizers, scores or rows.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trl_tract.rows.messages import turn
from trl_tract.scale.text import ScoreNotFoundError

# How families write a thinking block, where a template renders none of a row's thinking.
_BLOCKS = (
    ("<think>\n", "\n</think>\n\n"),
    ("<|channel>thought\n", "\n<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>\n", "\n</seed:think>\n"),
)
_SWITCHES = ("enable_thinking", "thinking")
REASONING = ("reasoning_content", "reasoning", "thinking")
# Stand in for a question, a thought and an answer: words that no template writes.
QUESTION, _THOUGHT, _ANSWER = "tractquestion", "tractthought", "tractanswer"

Variables = Mapping[str, Any]


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around a rationale.

    Attributes:
        variables: What it is rendered with.
        header: What it writes behind a question: the end of that turn, and the beginning of the answer's.
        opening: Between its generation prompt and the rationale. The judge is asked with it.
        start: Whitespace there that the judge writes itself, because it would melt into the first word.
        closing: Where the rationale is the thinking: what ends it. Empty where it is not.
        ending: Behind the score: the end of the turn.
        parts: Whether it needs contents as parts, `[{"type": "text", "text": ...}]`.
        block: How a thinking block begins and ends; None where the template is not known to have one.
        opens: Whether the template's own generation prompt begins one.
    """

    variables: Variables = field(default_factory=dict)
    header: str = ""
    opening: str = ""
    start: str = ""
    closing: str = ""
    ending: str = ""
    parts: bool = False
    block: tuple[str, str] | None = None
    opens: bool = False

    @property
    def tags(self) -> tuple[tuple[str, str], ...]:
        """How thinking may begin and end in a completion."""
        own = () if self.block is None else ((self.block[0].strip(), self.block[1].strip()),)
        return (*own, ("<think>", "</think>"))

    @property
    def shape(self) -> tuple[Any, ...]:
        """What two frames have alike in which the same may be written."""
        return self.closing, self.tags

    @property
    def closer(self) -> str:
        """`closing` without the whitespace around it."""
        return self.closing.strip()

    def begins(self, text: str) -> tuple[bool, bool]:
        """Whether rendered text ends in an open thinking block, and in one that is closed."""
        closed = self.block is not None and text.rstrip().endswith(self.block[1].strip())
        return opened(text) is not None, closed


@dataclass(frozen=True)
class Probe:
    """A chat template that is asked a question.

    Attributes:
        render: Messages, variables and whether to add the generation prompt -> text.
        source: Of the template.
        eos: Ends a turn where the template does not.
        head: Roles and texts of the messages before the question.
        parts: Whether contents are given as parts.
    """

    render: Callable[[Sequence[Any], Variables, bool], str]
    source: str
    eos: str
    head: tuple[tuple[str, str], ...] = ()
    parts: bool = False

    def frame(self, given: Variables, rationale: bool) -> Frame:
        """What the template writes around a rationale.

        Args:
            given: What it is rendered with; a switch for thinking may be added.
            rationale: Whether the rationale is the thinking.

        Raises:
            ScoreNotFoundError: It refuses a question or an answer, does not show them, writes something else each time,
                or has no thinking block where the rationale is to be the thinking.
        """
        probe = self if self._shows(given) else replace(self, parts=True)
        if probe.parts and not probe._shows(given):
            raise ScoreNotFoundError(
                "template",
                "the chat template drops the text of messages, both as plain text and as a part of type text. Use "
                "another template (chat_template_path)",
            )
        if probe.question(given) != probe.question(given):
            raise ScoreNotFoundError(
                "template",
                "the chat template renders the same messages differently each time, so a judge could not be asked as "
                "it was trained. Use another template (chat_template_path)",
            )
        frame = probe._inside(given) if rationale else probe._off(given)
        return replace(frame, header=probe.header(frame.variables), parts=probe.parts)

    def question(self, variables: Variables) -> str:
        """What it asks with."""
        return self.render(self._asked, variables, True)

    @property
    def _asked(self) -> list[dict[str, Any]]:
        return [turn(role, text, self.parts) for role, text in (*self.head, ("user", QUESTION))]

    def header(self, variables: Variables) -> str:
        """What it writes behind a question."""
        return self.question(variables).partition(QUESTION)[2]

    def _inside(self, given: Variables) -> Frame:
        """Where the rationale is the thinking."""
        for switch in self._switches(given, True):
            if (frame := self._thinking({**given, **switch})) is not None:
                return replace(frame, opens=opened(self.question(given)) is not None)
        raise ScoreNotFoundError(
            "template",
            "thinking='rationale', but this chat template has no thinking block, or chat_template_kwargs or the system "
            "message turns it off. Set thinking='off', or use the template of a thinking model",
        )

    def _off(self, given: Variables) -> Frame:
        """Where the judge does not think."""
        begun = opened(self.question(given))
        try:
            block = self._inside(given).block
        except ScoreNotFoundError:
            block = begun or self._block
        switches = self._switches(given, False)
        # A template that asks as it should without a switch is left alone, as SFTTrainer does.
        for switch in switches if begun else [{}, *switches[:-1]]:
            if (frame := self._plain({**given, **switch})) is not None:
                return replace(frame, block=block, opens=begun is not None)
        # An empty block where the template leaves one open; else whatever it asks with.
        opening = "" if begun is None else self._closing(given, begun)
        return Frame(given, opening=opening, ending=self._ending(given), block=block, opens=begun is not None)

    def _switches(self, given: Variables, on: bool) -> list[dict[str, bool]]:
        """The template's own switches of thinking, and none."""
        names = [name for name in _SWITCHES if name not in given and re.search(rf"\b{name}\b", self.source)]
        return [*({name: on} for name in names), {}]

    def _plain(self, variables: Variables) -> Frame | None:
        """Where the template's own row goes on behind its own question, and no thinking is left open."""
        asked, row = self.question(variables), self._row(variables)
        before = row.partition(_ANSWER)[0]
        if _ANSWER not in row or not before.startswith(asked) or opened(before) is not None:
            return None
        opening, start = before[len(asked) :], ""
        if not opening.strip():
            opening, start = "", opening
        return Frame(variables, opening=opening, start=start, ending=row.partition(_ANSWER)[2])

    def _thinking(self, variables: Variables) -> Frame | None:
        """Where the thinking stands."""
        asked, row = self.question(variables), self._row(variables, _THOUGHT)
        before, _, behind = row.partition(_THOUGHT)
        if _ANSWER in behind and before.startswith(asked):
            closing, _, ending = behind.partition(_ANSWER)
            opening = before[len(asked) :]
            block = (opening or asked.rstrip().rpartition("\n")[2], closing)
            return Frame(variables, opening=opening, closing=closing, ending=ending, block=block)
        begun = opened(asked)
        known = begun or self._block
        if known is None or asked.rstrip().endswith(known[1].strip()):
            return None
        opening = "" if begun else known[0]
        return Frame(variables, opening=opening, closing=known[1], ending=self._ending(variables), block=known)

    @property
    def _block(self) -> tuple[str, str] | None:
        """How the template writes a thinking block, by its source."""
        return next((block for block in _BLOCKS if block[1].strip() in self.source), None)

    def _closing(self, variables: Variables, block: tuple[str, str]) -> str:
        """What ends a block that the template opened."""
        behind = self._row(variables, _THOUGHT).partition(_THOUGHT)[2]
        return behind.partition(_ANSWER)[0] if _ANSWER in behind else block[1]

    def _ending(self, variables: Variables) -> str:
        _, found, behind = self._row(variables).rpartition(_ANSWER)
        return behind if found else self.eos

    def _shows(self, variables: Variables) -> bool:
        try:
            return QUESTION in self.question(variables)
        except ScoreNotFoundError:
            if self.parts:
                raise
            return False

    def _row(self, variables: Variables, thought: str = "") -> str:
        def written(parts: bool) -> str:
            answer = turn("assistant", _ANSWER, parts) | ({name: thought for name in REASONING} if thought else {})
            return self.render([*self._asked, answer], variables, False)

        if not self.parts:
            return written(False)
        try:  # an answer may be taken as text where questions are not
            text = written(False)
        except ScoreNotFoundError:
            return written(True)
        return text if _ANSWER in text else written(True)


def opened(text: str) -> tuple[str, str] | None:
    """The thinking block that `text` leaves open at its end."""
    return next((block for block in _BLOCKS if text.rstrip().endswith(block[0].strip())), None)
