"""The score terms of the loss: pure, unreduced, float32 inside.

Knows nothing of the trainer, which divides by the number of scores. The other term of CoT-RAFT, the rationale's
cross-entropy, is TRL's own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from trl_tract.grids.trie import TokenTrie
from trl_tract.scores import ScoreGrid, expected_score


def grid_logprobs(logits: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """Log-probability of each grid token under the softmax over the whole vocabulary.

    Args:
        logits: Next-token logits at the positions that predict a score, `(S, V)`.
        token_ids: Tokens of the grid, `K` of them.

    Returns:
        float32 `(S, K)`, nats; the probabilities of a row sum to the mass on the grid, at most 1.

    Example:
        >>> grid_logprobs(torch.zeros(1, 4), [0, 3]).exp()
        tensor([[0.2500, 0.2500]])
    """
    # Softmax over all of V first: gathering before the softmax would renormalise over the grid.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(dim=-1)[:, list(token_ids)]


def trie_logprobs(logits: torch.Tensor, trie: TokenTrie) -> torch.Tensor:
    """Log-probability of each score of a grid of several tokens: the sum along its path.

    Args:
        logits: Next-token logits behind each inner node, `(S, N, V)`.
        trie: Of the grid.

    Returns:
        float32 `(S, K)`, nats; the probabilities of a row sum to the mass on the grid, at most 1.

    Example:
        >>> trie = TokenTrie.from_paths([(1, 2), (1, 3), (0,)])
        >>> trie_logprobs(torch.zeros(1, 2, 4), trie).exp()
        tensor([[0.0625, 0.0625, 0.2500]])
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nodes, tokens = zip(*trie.edges, strict=True)
    steps = logits.log_softmax(dim=-1)[:, list(nodes), list(tokens)]  # (S, E)
    # Short paths are filled up with an edge that is certain.
    steps = torch.nn.functional.pad(steps, (0, 1))
    return steps[:, torch.tensor(trie.paths, device=steps.device)].sum(dim=-1)


def aspect_logprobs(
    roots: torch.Tensor, inner: torch.Tensor | None, aspects: torch.Tensor, grids: Sequence[ScoreGrid], union: TokenTrie
) -> torch.Tensor:
    """Log-probability of each score of the grid that a position has, where positions have different grids.

    Args:
        roots: Next-token logits at the positions that predict a score, `(S, V)`.
        inner: Next-token logits behind the inner nodes of the union, its root left out, at the P positions whose grid
            has scores of several tokens, `(P, N - 1, V)`; None where no grid has.
        aspects: The grid of each position, `(S,)`.
        grids: Resolved, `K` scores in the longest.
        union: Of the tries of the grids that have one.

    Returns:
        float32 `(S, K)`, nats; -inf behind the last score of a shorter grid, as for a score that cannot be.
    """
    longest = max(len(grid) for grid in grids)
    branched = torch.tensor([bool(grid.paths) for grid in grids], device=aspects.device)[aspects]  # (S,)
    place = branched.cumsum(0) - 1  # of each of the P among inner
    found, order = [], []
    for number, grid in enumerate(grids):
        mine = (aspects == number).nonzero()[:, 0]
        if grid.paths:
            assert inner is not None
            nodes = [union.nodes.index(node) - 1 for node in grid.trie.nodes[1:]]
            logits = torch.cat([roots[mine][:, None], inner[place[mine]][:, nodes]], dim=1)
            logprobs = trie_logprobs(logits, grid.trie)
        else:
            logprobs = grid_logprobs(roots[mine], grid.token_ids)
        found.append(torch.nn.functional.pad(logprobs, (0, longest - len(grid)), value=-torch.inf))
        order.append(mine)
    return torch.cat(found)[torch.cat(order).argsort()]


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
    return -(shares.to(logprobs) * logprobs).sum(dim=-1)


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
