"""Probabilities of a whole grid's scores, whatever the backend and however many tokens a score has."""

from collections.abc import Sequence

import numpy as np

from trl_tract.backends.base import Backend
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.trie import GridProbabilities, walk_trie


def grid_probabilities(backend: Backend, grid: ScoreGrid, prefixes: Sequence[Sequence[int]]) -> GridProbabilities:
    """Probabilities of a grid's scores behind token prefixes, and what was left out of them.

    One batched pass, or, where a backend asks for scores of several tokens token by token, one a level of their trie.
    """
    if not prefixes:
        return GridProbabilities.exact(np.zeros((0, len(grid))))
    if grid.paths:
        # A double of a user's own need not have the method.
        whole = getattr(backend, "trie_logprobs", None)
        if whole is not None and (logprobs := whole(prefixes, grid.trie)) is not None:
            return GridProbabilities.exact(np.exp(logprobs))
        return walk_trie(grid.trie, prefixes, backend.next_token_logprobs, grid.values)
    return GridProbabilities.exact(np.exp(backend.next_token_logprobs(prefixes, grid.token_ids)))
