"""How a row's prompt is asked by a tokenizer's chat template.

A judge is asked with `asked` text; its rationale, marker and score go on behind it, then comes the end of the turn. So
what is asked is the beginning of what is trained on every template, and nothing that was written is rendered again.
Knows nothing of scores.
"""

import contextlib
import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from trl_tract.rows.frame import QUESTION, Frame, Probe
from trl_tract.rows.messages import cut, json_cell, marked, shows, stand_in, text_of, whole_characters
from trl_tract.rows.row import Prompt
from trl_tract.rows.thinking import own_thinking
from trl_tract.scale.text import ScoreNotFoundError

Thinking = Literal["auto", "off", "rationale"]
THINKING = ("auto", "off", "rationale")
_HEADS = ("system", "developer")


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
            raise ValueError(f"chat_template_kwargs={self.chat_template_kwargs!r} is not a mapping of names to values")
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"template_date={self.date!r} is not a date. Write it as YYYY-MM-DD, such as 2026-01-31"
                ) from error

    @classmethod
    def of_training(cls, training: Mapping[str, Any]) -> "TemplateSettings":
        """What fields of TRACTConfig say; those that are left out have its defaults."""
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
                    "thinking='rationale' puts the rationale into the thinking block, but drop_rationale=True removes "
                    "the rationale. Use only one of the two"
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
        if prompt == []:
            raise ScoreNotFoundError("no prompt", "the prompt is missing")
        if isinstance(prompt, str):
            eos = self.tokenizer.eos_token or ""
            whole_characters(prompt)
            literal = row.get("prompt_is_text") in (True,)  # NaN is none
            return Asked(prompt, self.cuts(prompt) if literal else (), Frame(ending=eos), True, literal)
        frame = self.frame(row)
        messages = [marked(message, self._control, frame.parts) for message in prompt]
        asked = self._render(messages, frame.variables, True)
        if frame.begins(asked) != frame.begins(frame.header):
            raise ScoreNotFoundError(
                "template",
                "the chat template opens or closes the thinking block after these messages but not after others. "
                "Remove what switches thinking from the messages, and set thinking or chat_template_kwargs instead",
            )
        text, cuts = cut(asked + frame.opening, self._control)
        whole_characters(text)
        self._check_all_shown(messages, frame, text)
        return Asked(text, cuts, frame, False, True)

    def _check_all_shown(self, messages: Sequence[Mapping[str, Any]], frame: Frame, text: str) -> None:
        """Look whether the template wrote what it was given: some pass over roles that they do not know.

        Raises:
            ScoreNotFoundError: A message is left out, or the tools are.
        """
        lost = self._lost(messages, frame)
        for number, message in enumerate(messages):
            said, _ = cut(text_of(message.get("content")), self._control)
            if message["role"] == "assistant":  # earlier thinking is left out on purpose
                said = said[own_thinking(said, frame)[1] or 0 :]
                said = said.rpartition(frame.block[1].strip())[2] if frame.block and frame.opens else said
            if (number, "call") in lost:
                raise ScoreNotFoundError(
                    "template",
                    f"the chat template leaves out the tool calls of message {number} ({message['role']}). Write them "
                    "as text, or use another template (chat_template_path)",
                )
            if (number, "text") in lost or not shows(text, said):
                raise ScoreNotFoundError(
                    "template",
                    f"the chat template leaves out what message {number} ({message['role']}) says: {said[:60]!r}. Give "
                    "it another role, put it into another message, or use another template (chat_template_path)",
                )
        for given in [name for name in ("tools", "documents") if frame.variables.get(name)]:
            without = {name: value for name, value in frame.variables.items() if name != given}
            if cut(self._render(messages, without, True) + frame.opening, self._control)[0] == text:
                raise ScoreNotFoundError(
                    "template",
                    f"the chat template leaves out the row's `{given}`. Put them into a message, leave them out, or "
                    "use another template (chat_template_path)",
                )

    def _lost(self, messages: Sequence[Mapping[str, Any]], frame: Frame) -> frozenset[tuple[int, str]]:
        """Numbers of the messages whose text or tool calls the template leaves out of a conversation of this form.

        Asked with words of our own: few letters of a message that is left out can stand elsewhere in the prompt.
        """
        form = [[message["role"], sorted(message), len(message.get("tool_calls") or ())] for message in messages]
        key = json.dumps([form, frame.variables], default=str)
        if key not in self._losses:
            replaced = [stand_in(message, number, frame.parts) for number, message in enumerate(messages)]
            try:
                text = self._render([message for message, _ in replaced], frame.variables, True)
            except ScoreNotFoundError:  # it looks at what the messages say
                self._losses[key] = frozenset()
            else:
                self._losses[key] = frozenset(
                    (number, kind)
                    for number, (_, words) in enumerate(replaced)
                    for word, kind in words.items()
                    if word not in text
                )
        return self._losses[key]

    def before(self, row: Mapping[str, Any]) -> str:
        """What the template writes by itself before the first message of a row, its header included."""
        frame = self.frame(row)
        return self._probe(frame.variables, (), frame.parts).question(frame.variables).partition(QUESTION)[0]

    def cuts(self, text: str, real: Sequence[tuple[int, int]] = ()) -> tuple[int, ...]:
        """Where `text` is cut so that no control token comes out of it, but for those within the spans `real`."""
        found = []
        for match in self._control.finditer(text):
            if not any(start <= match.start() and match.end() <= end for start, end in real):
                found.append(match.start() + 1)
        return tuple(found)

    def _variables(self, row: Mapping[str, Any]) -> dict[str, Any]:
        own, tools = json_cell(row, "chat_template_kwargs") or {}, json_cell(row, "tools")
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

    @functools.cached_property
    def _losses(self) -> dict[str, frozenset[tuple[int, str]]]:
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
                "the rows are chat messages, but this tokenizer has no chat template. Give prompts and completions as "
                "plain text, or set chat_template_path"
            )
        variables = self._variables(row)
        frame = self._found(variables)
        prompt = row.get("prompt")
        first = prompt[0] if isinstance(prompt, list) and prompt else None
        head = [first] if isinstance(first, Mapping) and first.get("role") in _HEADS else []
        if head and (isinstance(frame, ScoreNotFoundError) or frame.block is not None or frame.opening):
            # Some templates need a system message, and in some it switches thinking.
            own, parts = ({}, False) if isinstance(frame, ScoreNotFoundError) else (frame.variables, frame.parts)
            header = self._probe(variables, head, parts).header({**variables, **own})
            if isinstance(frame, ScoreNotFoundError) or header != frame.header:
                frame = self._found(variables, head, header)
        if isinstance(frame, ScoreNotFoundError):
            raise frame
        return frame

    def _found(
        self, variables: Mapping[str, Any], head: Sequence[Any] = (), header: str | None = None
    ) -> Frame | ScoreNotFoundError:
        """What was found for these variables before, behind a system message for those with this header."""
        key = json.dumps([variables, header], default=str)
        if key not in self._frames:
            try:
                probe = self._probe(variables, head, False)
                self._frames[key] = probe.frame(variables, self.settings.thinking == "rationale")
            except ScoreNotFoundError as error:
                self._frames[key] = error
        return self._frames[key]

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

    def _probe(self, variables: Mapping[str, Any], head: Sequence[Any], parts: bool) -> Probe:
        source = self._source(variables.get("tools"))
        before = tuple((message["role"], text_of(message.get("content"))) for message in head)
        return Probe(self._render, source, self.tokenizer.eos_token or "", before, parts)

    def _source(self, tools: Any) -> str:
        return str(self.tokenizer.get_chat_template(None, tools))

    @property
    def writes_date(self) -> bool:
        """Whether the template asks what day it is."""
        return bool(self.tokenizer.chat_template) and "strftime_now" in self._source(None)

    def _render(self, messages: Sequence[Any], variables: Mapping[str, Any], generation: bool) -> str:
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
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RuntimeError,
        ) as error:
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


def _on(source: str, date: str | None) -> str:
    """A template that is told the day `date` whenever it asks; None: today.

    A function among its variables would reach it as text.
    """
    day = datetime.date.fromisoformat(date) if date else datetime.date.today()
    told = []
    for form in (f"%{pad}{letter}" for letter in "aAbBcdDeFgGHIjklmMnpRStTuUVwWxXyYzZ" for pad in ("-", "")):
        with contextlib.suppress(ValueError):  # not every system knows all of them
            told.append(f"replace({json.dumps(form)}, {json.dumps(day.strftime(form))})")
    # The environment takes one newline off behind a tag.
    return f"{{%- macro strftime_now(format) -%}}{{{{ format | {' | '.join(told)} }}}}{{%- endmacro %}}\n{source}"
