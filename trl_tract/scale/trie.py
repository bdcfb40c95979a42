"""Scores of several tokens: the tokens of a whole grid as a trie, and the probability of each score along its path.

Integers and floats only: knows nothing of tokenizers or models. What a model says about the trie's edges comes from a
callable (`walk_trie`) or as an array.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NextTokenLogprobs = Callable[[Sequence[Sequence[int]], Sequence[int]], NDArray[np.float64]]

# Tokens that one call asks for where it may be more: vLLM answers for 128 at once.
_TOKENS_A_CALL = 128
_ROUNDING = 1e-3  # By so much may the probabilities of a grid exceed 1.


@dataclass(frozen=True)
class ScorePath:
    """The tokens that write one score.

    Attributes:
        token_ids: From the place where the tokens of the grid's scores part, through the score to its end.
        lead: How many of them come before the score's own characters: a space that is glued to other scores.
        end: How many of them follow the score. They are there where it is the beginning of another one (1 and 10):
            only what follows tells the two apart.
    """

    token_ids: tuple[int, ...]
    lead: int = 0
    end: int = 0

    @property
    def written(self) -> tuple[int, ...]:
        """The tokens without those that follow the score."""
        return self.token_ids[: len(self.token_ids) - self.end]


@dataclass(frozen=True)
class TokenTrie:
    """A grid's score paths, merged where they begin alike.

    A node is a beginning that some score goes on from, so the root is a node and a finished score is none. An edge is a
    token that follows a node. N nodes, E edges, K scores, D edges on the longest path.

    Attributes:
        nodes: The tokens from the root to each node, breadth first; the root's are none. `N`
        edges: The node that each edge leaves, and its token. `E`
        paths: The edges of each score from the root, filled up with E. `(K, D)`

    Example:
        >>> trie = TokenTrie.from_paths([(1, 9), (1, 0), (2,)])
        >>> trie.nodes, trie.edges, trie.paths
        (((), (1,)), ((0, 1), (0, 2), (1, 9), (1, 0)), ((0, 2), (0, 3), (1, 4)))
    """

    nodes: tuple[tuple[int, ...], ...]
    edges: tuple[tuple[int, int], ...]
    paths: tuple[tuple[int, ...], ...]

    @classmethod
    def from_paths(cls, paths: Sequence[tuple[int, ...]]) -> "TokenTrie":
        """Merge the token sequences of the scores.

        Raises:
            ValueError: A sequence is empty, or the beginning of another one, or there twice.
        """
        inner = {path[:depth] for path in paths for depth in range(len(path))}
        nodes = sorted(inner, key=lambda node: (len(node), node))
        clash = next((path for path in paths if path in inner or not path), None)
        if clash is not None or len(set(paths)) < len(paths):
            raise ValueError(f"the token sequences {list(paths)} are not prefix-free: one is the start of another")
        numbers = {node: number for number, node in enumerate(nodes)}
        depth = max(map(len, paths))
        ways: dict[tuple[int, int], int] = {}
        for at in range(depth):
            for path in paths:
                if at < len(path):
                    ways.setdefault((numbers[path[:at]], path[at]), len(ways))
        along = [[ways[numbers[path[:at]], path[at]] for at in range(len(path))] for path in paths]
        return cls(tuple(nodes), tuple(ways), tuple((*taken, *([len(ways)] * (depth - len(taken)))) for taken in along))

    @classmethod
    def union(cls, tries: Sequence["TokenTrie"]) -> "TokenTrie":
        """The nodes of all tries, without edges and paths: those stay the tries' own, and may contradict each other.

        Example:
            >>> one, other = TokenTrie.from_paths([(1, 2), (3,)]), TokenTrie.from_paths([(1, 4), (2, 1)])
            >>> TokenTrie.union([one, other]).nodes
            ((), (1,), (2,))
        """
        nodes = {node for trie in tries for node in trie.nodes}
        return cls(tuple(sorted(nodes, key=lambda node: (len(node), node))), (), ())

    @functools.cached_property
    def parents(self) -> tuple[int, ...]:
        """The node before each node; the root's is -1."""
        numbers = {node: number for number, node in enumerate(self.nodes)}
        return tuple(numbers[node[:-1]] if node else -1 for node in self.nodes)

    @functools.cached_property
    def edges_of(self) -> tuple[tuple[int, ...], ...]:
        """The edges that leave each node."""
        leaving: list[list[int]] = [[] for _ in self.nodes]
        for edge, (node, _) in enumerate(self.edges):
            leaving[node].append(edge)
        return tuple(map(tuple, leaving))

    def levels(self) -> Iterator[list[int]]:
        """The nodes by their distance from the root."""
        for depth in range(len(self.nodes[-1]) + 1):
            yield [number for number, node in enumerate(self.nodes) if len(node) == depth]

    def largest_below(self, values: Sequence[float]) -> NDArray[np.float64]:
        """The largest absolute value among the scores that go through each node, rubric units, `(N,)`."""
        largest = np.zeros(len(self.nodes))
        for value, path in zip(values, self.paths, strict=True):
            for edge in path:
                if edge < len(self.edges):
                    node = self.edges[edge][0]
                    largest[node] = max(largest[node], abs(value))
        return largest


