"""Scales: how rows write their scores. Characters and grids: knows nothing of rows, models or training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale, read_aspects

DEFAULT_VALUES = (1.0, 2.0, 3.0, 4.0, 5.0)


@dataclass(frozen=True)
class Scales:
    """One grid behind one marker, or a marker and a grid for each of several aspects.

    Attributes:
        grid: The score grid; not looked at where there are aspects.
        marker: Text that stands before every score; likewise.
        aspects: In the order in which completions have them.
    """

    grid: ScoreGrid
    marker: str = "[RESULT]"
    aspects: tuple[Scale, ...] = ()

    @classmethod
    def of(cls, training: Mapping[str, Any]) -> "Scales":
        """The scales of a configuration: fields of TRACTConfig, as far as they are given."""
        return cls(
            ScoreGrid.from_values(training.get("score_values", DEFAULT_VALUES), training.get("score_texts")),
            str(training.get("score_marker", "[RESULT]")),
            read_aspects(training["aspects"]) if training.get("aspects") else (),
        )

    @classmethod
    def written(cls, scales: tuple[Scale, ...]) -> "Scales":
        """The same of a judge's scales."""
        return cls(scales[0].grid, scales[0].marker, scales if scales[0].name else ())
