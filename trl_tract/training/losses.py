"""The score terms of the loss: pure, unreduced, float32 inside.

Knows nothing of the trainer, which divides by the number of scores. The other term of CoT-RAFT, the rationale's
cross-entropy, is TRL's own.
"""

from typing import NamedTuple

import torch

from trl_tract.scale.decisions import expected_score


def raft_squared_error(expected: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Squared error of the expected score: the RAFT (regression-aware fine-tuning) term of CoT-RAFT.

        (sum_k p_k v_k - score)^2

    Args:
        expected: Mean scores under the model, rubric units, `(S,)`, from `expected_score`.
        scores: Gold scores in rubric units, on the grid or between its values, `(S,)`.

    Returns:
        float32 `(S,)`, squared rubric units.

    Example:
        >>> raft_squared_error(torch.tensor([1.5]), torch.tensor([4.0]))
        tensor([6.2500])

    Source: Lukasik et al. 2025, https://openreview.net/forum?id=xGs7Ch3Vyo; Chiang et al. 2025, equation of CoT-RAFT,
    https://aclanthology.org/2025.acl-long.147
    """
    return (expected - scores.to(expected)).square()


def annotator_cross_entropy(logprobs: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the score distribution to the annotators' histogram, both on the grid.

        -sum_k share_k log p_k

    Lowest where the model's distribution is the annotators' own, and there it is the entropy of their disagreement.

    Args:
        logprobs: Log-probabilities of the grid tokens, `(S, K)`, from `grid_logprobs`.
        shares: Share of annotators at each grid value, `(S, K)`, rows summing to 1.

    Returns:
        float32 `(S,)`, nats.

    Example:
        >>> annotator_cross_entropy(torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[1.0, 0.0]]))
        tensor([0.6931])
    """
    # A grid that is shorter than another is filled up with scores at -inf, which nobody gave.
    return -(shares.to(logprobs) * logprobs.masked_fill(shares == 0, 0.0)).sum(dim=-1)


class ScoreTerms(NamedTuple):
    """What S scores add to the loss, `(S,)` each.

    Attributes:
        expected: Mean scores under the model, rubric units.
        squared_error: Of them, squared rubric units.
        annotator_loss: Cross-entropy to the annotators' histograms, nats; None without any.
        weighted: Their weighted sum: what the loss is the mean of.
    """

    expected: torch.Tensor
    squared_error: torch.Tensor
    annotator_loss: torch.Tensor | None
    weighted: torch.Tensor


def score_terms(
    logprobs: torch.Tensor,
    gold: torch.Tensor,
    values: torch.Tensor,
    *,
    raft_weight: float | torch.Tensor,
    normalize: bool,
    annotators: torch.Tensor | None = None,
    annotator_weight: float = 0.0,
) -> ScoreTerms:
    """The score terms of a batch, unreduced.

    Args:
        logprobs: Log-probabilities of the grid, nats, `(S, K)`.
        gold: Gold scores, rubric units, `(S,)`.
        values: Of the grid, rubric units, `(K,)`; or of each score's own, `(S, K)`.
        raft_weight: Of the squared error; or of each score's, `(S,)`.
        normalize: See `expected_score`.
        annotators: Share of annotators at each value, `(S, K)`.
        annotator_weight: Of the cross-entropy to them.
    """
    expected = expected_score(logprobs.exp(), values, normalize=normalize)
    squared_error = raft_squared_error(expected, gold)
    weighted = raft_weight * squared_error
    annotator_loss = None
    if annotators is not None:
        annotator_loss = annotator_cross_entropy(logprobs, annotators)
        weighted = weighted + annotator_weight * annotator_loss
    return ScoreTerms(expected, squared_error, annotator_loss, weighted)
