"""A row -> the text that is tokenised, as SFTTrainer would write it, and the place of its scores in that text.

Characters only: a tokenizer is asked for its chat template and nothing else. Knows nothing of datasets or models.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length, is_conversational, maybe_convert_to_chatml

from trl_tract.rows.row import Prompt, Row
from trl_tract.scale.scale import Scale, locate_scores
from trl_tract.scale.text import CompletionFormat, ScoreNotFoundError, ScoreSpan


@dataclass(frozen=True)
class RenderedScore:
    """A score as it is written, and its first character and one past its last in the row's text."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class RenderedRow:
    """A row as the text that is tokenised, with its scores found.

    Attributes:
        text: Prompt and completion, with the chat template's or the end-of-sequence text.
        prompt_text: The prompt alone, as the model is asked.
        scores: Its scores, one for each scale, in their order.
        formats: Each score's marker and the whitespace around it; `start` is what stands before its rationale.
        add_special_tokens: Whether the tokenizer adds its own: True for plain text, False after a chat template.
    """

    text: str
    prompt_text: str
    scores: tuple[RenderedScore, ...]
    formats: tuple[CompletionFormat, ...]
    add_special_tokens: bool


def as_prompt_completion(row: Mapping[str, Any]) -> Row:
    """A `messages` row with its last assistant turn as the completion; other rows unchanged."""
    if "messages" not in row and "conversations" not in row:
        return dict(row)
    rest: Row = maybe_convert_to_chatml(dict(row))
    messages = list(rest.pop("messages"))
    if not messages or messages[-1]["role"] != "assistant":
        raise ScoreNotFoundError("no completion", "the last message is not the assistant's")
    return {**rest, "prompt": messages[:-1], "completion": messages[-1:]}


def without_rationales(row: Mapping[str, Any], scales: Sequence[Scale]) -> Row:
    """A prompt-completion row whose completion is markers and scores alone."""
    content = completion_text(row.get("completion"))
    begin, pieces = 0, []
    for span in locate_scores(content, scales):
        before = content[begin : span.marker_start]
        pieces.append(before[: len(before) - len(before.lstrip())] + content[span.marker_start : span.end])
        begin = span.end
    return {**row, **with_completion(row["prompt"], "".join(pieces) + content[begin:])}


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, **template: Any) -> tuple[str, bool]:
    """A prompt as the text that the model is asked with, and whether the tokenizer adds special tokens to it."""
    if isinstance(prompt, str):
        return prompt, True
    if not tokenizer.chat_template:
        raise ValueError(
            "the rows are chat messages, but this tokenizer has no chat template. Give the prompts as plain text, or "
            "set chat_template_path"
        )
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **template)), False


def render_row(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], scales: Sequence[Scale]) -> RenderedRow:
    """Write a prompt-completion row as text, as SFTTrainer would, and find the score of each scale.

    Raises:
        ScoreNotFoundError: A score is missing, ambiguous or out of order.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None:
        raise ScoreNotFoundError("no prompt", "the prompt is missing")
    if completion is None:
        raise ScoreNotFoundError("empty", "the completion is missing")
    chat = is_conversational({"prompt": prompt})
    if chat != is_conversational({"completion": completion}):
        raise ScoreNotFoundError("mixed types", "prompt and completion must both be text, or both chat messages")
    template: dict[str, Any] = dict(row.get("chat_template_kwargs") or {})
    if row.get("tools"):
        template.setdefault("tools", json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"])
    before, add_special_tokens = prompt_text(tokenizer, prompt, **template)
    if chat:
        text = str(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False, **template))
    else:
        text = before + completion
        eos = tokenizer.eos_token or ""
        text += "" if text.endswith(eos) else eos
    content = completion_text(completion)
    spans = locate_scores(content, scales)
    # The template may strip or rewrite the rationale, so markers and scores are looked up in what it rendered, last
    # one first, and only behind the prompt, which may hold a forged marker of its own.
    rendered_from, rendered_to = common_prefix_length(before, text), len(text)
    scores: list[RenderedScore] = []
    for span in reversed(spans):
        written = content[span.marker_start : span.end]
        at = text.rfind(written, rendered_from, rendered_to)
        if at < 0:
            raise ScoreNotFoundError(
                "rewritten", f"the chat template rewrites {written!r}, so the score cannot be found"
            )
        scores.insert(0, RenderedScore(span.text, at + span.start - span.marker_start, at + len(written)))
        rendered_to = at
    return RenderedRow(
        text=text,
        prompt_text=before,
        scores=tuple(scores),
        formats=_formats(content, spans),
        add_special_tokens=add_special_tokens,
    )


def written_formats(row: Mapping[str, Any], scales: Sequence[Scale]) -> tuple[CompletionFormat, ...]:
    """How a prompt-completion row writes the score of each scale.

    Raises:
        ScoreNotFoundError: A score is missing, ambiguous or out of order.
    """
    content = completion_text(row.get("completion"))
    return _formats(content, locate_scores(content, scales))


def _formats(content: str, spans: Sequence[ScoreSpan]) -> tuple[CompletionFormat, ...]:
    begins = [0, *(span.end for span in spans)]
    return tuple(_format(content, begin, span) for begin, span in zip(begins, spans, strict=False))


def _format(content: str, begin: int, span: ScoreSpan) -> CompletionFormat:
    """How the score at `span` is written behind its rationale, which begins at `begin`."""
    before, rest = content[begin : span.marker_start], content[begin:]
    return CompletionFormat(
        content[span.marker_start : span.start - len(span.separator)],
        # Without a rationale there is nothing that the marker follows.
        lead=span.lead if before.strip() else " ",
        separator=span.separator,
        start=rest[: len(rest) - len(rest.lstrip())],
    )


def with_completion(prompt: Prompt, completion: str) -> Row:
    """A prompt-completion row of the prompt's own type, text or chat."""
    return {
        "prompt": prompt,
        "completion": completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}],
    }


def completion_text(completion: str | Sequence[Mapping[str, Any]] | None) -> str:
    """What the judge writes: a text completion itself, or the content of the assistant's last turn."""
    if isinstance(completion, str):
        return completion
    if not completion:
        raise ScoreNotFoundError("empty", "the completion is empty")
    content = completion[-1].get("content")
    if not isinstance(content, str):
        raise ScoreNotFoundError("not text", f"the completion's content is {type(content).__name__}, not text")
    return content
