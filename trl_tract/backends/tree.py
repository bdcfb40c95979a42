"""Token sequences that begin alike, merged: a tree in which each beginning stands once, laid out for a forward pass.

Arrays of integers only: knows nothing of models, scores or padding.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_MOST_WAYS = 16  # of cutting a batch into trees that are looked at


@dataclass(frozen=True)
class Layout:
    """Merged sequences as `R` rows of `T` tokens, parents before their children.

    In its row, the token at `query` sees the one at `key` if `key <= query < ends[key]`: itself and what stands before
    it in the sequences that it is part of.

    Attributes:
        tokens: Token ids, `(R, T)`; 0 where nothing stands.
        positions: Of each token in its own sequence, `(R, T)`.
        ends: Index behind the last descendant of each token, `(R, T)`; what stands nowhere sees itself alone.
        places: Of each sequence that was given, the place of each of its tokens in the `R * T`.
    """

    tokens: Ints
    positions: Ints
    ends: Ints
    places: list[Ints]


def lay_out(sequences: Sequence[Ints], owners: Sequence[int], *, share: bool, attention: float) -> tuple[Layout, float]:
    """Merge sequences in the cheapest of the ways that were looked at. Whatever the way, each token sees the same.

    Where all begin alike by a few tokens, one tree of them all would attend to more than it saves: trees are cut where
    their common beginning is shorter than some length, and all such lengths are looked at.

    Args:
        sequences: Token ids and positions, `(n, 2)` each, n at least 1.
        owners: Whose each sequence is. What has one owner is always merged.
        share: Whether sequences of different owners may be.
        attention: What it costs a token that the row is one token longer, relative to the rest of its cost.

    Returns:
        The layout, and its cost: that of `R * T` tokens which attend to `T` tokens each. See `cost_of`.
    """
    ways = [_Merge.of(sequences, owners)]
    if share:
        whole = _Merge.of(sequences, [0] * len(sequences))
        lengths = sorted(set(whole.common) - {0})
        ways += [whole.cut(length) for length in lengths[:: 1 + len(lengths) // _MOST_WAYS]]
    best = min(ways, key=lambda way: way.cost(attention))
    return best.layout(), best.cost(attention)


def cost_of(rows: int, length: int, attention: float) -> float:
    """What a forward pass over `rows` rows of `length` tokens costs, in tokens that attend to nothing."""
    return rows * length * (1 + attention * length)


def placed(ids: Sequence[int] | Ints) -> Ints:
    """Token ids with their positions, `(n, 2)`."""
    return np.stack([ids, np.arange(len(ids))], axis=1)


def distinct_share(sequences: Sequence[Ints], batch_size: int) -> float:
    """Which part of their tokens is distinct, where batches are made of sequences that begin alike.

    Args:
        sequences: Token ids and positions, `(n, 2)` each.
        batch_size: Sequences in a batch.

    Example:
        >>> distinct_share([placed([5, 5, 5, last]) for last in (1, 2)], 2)
        0.625
    """
    merged = _Merge.of(sequences, [0] * len(sequences))
    # The first of a batch has nobody before it to begin alike with.
    seen = sum(common for number, common in enumerate(merged.common) if number % batch_size)
    total = sum(map(len, sequences))
    return (total - seen) / total


@dataclass(frozen=True)
class _Merge:
    """An order of sequences in which those that begin alike follow each other.

    Attributes:
        common: With how many tokens each, in that order, begins like the one before it; 0 begins a tree.
    """

    sequences: Sequence[Ints]
    order: tuple[int, ...]
    common: tuple[int, ...]

    @classmethod
    def of(cls, sequences: Sequence[Ints], owners: Sequence[int]) -> "_Merge":
        """Those of one owner merged as far as they go."""
        # Big-endian, bytes are in the order of the numbers, which here are not negative.
        keys = [(owner, each.astype(">i4").tobytes()) for owner, each in zip(owners, sequences, strict=True)]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        common = [
            _common_beginning(sequences[before], sequences[number]) if owners[before] == owners[number] else 0
            for before, number in itertools.pairwise(order)
        ]
        return cls(sequences, tuple(order), (0, *common))

    def cut(self, least: int) -> "_Merge":
        """Beginnings shorter than `least` tokens are not shared."""
        return _Merge(self.sequences, self.order, tuple(common if common >= least else 0 for common in self.common))

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Tokens in each tree."""
        sizes: list[int] = []
        for number, common in zip(self.order, self.common, strict=True):
            if common == 0:
                sizes.append(0)
            sizes[-1] += len(self.sequences[number]) - common
        return sizes

    @functools.cached_property
    def starts(self) -> list[tuple[int, int]]:
        """The row of each tree and where it begins there: in the first row with room, the largest tree first."""
        length = max(self.sizes)
        used: list[int] = []
        starts = [(0, 0)] * len(self.sizes)
        for tree in sorted(range(len(self.sizes)), key=lambda tree: -self.sizes[tree]):
            row = next((row for row, taken in enumerate(used) if taken + self.sizes[tree] <= length), len(used))
            if row == len(used):
                used.append(0)
            starts[tree] = row, used[row]
            used[row] += self.sizes[tree]
        return starts

    def cost(self, attention: float) -> float:
        return cost_of(1 + max(row for row, _ in self.starts), max(self.sizes), attention)

    def layout(self) -> Layout:
        length = max(self.sizes)
        shape = (1 + max(row for row, _ in self.starts), length)
        tokens, positions = np.zeros(shape[0] * length, np.int64), np.zeros(shape[0] * length, np.int64)
        ends = np.tile(np.arange(1, length + 1), shape[0])
        places: list[Ints] = [np.zeros(0, np.int64)] * len(self.sequences)
        path, size, row, tree = places[0], 0, 0, -1
        for number, common in zip(self.order, self.common, strict=True):
            if common == 0:
                tree += 1
                row, start = self.starts[tree]
                path, size = path[:0], row * length + start
            new = self.sequences[number][common:]
            path = np.concatenate([path[:common], np.arange(size, size + len(new))])
            size += len(new)
            tokens[path[common:]], positions[path[common:]] = new[:, 0], new[:, 1]
            # In this order the descendants of a token follow it: the last to come tells where they end.
            ends[path] = size - row * length
            places[number] = path
        return Layout(tokens.reshape(shape), positions.reshape(shape), ends.reshape(shape), places)


def _common_beginning(one: Ints, other: Ints) -> int:
    """With how many tokens at the same positions two sequences begin alike."""
    shorter = min(len(one), len(other))
    differ = (one[:shorter] != other[:shorter]).any(axis=1)
    return int(differ.argmax()) if differ.any() else shorter
