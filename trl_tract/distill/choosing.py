"""Which rationales are kept, and which rows need one. Knows nothing of how they are written."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trl_tract.distill.authors import Candidate
from trl_tract.rows.rendering import as_prompt_completion
from trl_tract.rows.thinking import scored_text
from trl_tract.scale.scale import Scale, locate_scores
from trl_tract.scale.text import ScoreNotFoundError
from trl_tract.sources.schemas import has_rationale

_LOOKED_AT = 1000  # rows that decide how completions are written
_ROUNDING = 1e-9


class Told:
    """What became of the rationales that were sampled for the rows of a block."""

    def __init__(self) -> None:
        self.failures: dict[int, Counter[str]] = {}
        self.sampled: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()

    def of(self, row: int, candidates: Sequence[Candidate], gold: float, tolerance: float | None) -> list[Candidate]:
        """Those that may be kept, the closest to the gold score first, equal texts once; the others are counted.

        Args:
            tolerance: How far from the gold score they may be, rubric units; None: however far.
        """
        self.sampled[row] += len(candidates)
        self.tokens[row] += sum(candidate.tokens for candidate in candidates)
        failures = self.failures.setdefault(row, Counter())
        good: dict[str, Candidate] = {}
        for candidate in candidates:
            off = tolerance is not None and not abs(candidate.score - gold) <= tolerance + _ROUNDING
            failure = candidate.failure or ("off score" if off else None)
            if failure is None:
                good.setdefault(candidate.rationale, candidate)
            else:
                failures[failure] += 1
        return sorted(good.values(), key=lambda one: 0 if np.isnan(one.score) else abs(one.score - gold))


def default_tolerance(values: Sequence[float]) -> float:
    """Half the smallest step of a grid, or an eighth of its range where that is more, rubric units.

    Example:
        >>> default_tolerance([1, 2, 3, 4, 5]), default_tolerance([0, 1]), default_tolerance(range(101))
        (0.5, 0.5, 12.5)
    """
    step = min(after - before for before, after in itertools.pairwise(values))
    return max(step / 2, (values[-1] - values[0]) / 8)


def written_like(rows: Iterable[Any], scales: tuple[Scale, ...]) -> tuple[Scale, ...]:
    """The scales as most of the first rows with a rationale write their scores; as they are where none has one."""
    ways: Counter[tuple[Scale, ...]] = Counter()
    for row in itertools.islice(rows, _LOOKED_AT):
        try:
            if not has_rationale(row, scales):
                continue
            content = scored_text(as_prompt_completion(row)["completion"])
            begin, found = 0, []
            for scale, span in zip(scales, locate_scores(content, scales), strict=True):
                before = content[begin : span.marker_start]
                lead = span.lead if before.strip() else " "
                start = before[: len(before) - len(before.lstrip())]
                form = replace(scale.format, lead=lead, separator=span.separator, start=start)
                found.append(replace(scale, format=form))
                begin = span.end
            ways[tuple(found)] += 1
        except ScoreNotFoundError:
            continue  # refused by its number later
    return ways.most_common(1)[0][0] if ways else scales
