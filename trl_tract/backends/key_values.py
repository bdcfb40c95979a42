"""Keys and values of tokens that were computed: a tree of beginnings, and caches made of its paths.

Knows tensors and token ids; knows nothing of models' forward passes, of sampling or of scores.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of T tokens by layer, `(H, T, D)` each."""


class RoomyLayer(DynamicLayer):
    """A layer of a cache that writes new tokens into room it has, where its base copies all of them each time."""

    def __init__(self, rows: int, used: int, room: int) -> None:
        super().__init__()
        self.rows, self.used, self.room = rows, used, room
        self.whole: tuple[torch.Tensor, torch.Tensor] | None = None

    def allocate(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make room for tokens like these, `(..., H, T, D)`."""
        # Zeros: what is masked is multiplied by 0 all the same, and memory as it comes may hold NaN.
        self.whole = tuple(  # type: ignore[assignment]
            one.new_zeros(self.rows, one.shape[-3], self.room, one.shape[-1]) for one in (keys, values)
        )
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show()

    def put(self, row: int, end: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tokens of one row, `(H, T, D)`, in front of column `end`."""
        if self.whole is None:
            self.allocate(keys, values)
        assert self.whole is not None
        for whole, new in zip(self.whole, (keys, values), strict=True):
            whole[row, :, end - new.shape[1] : end] = new

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new tokens of all rows; see `DynamicLayer.update`."""
        if self.whole is None:
            self.allocate(key_states, value_states)
        assert self.whole is not None
        end = self.used + key_states.shape[-2]
        for whole, new in zip(self.whole, (key_states, value_states), strict=True):
            whole[:, :, self.used : end] = new
        self.used = end
        self._show()
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _show(self) -> None:
        assert self.whole is not None
        self.keys, self.values = (whole[:, :, : self.used] for whole in self.whole)


def roomy_cache(layers: int, rows: int, used: int, room: int) -> DynamicCache:
    """A cache of `layers` layers for keys and values of `rows` rows."""
    cache: Any = DynamicCache()
    cache.layers = [RoomyLayer(rows, used, room) for _ in range(layers)]
    cache.layer_class_to_replicate = None
    return cache


def read_row(cache: DynamicCache, row: int, start: int, end: int) -> Layers:
    """A copy of what columns `start` to `end` of one row hold."""
    layers: Any = cache.layers
    return [tuple(one[row, :, start:end].clone() for one in (layer.keys, layer.values)) for layer in layers]


@dataclass(eq=False)
class _Node:
    tokens: tuple[int, ...]
    layers: Layers
    parent: "_Node | None" = None
    children: "dict[int, _Node]" = field(default_factory=dict)
    used_at: int = 0


class KeyValueTree:
    """Keys and values of token sequences; what several begin with is there once.

    Args:
        most: Tokens that it holds for long; see `trim`.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._clock = itertools.count()
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self.root = _Node((), [])
        self.size = 0

    def shrink(self) -> None:
        """Forget all, and hold half as much from now on: memory ran out."""
        self.clear()
        self.most //= 2

    def length(self, ids: Sequence[int]) -> int:
        """How many tokens of a sequence it knows, from the first."""
        return sum(count for _, count in self._path(ids))

    def add(self, ids: Sequence[int], start: int, layers: Layers) -> None:
        """Take what was computed for `ids[start:]`; those that it knows already stay as they are."""
        path = self._path(ids)
        known = sum(count for _, count in path)
        if known < start or known == len(ids):
            return  # what stood before it is gone, or nothing is new
        parent = self.root
        if path:
            parent, count = path[-1]
            if count < len(parent.tokens):
                self._split(parent, count)
        node = _Node(tuple(ids[known:]), _cut(layers, known - start, None), parent, used_at=next(self._clock))
        parent.children[node.tokens[0]] = node
        self.size += len(node.tokens)

    def fill(self, cache: DynamicCache, row: int, end: int, ids: Sequence[int]) -> None:
        """Write keys and values of `ids`, all of which it knows, into a row of a cache, in front of column `end`."""
        at = end - len(ids)
        for node, count in self._path(ids):
            at += count
            layer: Any
            for layer, (keys, values) in zip(cache.layers, node.layers, strict=True):
                layer.put(row, at, keys[:, :count], values[:, :count])
        assert at == end, "tokens are gone that were to be there"

    def trim(self) -> None:
        """Forget what was used longest ago, ends first, until it holds no more than `most` tokens."""
        while self.size > self.most:
            ends = [node for node in self._nodes(self.root) if not node.children and node.parent is not None]
            oldest = min(ends, key=lambda node: node.used_at)
            assert oldest.parent is not None
            del oldest.parent.children[oldest.tokens[0]]
            self.size -= len(oldest.tokens)

    def _nodes(self, node: _Node) -> list[_Node]:
        return [node, *(below for child in node.children.values() for below in self._nodes(child))]

    def _path(self, ids: Sequence[int]) -> list[tuple[_Node, int]]:
        """The nodes that a sequence goes along, and how many tokens of each are its."""
        node, at, path, now = self.root, 0, [], next(self._clock)
        while at < len(ids) and (child := node.children.get(ids[at])) is not None:
            count = common_length(child.tokens, tuple(ids[at : at + len(child.tokens)]))
            child.used_at = now
            path.append((child, count))
            at += count
            if count < len(child.tokens):
                break
            node = child
        return path

    def _split(self, node: _Node, count: int) -> None:
        """Make two nodes of one, the second with what it has beyond `count` tokens."""
        below = _Node(node.tokens[count:], _cut(node.layers, count, None), node, node.children, node.used_at)
        for child in below.children.values():
            child.parent = below
        node.tokens, node.layers = node.tokens[:count], _cut(node.layers, 0, count)
        node.children = {below.tokens[0]: below}


def _cut(layers: Layers, start: int, end: int | None) -> Layers:
    # Copies where something is left out: a part would keep the memory of the whole.
    def cut(one: torch.Tensor) -> torch.Tensor:
        part = one[:, start:end]
        return part if part.shape == one.shape else part.clone()

    return [(cut(keys), cut(values)) for keys, values in layers]


def common_length(*rows: Sequence[int]) -> int:
    """How many tokens all rows begin with in common."""
    shortest = min(map(len, rows))
    low, high = min(map(tuple, rows)), max(map(tuple, rows))  # what these two share, those between them share
    return next((place for place in range(shortest) if low[place] != high[place]), shortest)


def shared_beginnings(rows: Sequence[Sequence[int]], tree: KeyValueTree, least: int) -> list[Sequence[int]]:
    """What several rows go on with behind what the tree knows, where computing it once saves `least` tokens or more.

    Each is a whole beginning, from the first token. Behind it rows may have more in common: ask again when it is known.
    """
    groups: dict[tuple[int, ...], list[Sequence[int]]] = {}
    for row in rows:
        known = tree.length(row)
        if known < len(row):
            groups.setdefault(tuple(row[: known + 1]), []).append(row)
    found = []
    todo = [(len(key) - 1, group) for key, group in groups.items()]
    while todo:
        known, group = todo.pop()
        if len(group) == 1:
            continue
        end = common_length(*group)
        if (len(group) - 1) * (end - known) >= least:
            found.append(group[0][:end])
            continue
        parts: dict[int, list[Sequence[int]]] = {}
        for row in group:
            if len(row) > end:
                parts.setdefault(row[end], []).append(row)
        todo.extend((known, part) for part in parts.values())
    return found


def arranged(rows: Sequence[Sequence[int]]) -> list[int]:
    """The rows' numbers, rows that share half of their tokens or more side by side; longest first."""
    runs: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda number: (list(rows[number]), number)):
        last = rows[runs[-1][-1]] if runs else ()
        if last and 2 * common_length(last, rows[number]) >= len(rows[number]):
            runs[-1].append(number)
        else:
            runs.append([number])
    for run in runs:
        run.sort(key=lambda number: (-len(rows[number]), number))
    return [number for run in sorted(runs, key=lambda run: (-len(rows[run[0]]), run[0])) for number in run]
