"""What a chat template writes around a rationale, found by rendering words that stand in for it.

A judge is asked with `asked` text; its rationale, marker and score go on behind it, then comes the end of the turn. So
what is asked is the beginning of what is trained on every template, and nothing that was written is rendered again.
Knows nothing of scores.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from trl_tract.rows.messages import cut, marked, turn, whole_characters
from trl_tract.rows.row import Prompt
from trl_tract.scale.text import ScoreNotFoundError

Thinking = Literal["auto", "off", "rationale"]
THINKING = ("auto", "off", "rationale")

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
_ASK, _THOUGHT, _ANSWER = "tractquestion", "tractthought", "tractanswer"
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1""")


@dataclass(frozen=True)
class TemplateSettings:
    """What a chat template is rendered with, at training and ever after; saved in `tract_config.json`.

    Attributes:
        chat_template_kwargs: Variables of the template; those of a row go before.
        thinking: `off`, `rationale`, or `auto`, which training decides by its rows: see `TRACTConfig.thinking`.
        date: What the template is told is today, YYYY-MM-DD; None: today.
    """

    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    thinking: Thinking = "auto"
    date: str | None = None

    def __post_init__(self) -> None:
        """Check what was given.

        Raises:
            ValueError: An unknown mode or a date that is none.
        """
        if isinstance(self.thinking, bool) and not self.thinking:  # as YAML reads `off`
            object.__setattr__(self, "thinking", "off")
        if isinstance(self.date, datetime.date):  # likewise
            object.__setattr__(self, "date", self.date.isoformat())
        if self.thinking not in THINKING:
            raise ValueError(f"thinking={self.thinking!r} is unknown: choose one of {', '.join(THINKING)}")
        if not isinstance(self.chat_template_kwargs, Mapping):
            raise ValueError(f"chat_template_kwargs={self.chat_template_kwargs!r} is no mapping of names to values")
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except (ValueError, TypeError) as error:
                raise ValueError(f"template_date={self.date!r} is no date: write it like 2026-01-31") from error

    @classmethod
    def of_training(cls, training: Mapping[str, Any]) -> "TemplateSettings":
        """What fields of TRACTConfig say; those that are left out have its defaults.

        Raises:
            ValueError: They contradict each other, or one is none.
        """
        kwargs: Any = training.get("chat_template_kwargs") or {}
        if isinstance(kwargs, str):
            try:
                kwargs = json.loads(kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f'chat_template_kwargs is not JSON: {error}. Write it like {{"enable_thinking": false}}'
                ) from error
        thinking = training.get("thinking", "auto")
        if training.get("drop_rationale"):
            if thinking == "rationale":
                raise ValueError(
                    "thinking='rationale' puts the rationale into the thinking, and drop_rationale=True leaves it out. "
                    "Leave one of them out"
                )
            thinking = "off" if thinking == "auto" else thinking
        return cls(kwargs, thinking, training.get("template_date"))

    @property
    def arguments(self) -> dict[str, Any]:
        """As arguments of a judge, and as saved in `tract_config.json`."""
        return {
            "chat_template_kwargs": dict(self.chat_template_kwargs),
            "thinking": self.thinking,
            "template_date": self.date,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "TemplateSettings":
        """Of a saved configuration; one from before there were these settings has none."""
        return cls(saved.get("chat_template_kwargs") or {}, saved.get("thinking", "off"), saved.get("template_date"))


NO_SETTINGS = TemplateSettings(thinking="off")


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around a rationale.

    Attributes:
        variables: What it is rendered with.
        opening: Between its generation prompt and the rationale. The judge is asked with it.
        start: Whitespace there that the judge writes itself, because it would melt into the first word.
        closing: Where the rationale is the thinking: what ends it. Empty where it is not.
        ending: Behind the score: the end of the turn.
        parts: Whether it needs contents as parts, `[{"type": "text", "text": ...}]`.
        block: How a thinking block begins and ends; None where the template is not known to have one.
        opens: Whether the template's own generation prompt begins one.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
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


@dataclass(frozen=True)
class Asked:
    """A prompt as the text that the model is asked with.

    Attributes:
        text: The text.
        cuts: Where it has to be cut before it is tokenised, so that what is text does not become a control token.
        frame: What stands around a rationale behind it.
        add_special_tokens: Whether the tokenizer puts its own before it: True for plain text.
        literal: Whether control tokens that are spelled in it and behind it are text.
    """

    text: str
    cuts: tuple[int, ...]
    frame: Frame
    add_special_tokens: bool
    literal: bool


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template and what it is rendered with.

    Attributes:
        tokenizer: It may have no chat template; then only plain text can be asked.
        settings: The same at training and ever after.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: TemplateSettings = NO_SETTINGS

    @classmethod
    def of(cls, given: "Template | PreTrainedTokenizerBase") -> "Template":
        """A tokenizer's own template, without settings; a template as it is."""
        return given if isinstance(given, Template) else cls(given)

    def ask(self, row: Mapping[str, Any]) -> Asked:
        """The prompt of a row, with the row's own `tools`, `chat_template_kwargs` and `prompt_is_text`.

        Raises:
            ScoreNotFoundError: The template refuses it, or it holds more than text.
            ValueError: It is chat messages, and there is no template.
        """
        prompt: Prompt = row["prompt"]
        if isinstance(prompt, str):
            eos = self.tokenizer.eos_token or ""
            whole_characters(prompt)
            literal = row.get("prompt_is_text") in (True,)  # NaN is none
            return Asked(prompt, self.cuts(prompt) if literal else (), Frame(ending=eos), True, literal)
        frame = self.frame(row)
        messages = [marked(message, self._control, frame.parts) for message in prompt]
        text, cuts = cut(self._render(messages, frame.variables, generation=True) + frame.opening, self._control)
        whole_characters(text)
        return Asked(text, cuts, frame, False, True)

    def before(self, row: Mapping[str, Any]) -> str:
        """What the template writes by itself before the first message of a row, its header included."""
        frame = self.frame(row)
        return self._question(frame.variables, frame.parts).partition(_ASK)[0]

    def cuts(self, text: str, real: Sequence[tuple[int, int]] = ()) -> tuple[int, ...]:
        """Where `text` is cut so that no control token comes out of it, but for those within the spans `real`."""
        found = []
        for match in self._control.finditer(text):
            if not any(start <= match.start() and match.end() <= end for start, end in real):
                found.append(match.start() + 1)
        return tuple(found)

    def _variables(self, row: Mapping[str, Any]) -> dict[str, Any]:
        own, tools = row.get("chat_template_kwargs"), row.get("tools")
        try:
            read = ((each if each == each else None) or None for each in (own, tools))  # NaN is none
            own, tools = (json.loads(each) if isinstance(each, str) else each for each in read)
        except json.JSONDecodeError as error:
            raise ScoreNotFoundError("template", f"`tools` or `chat_template_kwargs` is not JSON: {error}") from error
        own = {} if own is None else own
        if not isinstance(own, Mapping):
            raise ScoreNotFoundError("template", f"`chat_template_kwargs` is {own!r}, not a mapping")
        # Arrow gives every row the keys of all rows.
        given = {
            **self.settings.chat_template_kwargs,
            **{key: value for key, value in own.items() if value is not None},
        }
        return {**given, **({"tools": tools} if tools else {})}

    @functools.cached_property
    def _frames(self) -> dict[str, Frame | ScoreNotFoundError]:
        return {}

    def frame(self, row: Mapping[str, Any] = {}) -> Frame:  # read only
        """What the template writes around a rationale, with a row's own `tools` and `chat_template_kwargs`.

        Raises:
            ScoreNotFoundError: It refuses a question and an answer, does not show them, or has no thinking block where
                the rationale is to be the thinking.
            ValueError: There is no template.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the rows are chat messages, but this tokenizer has no chat template. Give the prompts as plain text, "
                "or set chat_template_path"
            )
        variables = self._variables(row)
        key = json.dumps(variables, default=str)
        if key not in self._frames:
            try:
                self._frames[key] = self._probe(variables)
            except ScoreNotFoundError as error:
                self._frames[key] = error
        found = self._frames[key]
        if isinstance(found, ScoreNotFoundError):
            raise found
        return found

    @functools.cached_property
    def thinks(self) -> bool:
        """Whether the rationale can be the thinking."""
        if not self.tokenizer.chat_template:
            return False
        try:
            Template(self.tokenizer, replace(self.settings, thinking="rationale")).frame()
        except ScoreNotFoundError:
            return False
        return True

    def _probe(self, given: Mapping[str, Any]) -> Frame:
        parts = not self._shown(given, parts=False)
        if parts and not self._shown(given, parts=True):
            raise ScoreNotFoundError(
                "template",
                "the chat template writes no text of a message, neither as text nor as a part of type text: use "
                "another one (chat_template_path)",
            )
        opened = _opened(self._question(given, parts))
        rationale = self.settings.thinking == "rationale"
        source = self._source(given.get("tools"))
        switches = [{name: rationale} for name in _SWITCHES if name not in given and re.search(rf"\b{name}\b", source)]
        # A template that asks as it should without a switch is left alone, as SFTTrainer does.
        for switch in [*switches, {}] if rationale or opened else [{}, *switches]:
            find = self._thinking if rationale else self._plain
            frame = find({**given, **switch}, parts)
            if frame is not None:
                return replace(frame, parts=parts, opens=opened is not None)
        if rationale:
            raise ScoreNotFoundError(
                "template",
                "thinking='rationale', but this chat template has no thinking block, or these chat_template_kwargs "
                "close it: set thinking='off', or use the template of a thinking model",
            )
        # An empty block where the template leaves one open; else whatever it asks with.
        opening = "" if opened is None else self._closing(given, parts, opened)
        return Frame(given, opening, "", "", self._ending(given, parts), parts, opened, opened is not None)

    def _plain(self, variables: Mapping[str, Any], parts: bool) -> Frame | None:
        """Where the template's own row goes on behind its own question, and no thinking is left open."""
        asked, row = self._question(variables, parts), self._row(variables, parts)
        before = row.partition(_ANSWER)[0]
        if _ANSWER not in row or not before.startswith(asked) or _opened(before) is not None:
            return None
        opening, start = before[len(asked) :], ""
        if not opening.strip():
            opening, start = "", opening
        return Frame(variables, opening, start, "", row.partition(_ANSWER)[2], block=self._block)

    def _thinking(self, variables: Mapping[str, Any], parts: bool) -> Frame | None:
        """Where the thinking stands."""
        asked, row = self._question(variables, parts), self._row(variables, parts, thought=_THOUGHT)
        before, _, behind = row.partition(_THOUGHT)
        if _ANSWER in behind and before.startswith(asked):
            closing, _, ending = behind.partition(_ANSWER)
            opener = before[len(asked) :] or asked.rstrip().rpartition("\n")[2]
            return Frame(variables, before[len(asked) :], "", closing, ending, block=(opener, closing))
        opened = _opened(asked)
        block = opened or self._block
        if block is None or asked.rstrip().endswith(block[1].strip()):
            return None
        opening = "" if opened else block[0]
        return Frame(variables, opening, "", block[1], self._ending(variables, parts), block=block)

    @functools.cached_property
    def _block(self) -> tuple[str, str] | None:
        """How the template writes a thinking block, by its source."""
        source = self._source(None)
        return next((block for block in _BLOCKS if block[1].strip() in source), None)

    def _closing(self, variables: Mapping[str, Any], parts: bool, block: tuple[str, str]) -> str:
        """What ends a block that the template opened."""
        behind = self._row(variables, parts, thought=_THOUGHT).partition(_THOUGHT)[2]
        return behind.partition(_ANSWER)[0] if _ANSWER in behind else block[1]

    def _ending(self, variables: Mapping[str, Any], parts: bool) -> str:
        _, found, behind = self._row(variables, parts).rpartition(_ANSWER)
        return behind if found else self.tokenizer.eos_token or ""

    def _shown(self, variables: Mapping[str, Any], *, parts: bool) -> bool:
        try:
            return _ASK in self._question(variables, parts)
        except ScoreNotFoundError:
            if parts:
                raise
            return False

    def _question(self, variables: Mapping[str, Any], parts: bool) -> str:
        return self._render([turn("user", _ASK, parts)], variables, generation=True)

    def _row(self, variables: Mapping[str, Any], parts: bool, thought: str = "") -> str:
        answer = turn("assistant", _ANSWER, parts) | ({name: thought for name in REASONING} if thought else {})
        return self._render([turn("user", _ASK, parts), answer], variables)

    def _source(self, tools: Any) -> str:
        return str(self.tokenizer.get_chat_template(None, tools))

    @property
    def writes_date(self) -> bool:
        """Whether the template asks what day it is."""
        return bool(self.tokenizer.chat_template) and "strftime_now" in self._source(None)

    def _render(self, messages: Sequence[Any], variables: Mapping[str, Any], *, generation: bool = False) -> str:
        rest = dict(variables)
        tools = rest.pop("tools", None)
        source = self._source(tools)
        if "strftime_now" in source:
            source = _on(source, self.settings.date)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=source,
                    tokenize=False,
                    add_generation_prompt=generation,
                    **rest,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ScoreNotFoundError("template", f"the chat template refuses it: {error}") from error

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        """What the tokenizer would take for a control token: special ones, and others that the template writes."""
        source = self._source(None) if self.tokenizer.chat_template else ""
        names = [
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if len(token.content.strip()) > 1 and (token.special or token.content in source)
        ]
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _opened(text: str) -> tuple[str, str] | None:
    """The thinking block that `text` leaves open at its end."""
    return next((block for block in _BLOCKS if text.rstrip().endswith(block[0].strip())), None)


def _on(source: str, date: str | None) -> str:
    """A template that is told the day `date` whenever it asks; None: today."""
    day = datetime.date.fromisoformat(date) if date else datetime.date.today()
    days = {written: day.strftime(written) for _, written in _NOW.findall(source)}
    # The environment takes one newline off behind a tag.
    return f"{{%- macro strftime_now(form) -%}}{{{{ {json.dumps(days)}[form] }}}}{{%- endmacro %}}\n{source}"
