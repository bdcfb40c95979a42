"""Aspects: several scores in one completion, each behind a marker of its own and on a grid of its own.

Characters and grids: knows nothing of rows, models or training.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.text import CompletionFormat, ScoreNotFoundError, ScoreSpan, span_at

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

    def to_dict(self) -> dict[str, Any]:
        """As it is written in a configuration; JSON-serialisable."""
        return {
            "marker": self.marker,
            "values": list(self.grid.values),
            "texts": list(self.grid.texts),
            "raft_weight": self.raft_weight,
        }


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
        raise ValueError(f"aspects={aspects!r} is not a mapping of names to markers and grids, such as {_EXAMPLE}")
    if len(aspects) < 2:
        raise ValueError(
            f"aspects holds {len(aspects)} of them: for one score a completion leave it out, and set score_marker and "
            "score_values"
        )
    read = tuple(_read_aspect(name, given) for name, given in aspects.items())
    for one in read:
        for other in read:
            if one is not other and one.marker in other.marker:
                raise ValueError(
                    f"the marker {one.marker!r} of aspect {one.name!r} is a part of the marker {other.marker!r} of "
                    f"aspect {other.name!r}: where the second stands, the first stands too. Change one of them"
                )
    return read


def _read_aspect(name: str, given: Mapping[str, Any]) -> Scale:
    if not isinstance(name, str) or not name.strip() or name != name.strip() or "/" in name:
        raise ValueError(f"aspects: the name {name!r} has to be a word without '/', as a part of the metrics' names")
    unknown = set(given) - set(_FIELDS)
    if unknown or not str(given.get("marker") or "").strip():
        wrong = f"the unknown field {min(unknown)!r}" if unknown else "no marker"
        raise ValueError(f"aspect {name!r} has {wrong}; an aspect has the fields {', '.join(_FIELDS)}")
    try:
        grid = ScoreGrid.from_values(given.get("values") or [1, 2, 3, 4, 5], given.get("texts"))
    except ValueError as error:
        raise ValueError(f"aspect {name!r}: {error}") from error
    weight = given.get("raft_weight")
    if weight is not None and not 0 <= weight < float("inf"):
        raise ValueError(f"aspect {name!r}: raft_weight={weight} must be a number that is 0 or greater")
    marker = str(given["marker"])
    return Scale(name, grid, CompletionFormat(marker, start=" "), None if weight is None else float(weight))


def locate_aspects(completion: str, aspects: Sequence[Scale]) -> tuple[ScoreSpan, ...]:
    """Find each aspect's score in a completion: the one behind its own marker.

    A marker without an admissible score behind it is a part of the text, in whichever rationale it stands.

    Args:
        completion: For each aspect a rationale, its marker and its score.
        aspects: In the order in which they have to be written.

    Raises:
        ScoreNotFoundError: An aspect has no score or two, or they come in another order.

    Example:
        >>> aspects = read_aspects({"tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]"}})
        >>> [span.text for span in locate_aspects("Rude. [TONE] 1 True, but see [TONE]. [FACTS] 5", aspects)]
        ['1', '5']
    """
    if not completion.strip():
        raise ScoreNotFoundError("empty", "the completion is empty")
    spans = tuple(_only_span(completion, aspect) for aspect in aspects)
    order = sorted(range(len(spans)), key=lambda number: spans[number].start)
    if order != list(range(len(spans))):
        raise ScoreNotFoundError(
            "order of aspects",
            f"the completion scores {', '.join(aspects[number].name for number in order)}, in this order; the judge is "
            f"asked for {', '.join(aspect.name for aspect in aspects)}. Write them in that order, or change it in "
            "aspects",
        )
    return spans


def _only_span(completion: str, aspect: Scale) -> ScoreSpan:
    found: list[ScoreSpan] = []
    problem = ScoreNotFoundError("no marker", f"the completion does not hold the marker {aspect.marker!r}")
    for marker in re.finditer(re.escape(aspect.marker), completion):
        try:
            found.append(span_at(completion, marker.start(), aspect.marker, aspect.grid.texts))
        except ScoreNotFoundError as error:
            problem = error
    if not found:
        raise ScoreNotFoundError(problem.kind, f"aspect {aspect.name!r}: {problem}")
    if len(found) > 1:
        raise ScoreNotFoundError(
            "two scores",
            f"aspect {aspect.name!r}: the completion holds {aspect.marker!r} with a score {len(found)} times: "
            f"{', '.join(repr(span.text) for span in found)}",
        )
    return found[0]


def scored_within(rationale: str, aspects: Sequence[Scale]) -> Scale | None:
    """The aspect whose marker and score stand in a rationale, where they do not belong; None if none does.

    Example:
        >>> aspects = read_aspects({"tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]"}})
        >>> scored_within("Rude. [FACTS] 5", aspects).name, scored_within("See [FACTS].", aspects)
        ('facts', None)
    """
    for aspect in aspects:
        for marker in re.finditer(re.escape(aspect.marker), rationale):
            try:
                span_at(rationale, marker.start(), aspect.marker, aspect.grid.texts)
            except ScoreNotFoundError:
                continue
            return aspect
    return None
