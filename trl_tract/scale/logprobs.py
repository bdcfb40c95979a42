"""Log-probabilities of a grid from logits: pure, float32 inside. Knows nothing of models or losses."""

from collections.abc import Sequence

import torch

from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.trie import TokenTrie


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


def trie_logprobs(roots: torch.Tensor, inner: torch.Tensor, trie: TokenTrie) -> torch.Tensor:
    """Log-probability of each score of a grid of several tokens: the sum along its path.

    Args:
        roots: Next-token logits at the positions that predict a score, `(S, V)`.
        inner: Next-token logits behind each inner node but the root, `(S, N - 1, V)`.
        trie: Of the grid.

    Returns:
        float32 `(S, K)`, nats; the probabilities of a row sum to the mass on the grid, at most 1.

    Example:
        >>> trie = TokenTrie.from_paths([(1, 2), (1, 3), (0,)])
        >>> trie_logprobs(torch.zeros(1, 4), torch.zeros(1, 1, 4), trie).exp()
        tensor([[0.0625, 0.0625, 0.2500]])
    """
    inner = inner if inner.dtype == torch.float64 else inner.float()
    # The root's edges come first.
    nodes, tokens = zip(*trie.edges[(at_root := len(trie.edges_of[0])) :], strict=True)
    behind = inner.log_softmax(dim=-1)[:, [node - 1 for node in nodes], list(tokens)]
    steps = torch.cat([grid_logprobs(roots, [token for _, token in trie.edges[:at_root]]), behind], dim=1)  # (S, E)
    # Short paths are filled up with an edge that is certain.
    steps = torch.nn.functional.pad(steps, (0, 1))
    return steps[:, torch.tensor(trie.paths, device=steps.device)].sum(dim=-1)


def scale_logprobs(
    roots: torch.Tensor,
    inner: torch.Tensor | None,
    grids: Sequence[ScoreGrid],
    union: TokenTrie | None,
    numbers: torch.Tensor | None,
) -> torch.Tensor:
    """Log-probability of each score of the grid that a position has.

    Args:
        roots: Next-token logits at the positions that predict a score, `(S, V)`.
        inner: Next-token logits behind the nodes of the union, its root left out, at the P positions whose grid has
            scores of several tokens, `(P, N - 1, V)`; None where no grid has.
        grids: Resolved, `K` scores in the longest.
        union: Of the tries of the grids that have one.
        numbers: The grid of each position, `(S,)`; None where there is one grid.

    Returns:
        float32 `(S, K)`, nats; -inf behind the last score of a shorter grid, as for a score that cannot be.
    """
    if numbers is None:
        (grid,) = grids
        return grid_logprobs(roots, grid.token_ids) if inner is None else trie_logprobs(roots, inner, grid.trie)
    longest = max(len(grid) for grid in grids)
    branched = torch.tensor([bool(grid.paths) for grid in grids], device=numbers.device)[numbers]  # (S,)
    place = branched.cumsum(0) - 1  # of each of the P among inner
    found, order = [], []
    for number, grid in enumerate(grids):
        where = (numbers == number).nonzero()[:, 0]
        if grid.paths:
            assert inner is not None
            assert union is not None
            nodes = [union.nodes.index(node) - 1 for node in grid.trie.nodes[1:]]
            logprobs = trie_logprobs(roots[where], inner[place[where]][:, nodes], grid.trie)
        else:
            logprobs = grid_logprobs(roots[where], grid.token_ids)
        found.append(torch.nn.functional.pad(logprobs, (0, longest - len(grid)), value=-torch.inf))
        order.append(where)
    return torch.cat(found)[torch.cat(order).argsort()]
