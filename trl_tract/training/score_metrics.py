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

    With several scales the means come for each of them too, and what is in rubric units for each of them alone:
    `score/mae` of one is `score/mae/<name>`.

    Args:
        accelerator: Of the trainer.
        names: Of the scales, A of them; an empty one for the only scale of a completion.

    Attributes:
        pairs: Expected and gold score of every score seen since `clear`, `(2, n)` pieces in dataset order.
    """

    def __init__(self, accelerator: Accelerator, names: Sequence[str] = ("",)) -> None:
        self.accelerator = accelerator
        self.names = tuple(names)
        # A row for all scores, then, where there are several scales, one for each.
        self.sums = torch.zeros(1 + len(self.names) if len(self.names) > 1 else 1, len(_SUMS), dtype=torch.float64)
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
        numbers: torch.Tensor | None = None,
    ) -> None:
        """Add a batch of S scores, on all ranks.

        Args:
            fused: Output of TRL's fused head, with `log_probs` and `label_mask`.
            expected: Expected scores, `(S,)`.
            gold: Gold scores, `(S,)`.
            squared_error: `(S,)`.
            logprobs: Log-probabilities of the grid, `(S, K)`.
            annotator_loss: `(S,)`, or None.
            numbers: The number of each score's scale, `(S,)`, where there are several.
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
        parts = [by_score] + [by_score[:, numbers == number] for number in range(len(self.sums) - 1)]
        sums = torch.stack([torch.cat([of_tokens, part.sum(dim=1)]) for part in parts])
        self.sums = self.sums.to(sums.device) + self.accelerator.reduce(sums, "sum")

    def add_pairs(self, expected: torch.Tensor, gold: torch.Tensor, positions: torch.Tensor) -> None:
        """Keep the scores of an evaluation batch, of all ranks; `positions`, bool `(B, L - 1)`, is where they stand."""
        # As (B, L - 1) rows, so that what the sampler repeats to fill the last batch can be left out.
        table = torch.full((2, *positions.shape), torch.nan, device=gold.device)
        table[:, positions] = torch.stack([expected.detach().to(gold), gold]).float()
        table = self.accelerator.pad_across_processes(table.transpose(0, 1), dim=2, pad_index=torch.nan)
        pairs = self.accelerator.gather_for_metrics(table).transpose(0, 1).flatten(1)
        self.pairs.append(pairs[:, pairs[1].isfinite()].cpu())

    def means(self) -> dict[str, float]:
        """The means since the last call, by the names under which they are logged; none where no score was seen."""
        whole, *by_scale = (_means(dict(zip(_SUMS, sums, strict=True))) for sums in self.sums.tolist())
        self.sums.zero_()
        if not by_scale:
            return whole
        means = {name: value for name, value in whole.items() if name in _OF_ALL_SCALES}
        for scale, part in zip(self.names, by_scale, strict=True):
            means |= {f"{name}/{scale}": value for name, value in part.items() if name != "loss/rationale"}
        return means

    def predictions(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Expected and gold scores of the evaluation set in dataset order, `(n,)` each; of several scales `(n, A)`."""
        expected, gold = torch.cat(self.pairs, dim=1).double().numpy()
        # Every row has each scale once, in their order.
        shape = (-1, len(self.names)) if len(self.names) > 1 else (-1,)
        return expected.reshape(shape), gold.reshape(shape)

    def correlations(self) -> dict[str, float]:
        """Agreement over the whole evaluation set, by the names under which it is logged."""
        if not self.pairs:
            return {}
        columns = (table.reshape(-1, len(self.names)).T for table in self.predictions())
        return {
            f"{name}/{scale}" if scale else name: value
            for scale, expected, gold in zip(self.names, *columns, strict=True)
            for name, value in _agreement(expected, gold).items()
        }


# Means that do not mix the rubric units of several scales.
_OF_ALL_SCALES = ("loss/rationale", "loss/score", "score/grid_mass")


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
