"""The regression term of CoT-RAFT: pure, unreduced, float32 inside.

Knows nothing of the trainer, which divides by the number of scores. The other term, the rationale's cross-entropy, is
TRL's own.
"""

from collections.abc import Sequence

import torch

from trl_tract.scores import expected_score


def grid_probs(logits: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """Probability of each grid token under the softmax over the whole vocabulary.

    Args:
        logits: Next-token logits at the positions that predict a score, `(S, V)`.
        token_ids: Tokens of the grid, `K` of them.

    Returns:
        float32 `(S, K)`; a row sums to the mass on the grid, at most 1.

    Example:
        >>> grid_probs(torch.zeros(1, 4), [0, 3])
        tensor([[0.2500, 0.2500]])
    """
    # Softmax over all of V first: gathering before the softmax would renormalise over the grid.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.softmax(dim=-1)[:, list(token_ids)]


def raft_squared_error(
    probs: torch.Tensor, scores: torch.Tensor, values: torch.Tensor, *, normalize: bool = False
) -> torch.Tensor:
    """Squared error of the expected score: the RAFT (regression-aware fine-tuning) term of CoT-RAFT.

        (sum_k p_k v_k - score)^2

    Args:
        probs: Grid-token probabilities, `(S, K)`, from `grid_probs`.
        scores: Gold scores in rubric units, on the grid or between its values, `(S,)`.
        values: Grid values in rubric units, `(K,)`.
        normalize: Divide the expected score by the mass on the grid. The TRACT authors do not.

    Returns:
        float32 `(S,)`, squared rubric units.

    Example:
        >>> raft_squared_error(torch.tensor([[0.25, 0.25]]), torch.tensor([4.0]), torch.tensor([1.0, 5.0]))
        tensor([6.2500])

    Source: Lukasik et al. 2025, https://openreview.net/forum?id=xGs7Ch3Vyo; Chiang et al. 2025, equation of CoT-RAFT,
    https://aclanthology.org/2025.acl-long.147
    """
    return (expected_score(probs, values, normalize=normalize) - scores.to(probs)).square()
