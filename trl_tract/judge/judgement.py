"""Judgement: what a judge says of one item. Knows nothing of models or of how a score comes about."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class Judgement:
    """A judge's result for one item.

    Attributes:
        score: Mean of `scores`, or their combination by the judge's `pool` and `recalibration`, in rubric units. NaN if
            there is no score; it is never guessed. NaN with several aspects: see `aspects`.
        scores: One score for each rationale that reached a score.
        rationales: The rationales of `scores`; with several aspects, the completions including scores.
        probs: Probabilities of the grid's scores under the full vocabulary, `(S, K)`, as the model gave them.
        grid_mass: Mean probability mass on the grid. A value far below 1 means that the model did not expect a score.
        std: Mean standard deviation of the score under the model, renormalised on the grid, in rubric units.
        error: Reason for a missing score, or None; with several aspects, the missing ones and the reasons.
        pruned_mass: For scores of several tokens: mean probability of token prefixes that were too improbable to
            continue. 0 for a grid of single tokens.
        error_bound: Maximum effect of pruning on a `mean` score, in rubric units; for other decisions see
            `pruned_mass`.
        aspects: Aspect name -> judgement, for completions with several scores. Empty otherwise.
    """

    score: float = math.nan
    scores: list[float] = field(default_factory=list)
    rationales: list[str] = field(default_factory=list)
    probs: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    grid_mass: float = math.nan
    std: float = math.nan
    error: str | None = None
    pruned_mass: float = 0.0
    error_bound: float = 0.0
    aspects: "dict[str, Judgement]" = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; NaN becomes None."""
        written: dict[str, Any] = {
            "score": None if math.isnan(self.score) else self.score,
            "scores": self.scores,
            "rationales": self.rationales,
            "probs": self.probs.tolist(),
            "grid_mass": None if math.isnan(self.grid_mass) else self.grid_mass,
            "std": None if math.isnan(self.std) else self.std,
            "error": self.error,
            "pruned_mass": self.pruned_mass,
            "error_bound": self.error_bound,
        }
        if self.aspects:
            written["aspects"] = {name: judgement.to_dict() for name, judgement in self.aspects.items()}
        return written
