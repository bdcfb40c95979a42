"""Probabilities of a whole grid's scores, whatever the backend and however many tokens a score has."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

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
            return GridProbabilities.exact(np.exp(_checked(backend, "trie_logprobs", logprobs, prefixes, len(grid))))
        return walk_trie(grid.trie, prefixes, partial(_next, backend), grid.values)
    return GridProbabilities.exact(np.exp(_next(backend, prefixes, grid.token_ids)))


def _next(backend: Backend, prefixes: Sequence[Sequence[int]], tokens: Sequence[int]) -> NDArray[np.float64]:
    logprobs = backend.next_token_logprobs(prefixes, tokens)
    return _checked(backend, "next_token_logprobs", logprobs, prefixes, len(tokens))


def _checked(
    backend: Backend, method: str, logprobs: NDArray[np.float64], prefixes: Sequence[Sequence[int]], count: int
) -> NDArray[np.float64]:
    """What a backend returned, one row for each prefix."""
    if np.shape(logprobs) != (len(prefixes), count):
        raise ValueError(
            f"{method} of the backend {backend.name!r} returned an array of shape {np.shape(logprobs)} but must return "
            f"({len(prefixes)}, {count}): one log-probability for each prompt and token"
        )
    return logprobs
