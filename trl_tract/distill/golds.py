"""The gold scores of the rows that rationales are written for, and what would give them away.

Characters only: knows no models, and nothing of how a rationale comes about.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl_tract.distill.failures import stated_score
from trl_tract.rows.golds import aspect_scores, gold_score
from trl_tract.rows.rendering import as_prompt_completion, completion_text
from trl_tract.rows.row import Row
from trl_tract.scale.scale import Scale, locate_scores
from trl_tract.scale.text import ScoreNotFoundError, locate_score


@dataclass(frozen=True)
class GoldReader:
    """Reads gold scores off training rows, and refuses by number the rows that have none.

    Attributes:
        stages: What is written one after the other: the aspects, or a single rationale, whose aspect has no name.
        keeps_completions: Whether the rows' own completions may be needed in place of a new one.
    """

    stages: tuple[Scale, ...]
    keeps_completions: bool

    def golds(self, row: Mapping[str, Any], number: int) -> list[float]:
        """The gold score of a row for each stage: those given, or the ones in its completion.

        Raises:
            ValueError: One is missing or off its range, or the row lacks a prompt or a completion that is needed.
        """
        try:
            pair = as_prompt_completion(row)
            golds = self._of_aspects(row, pair) if self._several else [self._only_one(row, pair)]
        except ScoreNotFoundError as error:
            raise ValueError(f"row {number} has no gold score: {error}") from error
        for stage, gold in zip(self.stages, golds, strict=True):
            if not stage.grid.in_range(gold):
                low, high = stage.grid.texts[0], stage.grid.texts[-1]
                where = f"row {number}, aspect {stage.name!r}" if stage.name else f"row {number}"
                raise ValueError(f"{where}: the score {gold:g} is not between {low} and {high}")
        if "prompt" not in pair:
            raise ValueError(f"row {number} has no prompt: its columns are {', '.join(sorted(row))}")
        if self.keeps_completions and pair.get("completion") is None:
            raise ValueError(
                f"row {number} has no completion to keep if its rationale fails: set on_failure to 'drop' or 'raise'"
            )
        return golds

    def texts(self, row: Mapping[str, Any], number: int) -> list[str]:
        """The gold scores as they are written: each stage's nearest text."""
        return [stage.grid.nearest_text(gold) for stage, gold in zip(self.stages, self.golds(row, number), strict=True)]

    def unstated(self, pair: Row, number: int) -> re.Pattern[str] | None:
        """What finds a score written out in stage `number`; None if the annotated rationale states one itself.

        The model was taught to state it then.
        """
        stage = self.stages[number]
        stated = stated_score(stage.grid.texts)
        if pair.get("completion") is None:
            return stated
        content = completion_text(pair["completion"])
        if not self._several:
            annotated = content.rpartition(stage.marker)[0]
        else:
            try:
                spans = locate_scores(content, self.stages)
            except ScoreNotFoundError:
                return stated
            annotated = content[spans[number - 1].end if number else 0 : spans[number].marker_start]
        return None if stated.search(annotated) else stated

    @property
    def _several(self) -> bool:
        return bool(self.stages[0].name)

    def _only_one(self, row: Mapping[str, Any], pair: Row) -> float:
        if row.get("scores") is not None:
            raise ScoreNotFoundError("several", "it has several (`scores`), and a rationale is written for one")
        (stage,) = self.stages
        if "score" in row:
            return gold_score(stage.grid.in_numbers(row["score"]))
        text = completion_text(pair.get("completion"))
        return stage.grid.value_of(locate_score(text, stage.marker, stage.grid.texts).text)

    def _of_aspects(self, row: Mapping[str, Any], pair: Row) -> list[float]:
        given = aspect_scores(row.get("scores"), self.stages)
        if given is not None:
            return [gold_score(score) for score in given]
        spans = locate_scores(completion_text(pair.get("completion")), self.stages)
        return [stage.grid.value_of(span.text) for stage, span in zip(self.stages, spans, strict=True)]