@dataclass(frozen=True)
class GridProbabilities:
    """Probabilities of a grid's scores, and what was left out of them.

    Attributes:
        probs: Under the softmax over the whole vocabulary at each token, `(n, K)`; NaN where the backend gave none.
        pruned_mass: Probability of the beginnings that were not followed, `(n,)`. Some of it is on the grid.
        error_bound: What that can make of the expected score without normalisation, rubric units, `(n,)`: the
            probability of each beginning times the largest absolute value behind it.
    """

    probs: NDArray[np.float64]
    pruned_mass: NDArray[np.float64]
    error_bound: NDArray[np.float64]

    @classmethod
    def exact(cls, probs: NDArray[np.float64]) -> "GridProbabilities":
        """Nothing was left out."""
        return cls(probs, np.zeros(len(probs)), np.zeros(len(probs)))

    @property
    def faults(self) -> list[str | None]:
        """Why the probabilities of each row are none, and no score can be made of them; None where it can.

        Example:
            >>> GridProbabilities.exact(np.array([[0.5, 0.25], [1.0, 1.0], [0.0, 0.0]])).faults
            [None, 'the probabilities of the scores add up to 2, above 1', 'no score has any probability']
        """
        return [_fault(float(mass)) for mass in self.probs.sum(axis=1)]

    def of(self, rows: Sequence[int]) -> "GridProbabilities":
        """Those of some of the rows."""
        chosen = list(rows)
        return GridProbabilities(self.probs[chosen], self.pruned_mass[chosen], self.error_bound[chosen])


def _fault(mass: float) -> str | None:
    if mass > 1 + _ROUNDING:
        return f"the probabilities of the scores add up to {mass:.4g}, above 1"
    return "no score has any probability" if mass == 0 else None


def walk_trie(
    trie: TokenTrie,
    prefixes: Sequence[Sequence[int]],
    next_token_logprobs: NextTokenLogprobs,
    values: Sequence[float],
    *,
    least_share: float = 1e-6,
) -> GridProbabilities:
    """Ask for the tokens behind each node, level by level, and multiply along the paths.

    Works with every backend. Rows that share a prefix stand side by side, so that an engine's prefix cache serves them.

    Args:
        trie: Of the grid.
        prefixes: Token ids up to the trie's root, `n` of them.
        next_token_logprobs: As `Backend.next_token_logprobs`.
        values: The grid's scores, rubric units, `K` of them.
        least_share: A beginning with less than this share of the mass on the root's edges is not followed; its
            probability is counted in `pruned_mass`. 0 follows all.

    Example:
        >>> trie = TokenTrie.from_paths([(1, 9), (1, 0), (2,)])  # 1 and its end, 10, 2
        >>> halves = lambda rows, ids: np.log(np.full((len(rows), len(ids)), 0.5))
        >>> walk_trie(trie, [[7, 7]], halves, [1, 10, 2]).probs
        array([[0.25, 0.25, 0.5 ]])
    """
    count, num_edges = len(prefixes), len(trie.edges)
    logprobs = np.full((count, num_edges + 1), -np.inf)  # of each edge
    logprobs[:, num_edges] = 0.0  # what short paths are filled up with
    reached = np.full((count, len(trie.nodes)), -np.inf)  # log-probability of each node
    reached[:, 0] = 0.0
    floor = np.full(count, -np.inf)
    pruned, bound = np.zeros(count), np.zeros(count)
    largest = trie.largest_below(values)
    edge_to = {(trie.parents[number], node[-1]): number for number, node in enumerate(trie.nodes) if node}
    for level in trie.levels():
        for node in level:
            # A row without an answer (NaN) is neither followed nor pruned.
            cut = reached[:, node] < floor
            pruned[cut] += np.exp(reached[cut, node])
            bound[cut] += np.exp(reached[cut, node]) * largest[node]
        for nodes, tokens in _calls(trie, level):
            rows = [(row, node) for row in range(count) for node in nodes if reached[row, node] >= floor[row]]
            if not rows:
                continue
            asked = [[*prefixes[row], *trie.nodes[node]] for row, node in rows]
            answers = next_token_logprobs(asked, tokens)  # (len(rows), len(tokens))
            for (row, node), answer in zip(rows, answers, strict=True):
                for edge in trie.edges_of[node]:
                    logprobs[row, edge] = answer[tokens.index(trie.edges[edge][1])]
        for edge, step in enumerate(trie.edges):
            if step[0] in level and step in edge_to:
                reached[:, edge_to[step]] = reached[:, step[0]] + logprobs[:, edge]
        if level == [0] and least_share > 0:
            first = np.exp(logprobs[:, list(trie.edges_of[0])]).sum(axis=1)
            with np.errstate(divide="ignore"):
                floor = np.log(first * least_share)
    probs = np.exp(logprobs[:, np.array(trie.paths)].sum(axis=2))
    return GridProbabilities(probs, pruned, bound)


def _calls(trie: TokenTrie, level: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Nodes that are asked together, and the tokens they are asked for: few calls, each for not too many tokens."""
    nodes: list[int] = []
    tokens: dict[int, None] = {}
    for node in level:
        own = dict.fromkeys(trie.edges[edge][1] for edge in trie.edges_of[node])
        if nodes and len(tokens | own) > _TOKENS_A_CALL:
            yield nodes, list(tokens)
            nodes, tokens = [], {}
        nodes, tokens = [*nodes, node], tokens | own
    if nodes:
        yield nodes, list(tokens)
