"""Thinking in what a row brings and in what a model writes: where it begins and ends, and what stands behind it.

Knows what a chat template writes around a rationale; nothing of scores or tokens.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

from trl_tract.rows.frame import REASONING, Frame
from trl_tract.rows.messages import text_of
from trl_tract.scale.text import ScoreNotFoundError


class StopRules(TypedDict):
    """What a backend's `Stop` is told of thinking."""

    counts: Callable[[str], bool]
    shows: list[str]


def stop_rules(frames: Iterable[Frame]) -> StopRules:
    """Where a marker counts and which special tokens are shown, whichever of `frames` a text stands in."""
    known = list({(frame.closing, frame.tags): frame for frame in frames}.values())
    return {
        "counts": lambda before: any(may_end(frame, before) for frame in known),
        "shows": [tag for frame in known for tags in frame.tags for tag in tags],
    }


def may_end(frame: Frame, text: str) -> bool:
    """Whether a marker behind `text`, which the model wrote, counts: not inside a thinking block."""
    if frame.closing and frame.closer not in text:
        return False
    # Also where it begins to think again behind the thinking that it was asked for.
    tags, end = own_thinking(text.partition(frame.closer)[2] if frame.closing else text, frame)
    return tags is None or end is not None


def answered(frame: Frame, text: str) -> str:
    """What the model wrote behind its thinking, where scores count."""
    if frame.closing:
        return text.partition(frame.closer)[2]
    return text[own_thinking(text, frame)[1] or 0 :]


def read_rationale(frame: Frame, text: str) -> str:
    """What the model wrote before its first marker, as its rationale: without the end of its thinking."""
    thought, answer = thought_first(frame, text)
    return text.rstrip() if thought is None or answer else thought


def completion_text(completion: str | Sequence[Mapping[str, Any]] | None) -> str:
    """What the judge writes: a text completion itself, or the content of its one message."""
    if isinstance(completion, str):
        return completion
    if not completion:
        raise ScoreNotFoundError("empty", "the completion is empty")
    if len(completion) > 1 or completion[0].get("tool_calls"):
        raise ScoreNotFoundError(
            "several turns",
            "the completion must be one text message, but it has several messages or a tool call. Move what comes "
            "before the judge's answer into the prompt",
        )
    return text_of(completion[0].get("content"))


def scored_text(completion: str | Sequence[Mapping[str, Any]] | None) -> str:
    """The part of a completion's text where scores count: behind the thinking that it may begin with."""
    content = completion_text(completion)
    return content[own_thinking(content, Frame())[1] or 0 :]


def thought_and_answer(completion: Any, frame: Frame) -> tuple[str | None, str]:
    """The thinking that a completion brings, None where it brings none, and the rest of its text."""
    content = completion_text(completion)
    if isinstance(completion, str):
        return None, content
    beside = {name: text for name in REASONING if (text := _reasoning(completion[-1], name)).strip()}
    tags, end = own_thinking(content, frame)
    if len(set(beside.values())) + (tags is not None) > 1 and beside:
        places = " and ".join([*beside, *(["content"] if tags is not None else [])])
        raise ScoreNotFoundError("thinking", f"there is thinking in {places}. Give it only once")
    if beside:
        return _without_frame(next(iter(beside.values()))), content.lstrip()
    if tags is not None and end is not None and frame.block is not None:
        thought = content[content.index(tags[0]) + len(tags[0]) : end - len(tags[1])]
        return _without_frame(thought), content[end:].lstrip()
    if frame.opens and frame.block is not None:
        # As models write that were asked with the block's beginning: the end alone, on a line of its own.
        closer = frame.block[1].strip()
        parts = re.split(rf"\n[ \t]*{re.escape(closer)}[ \t]*(?=\n)", content)
        if len(parts) == 2 and content.count(closer) == 1:
            return _without_frame(parts[0]), parts[1].lstrip()
    return None, content


def _reasoning(message: Mapping[str, Any], name: str) -> str:
    """Thinking that stands beside the content of a message; empty where there is none."""
    value = message.get(name)
    return "" if value is None or value != value else text_of(value)


def _without_frame(thought: str) -> str:
    """Thinking without the line break that sets it off from the tag before it, and the space before the other."""
    return thought.removeprefix("\n").rstrip()


def own_thinking(text: str, frame: Frame) -> tuple[tuple[str, str] | None, int | None]:
    """The tags of the thinking that `text` begins with, and one past its end tag; None where it does not end."""
    head = len(text) - len(text.lstrip())
    for opener, closer in frame.tags:
        if text.startswith(opener, head):
            found = text.find(closer, head + len(opener))
            return (opener, closer), None if found < 0 else found + len(closer)
    return None, None


def thought_first(frame: Frame, rationale: str) -> tuple[str | None, str]:
    """A first rationale as thinking, None where that is no part of it, and what stands between it and the marker."""
    rationale = rationale.rstrip()
    if not frame.closing:
        return None, rationale
    thought, _, answer = rationale.partition(frame.closer)
    return thought.rstrip(), answer.strip()
