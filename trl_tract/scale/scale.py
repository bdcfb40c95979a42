"""Scales: a completion has a score for each of one or more, each behind its own marker and on its own grid.

Characters and grids: knows nothing of rows, models or training.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.text import CompletionFormat, ScoreNotFoundError, ScoreSpan, holds_score, score_begins, span_at

DEFAULT_VALUES = (1.0, 2.0, 3.0, 4.0, 5.0)


DEFAULT_MARKER = "[RESULT]"


_FIELDS = ("marker", "values", "texts", "raft_weight")


_EXAMPLE = '{"clarity": {"marker": "[CLARITY]", "values": [1, 2, 3, 4, 5]}, "facts": {"marker": "[FACTS]", ...}}'


@dataclass(frozen=True)
class Scale:
    """One of the scores of a completion.

    Attributes:
        name: What the rows' `scores`, the metrics and the judgements call it; empty where a completion has one score.
        grid: Its score grid.
        format: Its marker and the whitespace around it; `start` is what stands between the score before and its
            rationale.
        raft_weight: Weight of its squared error; None: that of the configuration.
    """

    name: str
    grid: ScoreGrid
    format: CompletionFormat
    raft_weight: float | None = None

    @property
    def marker(self) -> str:
        """Text that stands before the score."""
        return self.format.marker

    @property
    def about(self) -> str:
        """What a message about it begins with; empty where a completion has one score."""
        return f"aspect {self.name!r}: " if self.name else ""

    def to_dict(self) -> dict[str, Any]:
        """As it is written in a configuration; JSON-serialisable."""
        return {
            "marker": self.marker,
            "values": list(self.grid.values),
            "texts": list(self.grid.texts),
            "raft_weight": self.raft_weight,
        }


_QUOTE = f'In YAML, put it in quotes: "{DEFAULT_MARKER}", "yes"'


def read_scales(training: Mapping[str, Any]) -> tuple[Scale, ...]:
    """The scales of a configuration: one for each aspect, or the only one, whose name is empty.

    Args:
        training: Fields of TRACTConfig. `score_values`, `score_texts` and `score_marker`, or `aspects`, are read; what
            is left out is as by default.

    Raises:
        ValueError: A grid, a marker or an aspect that is none.

    Example:
        >>> read_scales({"score_values": [1, 2, 3]})[0].grid.texts
        ('1', '2', '3')
    """
    marker = training.get("score_marker", DEFAULT_MARKER)
    if training.get("aspects"):
        check_alone(training.get("score_values", DEFAULT_VALUES), marker, training.get("score_texts"))
        return read_aspects(training["aspects"])
    if not isinstance(marker, str) or not marker.strip():
        raise ValueError(f"score_marker={marker!r} must be text, and not empty. {_QUOTE}")
    grid = ScoreGrid.from_values(training.get("score_values", DEFAULT_VALUES), training.get("score_texts"))
    return (Scale("", grid, CompletionFormat(marker)),)


def given_scales(
    values: Sequence[float] | Mapping[str, float] | str,
    marker: str,
    completion_format: CompletionFormat | None,
    aspects: Mapping[str, Mapping[str, Any]] | str | None,
) -> tuple[Scale, ...]:
    """The scales of a judge's arguments: the aspects, or the only one.

    Raises:
        ValueError: An argument would not count, since another one stands for it.
    """
    if aspects is not None:
        check_alone(values, marker, completion_format)
        return read_aspects(aspects)
    if completion_format is not None and marker not in (DEFAULT_MARKER, completion_format.marker):
        raise ValueError(
            f"score_marker={marker!r}, but completion_format has the marker {completion_format.marker!r}. Leave "
            "score_marker out"
        )
    return (Scale("", ScoreGrid.from_values(values), completion_format or CompletionFormat(marker)),)


def check_alone(values: Any, marker: str, others: Any = None) -> None:
    """Refuse, beside aspects, what is said of a single scale."""
    if others is not None or marker != DEFAULT_MARKER or tuple(values) != DEFAULT_VALUES:
        raise ValueError(
            "aspects replaces score_values, score_texts, score_marker and completion_format, which would have no "
            "effect. Leave them out, and give each aspect its own `marker`, `values` and `texts`"
        )


def scale_arguments(scales: Sequence[Scale]) -> dict[str, Any]:
    """Scales as arguments of whoever takes them: the opposite of `given_scales`, but for how rows write them."""
    if scales[0].name:
        return {"aspects": {scale.name: scale.to_dict() for scale in scales}}
    (scale,) = scales
    values = dict(zip(scale.grid.texts, scale.grid.values, strict=True))
    return {"score_values": values, "score_marker": scale.marker}


def read_aspects(aspects: Mapping[str, Mapping[str, Any]] | str) -> tuple[Scale, ...]:
    """Check the aspects of a configuration.

    Args:
        aspects: Name -> `marker` and, if they are not 1 to 5, `values` and `texts`, as in `ScoreGrid.from_values`;
            `raft_weight`, if it is not that of the configuration. In the order in which completions have them. Or the
            same as JSON.

    Raises:
        ValueError: Fewer than two aspects, a name, field, grid or weight that is none, or markers that cannot be told
            apart.

    Example:
        >>> [aspect.grid.texts for aspect in read_aspects({
        ...     "tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]", "values": {"wrong": 0, "right": 1}}
        ... })]
        [('1', '2', '3', '4', '5'), ('wrong', 'right')]
    """
    if isinstance(aspects, str):
        try:
            aspects = json.loads(aspects)
        except json.JSONDecodeError as error:
            raise ValueError(f"aspects is not JSON: {error}. Write it like {_EXAMPLE}") from error
    if not isinstance(aspects, Mapping) or not all(isinstance(each, Mapping) for each in aspects.values()):
        raise ValueError(
            f"aspects={aspects!r} is not a mapping of names to markers and grids. Write it like {_EXAMPLE}"
        )
    if len(aspects) < 2:
        raise ValueError(
            f"aspects has {len(aspects)} entries, but needs two or more. For one score per completion, leave aspects "
            "out and set score_marker and score_values"
        )
    read = tuple(_read_aspect(name, given) for name, given in aspects.items())
    for one in read:
        for other in read:
            if one is not other and one.marker in other.marker:
                raise ValueError(
                    f"the marker {one.marker!r} of aspect {one.name!r} is part of the marker {other.marker!r} of "
                    f"aspect {other.name!r}, so the two cannot be told apart in the text. Change one of them"
                )
    return read


def _read_aspect(name: str, given: Mapping[str, Any]) -> Scale:
    if not isinstance(name, str) or not name.strip() or name != name.strip() or "/" in name:
        raise ValueError(
            f"aspects: the name {name!r} must be a word without '/', because it becomes part of metric names. {_QUOTE}"
        )
    unknown, marker = set(given) - set(_FIELDS), given.get("marker", "")
    if unknown or not marker:
        wrong = f"the unknown field {min(unknown)!r}" if unknown else "no marker"
        raise ValueError(f"aspect {name!r} has {wrong}; an aspect has the fields {', '.join(_FIELDS)}")
    if not isinstance(marker, str) or not marker.strip():
        raise ValueError(f"aspect {name!r}: the marker {marker!r} is not text. {_QUOTE}")
    try:
        grid = ScoreGrid.from_values(given.get("values") or DEFAULT_VALUES, given.get("texts"))
    except ValueError as error:
        raise ValueError(f"aspect {name!r}: {error}") from error
    weight = given.get("raft_weight")
    if weight is not None and not 0 <= weight < float("inf"):
        raise ValueError(f"aspect {name!r}: raft_weight={weight} must be a number that is 0 or greater")
    return Scale(name, grid, CompletionFormat(marker, start=" "), None if weight is None else float(weight))


def locate_scores(completion: str, scales: Sequence[Scale]) -> tuple[ScoreSpan, ...]:
    """Find the score of each scale in a completion: the one behind its own marker.

    Only the completion is searched: the prompt quotes the marker in its instructions, and the text to be judged may
    hold a forged `[RESULT] 5`. A marker without an admissible score behind it is a part of the text.

    Args:
        completion: For each scale a rationale, its marker and its score.
        scales: In the order in which they have to be written.

    Raises:
        ScoreNotFoundError: A scale has no score or several, they come in another order, or the last one is followed by
            another score.

    Example:
        >>> [span.text for span in locate_scores("3 of 5 points are met. [RESULT] 4", read_scales({}))]
        ['4']
        >>> aspects = read_aspects({"tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]"}})
        >>> [span.text for span in locate_scores("Rude. [TONE] 1 True, but see [TONE]. [FACTS] 5", aspects)]
        ['1', '5']
    """
    if not completion.strip():
        raise ScoreNotFoundError("empty", "the completion is empty")
    spans = tuple(_only_span(completion, scale) for scale in scales)
    order = sorted(range(len(spans)), key=lambda number: spans[number].start)
    if order != list(range(len(spans))):
        raise ScoreNotFoundError(
            "order of aspects",
            f"the completion scores {', '.join(scales[number].name for number in order)}, in this order, but aspects "
            f"has the order {', '.join(scale.name for scale in scales)}. Write the scores in that order, or change the "
            "order in aspects",
        )
    last, scale = spans[-1], scales[-1]
    if holds_score(completion[last.end :], scale.grid.texts):
        raise ScoreNotFoundError(
            "two scores",
            f"{scale.about}score {last.text!r} is followed by another score: {completion[last.start :][:60]!r}",
        )
    return spans


def _only_span(completion: str, scale: Scale) -> ScoreSpan:
    found: list[ScoreSpan] = []
    problem = ScoreNotFoundError("no marker", f"the completion does not hold the marker {scale.marker!r}")
    no_mention = False
    for marker in re.finditer(re.escape(scale.marker), completion):
        after = completion[marker.end() :]
        try:
            found.append(span_at(completion, marker.start(), scale.marker, scale.grid.texts))
        except ScoreNotFoundError as error:
            problem = error
            if found:  # "[RESULT] 9" on a scale to 5 is no mention of the marker but a second thought
                no_mention = bool(re.match(r"\s*[-+]?\d", after))
            elif score_begins(after, scale.grid.texts) and scale.marker in after:  # a judge would be read there
                told = f"{error}. A judge that wrote this would be read there: mention the marker in another way"
                no_mention, problem = True, ScoreNotFoundError("two scores", told)
        if no_mention or len(found) > 1:
            break
    if no_mention or not found:
        raise ScoreNotFoundError(problem.kind, f"{scale.about}{problem}")
    if len(found) > 1:
        raise ScoreNotFoundError(
            "two scores",
            f"{scale.about}the completion holds {scale.marker!r} with a score twice: {found[0].text!r} and "
            f"{found[1].text!r}. If both are meant, give each its own marker and name them in `aspects`",
        )
    return found[0]


def scored_within(rationale: str, scales: Sequence[Scale]) -> Scale | None:
    """The scale whose marker and score stand in a rationale, where they do not belong; None if none does.

    Example:
        >>> aspects = read_aspects({"tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]"}})
        >>> scored_within("Rude. [FACTS] 5", aspects).name, scored_within("See [FACTS].", aspects)
        ('facts', None)
    """
    for scale in scales:
        for marker in re.finditer(re.escape(scale.marker), rationale):
            try:
                span_at(rationale, marker.start(), scale.marker, scale.grid.texts)
            except ScoreNotFoundError:
                if not score_begins(rationale[marker.end() :], scale.grid.texts):
                    continue
            return scale
    return None
