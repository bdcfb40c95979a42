"""What is logged of the scores: sums over batches and ranks, and the pairs behind an evaluation's correlations.

S numbers a batch, never logits. Knows nothing of the loss's weights or of the trainer.
"""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from trl_tract.metrics import pearson, rmse, spearman

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

    Attributes:
        pairs: Expected and gold score of every score seen since `clear`, `(2, n)` pieces in dataset order.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64)
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
    ) -> None:
        """Add a batch of S scores, on all ranks.

        Args:
            fused: Output of TRL's fused head, with `log_probs` and `label_mask`.
            expected: Expected scores, `(S,)`.
            gold: Gold scores, `(S,)`.
            squared_error: `(S,)`.
            logprobs: Log-probabilities of the grid, `(S, K)`.
            annotator_loss: `(S,)`, or None.
        """
        zero = torch.zeros((), device=gold.device)
        sums = torch.stack(
            [
                -fused.log_probs.sum(),
                fused.label_mask.sum(),
                squared_error.sum(),
                (expected - gold).abs().sum(),
                expected.sum(),
                expected.square().sum(),
                gold.sum(),
                gold.square().sum(),
                logprobs.exp().sum(),
                zero if annotator_loss is None else annotator_loss.sum(),
                zero + len(gold),
            ]
        ).double()
        self.sums = self.sums.to(sums.device) + self.accelerator.reduce(sums, "sum")

    def add_pairs(self, expected: torch.Tensor, gold: torch.Tensor, positions: torch.Tensor) -> None:
        """Keep the scores of an evaluation batch, of all ranks; `positions`, bool `(B, L - 1)`, is where they stand."""
        # As (B, L - 1) rows, so that what the sampler repeats to fill the last batch can be left out.
        table = torch.full((2, *positions.shape), torch.nan, device=gold.device)
        table[:, positions] = torch.stack([expected.detach(), gold]).float()
        table = self.accelerator.pad_across_processes(table.transpose(0, 1), dim=2, pad_index=torch.nan)
        pairs = self.accelerator.gather_for_metrics(table).transpose(0, 1).flatten(1)
        self.pairs.append(pairs[:, pairs[1].isfinite()].cpu())

    def means(self) -> dict[str, float]:
        """The means since the last call, by the names under which they are logged; none where no score was seen."""
        sums = dict(zip(_SUMS, self.sums.tolist(), strict=True))
        self.sums.zero_()
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

    def predictions(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Expected and gold scores of the whole evaluation set, `(n,)` each, in dataset order."""
        expected, gold = torch.cat(self.pairs, dim=1).double().numpy()
        return expected, gold

    def correlations(self) -> dict[str, float]:
        """Agreement over the whole evaluation set, by the names under which it is logged."""
        if not self.pairs:
            return {}
        expected, gold = self.predictions()
        return {
            "score/pearson": pearson(expected, gold),
            "score/spearman": spearman(expected, gold),
            "score/rmse": rmse(expected, gold),
        }


def _spread(total: float, squares: float, count: float) -> float:
    """Standard deviation over the scores, rubric units."""
    return float(np.sqrt(max(squares / count - (total / count) ** 2, 0.0)))
