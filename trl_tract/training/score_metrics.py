"""What is logged of the scores: sums over batches and ranks, and the pairs behind an evaluation's correlations.

S numbers a batch, never logits. Knows nothing of the loss's weights or of the trainer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from trl_tract.evaluation.metrics import pearson, rmse, spearman

_SUMS = (
    "nll",
    "tokens",
    "squared_error",
    "absolute_error",
    "expected",
    "expected_square",
    "gold",
    "gold_square",
    "grid_mass",
    "annotators",
    "scores",
)


class ScoreMetrics:
    """Running sums of one mode, training or evaluation, without waiting for the device until they are read.

    With aspects the means come for each of them too, and what is in rubric units for each of them alone: `score/mae` of
    an aspect is `score/mae/<name>`.

    Args:
        accelerator: Of the trainer.
        aspects: Their names, where completions have several; A of them.

    Attributes:
        pairs: Expected and gold score of every score seen since `clear`, `(2, n)` pieces in dataset order; with
            aspects also the number of each, `(3, n)`.
    """

    def __init__(self, accelerator: Accelerator, aspects: Sequence[str] = ()) -> None:
        self.accelerator = accelerator
        self.aspects = tuple(aspects)
        # A row for all scores, then one for each aspect.
        self.sums = torch.zeros(1 + len(self.aspects), len(_SUMS), dtype=torch.float64)
        self.pairs: list[torch.Tensor] = []

    def clear(self) -> None:
        """Forget what was seen."""
        self.sums.zero_()
        self.pairs.clear()

    @torch.no_grad()
    def add(
        self,
        fused: Any,
        expected: torch.Tensor,
        gold: torch.Tensor,
        squared_error: torch.Tensor,
        logprobs: torch.Tensor,
        annotator_loss: torch.Tensor | None,
        aspects: torch.Tensor | None = None,
    ) -> None:
        """Add a batch of S scores, on all ranks.

        Args:
            fused: Output of TRL's fused head, with `log_probs` and `label_mask`.
            expected: Expected scores, `(S,)`.
            gold: Gold scores, `(S,)`.
            squared_error: `(S,)`.
            logprobs: Log-probabilities of the grid, `(S, K)`.
            annotator_loss: `(S,)`, or None.
            aspects: The number of each score's aspect, `(S,)`, where there are several.
        """
        mass = logprobs.exp().sum(dim=-1)
        by_score = torch.stack(
            [
                squared_error,
                (expected - gold).abs(),
                expected,
                expected.square(),
                gold,
                gold.square(),
                mass,
                torch.zeros_like(mass) if annotator_loss is None else annotator_loss,
                torch.ones_like(mass),
            ]
        ).double()  # (9, S)
        of_tokens = torch.stack([-fused.log_probs.sum(), fused.label_mask.sum()]).double()
        rows = [torch.cat([of_tokens, by_score.sum(dim=1)])]
        for number in range(len(self.aspects)):
            rows.append(torch.cat([of_tokens, by_score[:, aspects == number].sum(dim=1)]))
        sums = torch.stack(rows)
        self.sums = self.sums.to(sums.device) + self.accelerator.reduce(sums, "sum")

    def add_pairs(
        self, expected: torch.Tensor, gold: torch.Tensor, positions: torch.Tensor, aspects: torch.Tensor | None = None
    ) -> None:
        """Keep the scores of an evaluation batch, of all ranks; `positions`, bool `(B, L - 1)`, is where they stand."""
        # As (B, L - 1) rows, so that what the sampler repeats to fill the last batch can be left out.
        kept = [expected.detach(), gold] if aspects is None else [expected.detach(), gold, aspects]
        table = torch.full((len(kept), *positions.shape), torch.nan, device=gold.device)
        table[:, positions] = torch.stack([each.to(gold) for each in kept]).float()
        table = self.accelerator.pad_across_processes(table.transpose(0, 1), dim=2, pad_index=torch.nan)
        pairs = self.accelerator.gather_for_metrics(table).transpose(0, 1).flatten(1)
        self.pairs.append(pairs[:, pairs[1].isfinite()].cpu())

    def means(self) -> dict[str, float]:
        """The means since the last call, by the names under which they are logged; none where no score was seen."""
        whole, *by_aspect = self.sums.tolist()
        self.sums.zero_()
        means = _means(dict(zip(_SUMS, whole, strict=True)))
        if self.aspects:
            means = {name: value for name, value in means.items() if name in _OF_ALL_ASPECTS}
        for aspect, sums in zip(self.aspects, by_aspect, strict=True):
            its = _means(dict(zip(_SUMS, sums, strict=True)))
            means |= {f"{name}/{aspect}": value for name, value in its.items() if name != "loss/rationale"}
        return means

    def predictions(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Expected and gold scores of the evaluation set, `(n,)` each, in dataset order; with aspects `(n, A)`."""
        expected, gold = torch.cat(self.pairs, dim=1)[:2].double().numpy()
        if self.aspects:
            # Every row has each aspect once, in their order.
            return expected.reshape(-1, len(self.aspects)), gold.reshape(-1, len(self.aspects))
        return expected, gold

    def correlations(self) -> dict[str, float]:
        """Agreement over the whole evaluation set, by the names under which it is logged."""
        if not self.pairs:
            return {}
        if not self.aspects:
            return _agreement(*self.predictions())
        expected, gold, numbers = torch.cat(self.pairs, dim=1).double().numpy()
        return {
            f"{name}/{aspect}": value
            for number, aspect in enumerate(self.aspects)
            for name, value in _agreement(expected[numbers == number], gold[numbers == number]).items()
        }


# Means that do not mix the rubric units of aspects.
_OF_ALL_ASPECTS = ("loss/rationale", "loss/score", "score/grid_mass")


def _means(sums: dict[str, float]) -> dict[str, float]:
    count = sums["scores"]
    if not count:
        return {}
    return {
        "loss/rationale": sums["nll"] / max(sums["tokens"], 1),
        "loss/score": sums["squared_error"] / count,
        "loss/annotators": sums["annotators"] / count,
        "score/expected": sums["expected"] / count,
        "score/mae": sums["absolute_error"] / count,
        "score/grid_mass": sums["grid_mass"] / count,
        "spread/expected": _spread(sums["expected"], sums["expected_square"], count),
        "spread/gold": _spread(sums["gold"], sums["gold_square"], count),
    }


def _agreement(expected: NDArray[np.float64], gold: NDArray[np.float64]) -> dict[str, float]:
    return {
        "score/pearson": pearson(expected, gold),
        "score/spearman": spearman(expected, gold),
        "score/rmse": rmse(expected, gold),
    }


def _spread(total: float, squares: float, count: float) -> float:
    """Standard deviation over the scores, rubric units."""
    return float(np.sqrt(max(squares / count - (total / count) ** 2, 0.0)))
