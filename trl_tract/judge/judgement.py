"""Judgement: what a judge says of one item. Knows nothing of models or of how a score comes about."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class Judgement:
    """What a judge says of one item.

    Attributes:
        score: Mean of `scores`, or what the judge's `pool` and `recalibration` make of them, rubric units; NaN if there
            is none, never a guess. With several aspects there is none: see `aspects`.
        scores: One for each rationale that reached its score.
        rationales: The rationales behind `scores`; with several aspects the completions, scores included.
        probs: Probabilities of the grid's scores under the whole vocabulary, `(S, K)`, as the model gave them.
        grid_mass: Mean probability on the grid; far below 1 means that the model did not expect a score there.
        std: Mean standard deviation of the score under the model, renormalised on the grid, rubric units.
        error: Why there is no score, or None; with several aspects, which of them have none, and why.
        pruned_mass: Where scores are several tokens: mean probability of beginnings that were too improbable to be
            followed. 0 for a grid of single tokens.
        error_bound: How far that may have moved a `mean` score, rubric units; for other decisions see `pruned_mass`.
        aspects: Where a completion has several scores: name -> the judgement of that aspect. Empty otherwise.
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
