"""Forward passes that go on from keys and values which are there already.

Knows models and their caches; knows nothing of sampling, of stop texts or of scores.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trl_tract.backends.key_values import KeyValueTree, read_row, roomy_cache, shared_beginnings
from trl_tract.backends.masks import written_masks
from trl_tract.backends.whole import innermost, left_padded, whole_rows
from trl_tract.scale.trie import TokenTrie

_PART = 2**14  # tokens of the vocabulary
_LEAST = 16  # tokens that computing a beginning once has to save: a pass of its own costs something too
# Largest difference of logits behind keys and values from those of whole rows, relative to their size: far above the
# rounding of 16 bits, far below that of tokens that are seen at the wrong place.
_SAME = 0.1
_MASKED = ("sdpa", "eager")
_LAYERS = {"full_attention", "sliding_attention"}


@contextmanager
def exact_head(model: Any) -> Iterator[None]:
    """Logits in float32 from the last hidden state on, where a head of 16 bits would round them.

    Rounded, a logit of 20 is off by up to 0.06: a score then depends on what else is in its batch.
    """
    head = innermost(model).get_output_embeddings()
    head = getattr(head, "base_layer", head)  # an adapter's part is added to it
    if type(head) is not torch.nn.Linear or head.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return

    def in_float32(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        # A part of the vocabulary at a time: a copy of the whole weight may be gigabytes.
        parts = [inputs[0].float() @ part.float().T for part in module.weight.split(_PART)]
        return torch.cat(parts, dim=-1) + (0 if module.bias is None else module.bias.float())

    hook = head.register_forward_hook(in_float32)
    try:
        yield
    finally:
        hook.remove()


class Forward:
    """Passes of one model over what rows have beyond tokens whose keys and values a tree holds."""

    def __init__(self, model: Any, pad: int) -> None:
        self.model, self.pad = model, pad
        owner = innermost(model)
        self.config = owner.config.get_text_config()
        self.layers = len(_host_layers(owner))
        self.parameters = inspect.signature(owner.forward).parameters
        self.cache_name = _cache_argument(owner)
        self._dtype = owner.get_input_embeddings().weight.dtype
        self._sees_windows = _sees_windows(self.config)

    def __call__(self, input_ids: torch.Tensor, kept: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits after the last token of each row, `(B, V)`.

        Args:
            input_ids: The rows' next tokens, `(B, T)`.
            kept: What is no padding among the cache's P tokens and these, bool `(B, P + T)`.
            cache: Takes the new tokens' keys and values.
        """
        count = input_ids.shape[1]
        positions = (kept.cumsum(dim=-1) - 1).clamp(min=0)
        mask: Any = kept.long()
        if self._sees_windows:  # by the place in the row, padding between its tokens would be counted
            index = torch.arange(kept.shape[1], device=kept.device)
            mask = self._masks(_sees_before(index, kept, count), positions, positions[:, -count:])
        return self._run(input_ids, mask, positions[:, -count:], cache, 1)[:, -1]

    def nodes(self, rows: Sequence[Sequence[int]], tree: KeyValueTree, trie: TokenTrie) -> torch.Tensor:
        """Logits after the last token of each row, and behind each other node of a trie that follows it, `(B, N, V)`.

        The nodes are one sequence with the row's last tokens, each with the position that it would have in place, and
        each sees the row and its own ancestors.
        """
        ids, kept, cache, known = self._open(rows, tree, room=len(trie.nodes) - 1)
        nodes = trie.nodes[1:]
        before = (kept.cumsum(dim=-1) - 1).clamp(min=0)
        depths = torch.tensor([len(node) for node in nodes], device=ids.device)
        positions = torch.cat([before, before[:, -1:] + depths], dim=1)
        count, index = ids.shape[1], torch.arange(kept.shape[1], device=kept.device)
        ancestors = torch.tensor([[node[: len(one)] == one for one in nodes] for node in nodes], device=ids.device)
        rows_see = torch.nn.functional.pad(_sees_before(index, kept, count), (0, len(nodes)))
        nodes_see = torch.cat([kept[:, None].expand(-1, len(nodes), -1), ancestors.expand(len(rows), -1, -1)], dim=2)
        queries = positions[:, -(count + len(nodes)) :]
        mask = self._masks(torch.cat([rows_see, nodes_see], dim=1), positions, queries)
        tokens = torch.tensor([node[-1] for node in nodes], device=ids.device).expand(len(rows), -1)
        logits = self._run(torch.cat([ids, tokens], dim=1), mask, queries, cache, len(trie.nodes))
        self._keep(rows, tree, cache, known, kept.shape[1])
        return logits[:, -len(trie.nodes) :]

    def last(self, rows: Sequence[Sequence[int]], tree: KeyValueTree) -> torch.Tensor:
        """Logits after the last token of each row, `(B, V)`; the tree then knows the rows."""
        ids, kept, cache, known = self._open(rows, tree)
        logits = self(ids, kept, cache)
        self._keep(rows, tree, cache, known, kept.shape[1])
        return logits

    def learn(
        self, rows: Sequence[Sequence[int]], tree: KeyValueTree, fits: Callable[[int, int], bool], *, whole: bool = True
    ) -> None:
        """Let the tree know rows, beginnings that several share computed once.

        Args:
            fits: Whether so many rows of so many tokens are one pass.
            whole: False: shared beginnings alone.
        """
        while todo := shared_beginnings(rows, tree, _LEAST):
            self._learn(todo, tree, fits)
        if whole:
            self._learn([row for row in rows if tree.length(row) < len(row)], tree, fits)

    def _learn(self, rows: Sequence[Sequence[int]], tree: KeyValueTree, fits: Callable[[int, int], bool]) -> None:
        todo = sorted(rows, key=len, reverse=True)
        while todo:
            count = next((size for size in range(len(todo), 1, -1) if fits(size, len(todo[0]))), 1)
            self.last(todo[:count], tree)
            todo = todo[count:]

    def _open(
        self, rows: Sequence[Sequence[int]], tree: KeyValueTree, room: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, DynamicCache, list[int]]:
        """What is to be computed of rows, `(B, T)`; what is no padding, `(B, P + T)`; the cache; how much each has."""
        known = [min(tree.length(row), len(row) - 1) for row in rows]
        ids, new = left_padded([row[n:] for row, n in zip(rows, known, strict=True)], self.pad, self.model.device)
        before = max(known)
        kept = torch.tensor([[0] * (before - n) + [1] * n for n in known], device=new.device).reshape(len(rows), before)
        cache = roomy_cache(self.layers, len(rows), before, before + ids.shape[1] + room)
        for row, (tokens, n) in enumerate(zip(rows, known, strict=True)):
            tree.fill(cache, row, before, tokens[:n])
        return ids, torch.cat([kept, new], dim=1).bool(), cache, known

    def _keep(
        self, rows: Sequence[Sequence[int]], tree: KeyValueTree, cache: DynamicCache, known: Sequence[int], end: int
    ) -> None:
        for row, (tokens, n) in enumerate(zip(rows, known, strict=True)):
            tree.add(tokens, n, read_row(cache, row, end - len(tokens) + n, end))

    def _masks(self, visible: torch.Tensor, keys: torch.Tensor, queries: torch.Tensor) -> Any:
        return written_masks(self.config, visible, queries, keys, self._dtype)

    def _run(
        self, input_ids: torch.Tensor, mask: Any, positions: torch.Tensor, cache: DynamicCache, keep: int
    ) -> torch.Tensor:
        extra = {"logits_to_keep": keep} if "logits_to_keep" in self.parameters else {}
        logits: torch.Tensor = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self.cache_name: cache},
            **extra,
        ).logits
        return logits


def _sees_before(index: torch.Tensor, kept: torch.Tensor, count: int) -> torch.Tensor:
    """What each of the last `count` tokens sees, `(B, T, P + T)`; padding sees itself, or it would see nothing."""
    queries = index[-count:, None]
    return ((index <= queries) & kept[:, None]) | (index == queries)


def _host_layers(owner: Any) -> list[Any]:
    layers: list[Any] = DynamicCache(config=owner.config.get_text_config()).layers
    return layers


def _sees_windows(config: Any) -> bool:
    types = set(getattr(config, "layer_types", None) or ())
    return getattr(config, "sliding_window", None) is not None and (not types or "sliding_attention" in types)


def _cache_argument(owner: Any) -> str:
    # transformers renames the argument in 5.24.
    parameters = inspect.signature(owner.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), "")


def why_not_shared(model: Any, pad: int) -> str | None:
    """Why keys and values of a model cannot be gone on from in another row; None if they can.

    State-space and convolution layers keep a running state of all that came before, models with a memory of their own
    kind take another argument, and a prompt-learning adapter puts vectors of its own before the tokens. What the
    configuration does not tell is tried out on a few tokens.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "its adapter adds virtual tokens before the prompt"
    owner = innermost(model)
    config = owner.config.get_text_config()
    if not _cache_argument(owner) or "position_ids" not in inspect.signature(owner.forward).parameters:
        return "it accepts no key-value cache or no position ids"
    odd = {type(layer) for layer in _host_layers(owner)} - {DynamicLayer, DynamicSlidingWindowLayer}
    others = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if odd or others or getattr(owner, "_is_stateful", False):
        kinds = ", ".join(sorted(others or {layer.__name__ for layer in odd})) or config.model_type
        return f"it has layers other than standard attention ({kinds})"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    rope = str(getattr(config, "rope_parameters", None))
    if "'dynamic'" in rope or "'longrope'" in rope:
        return "the positions of its keys depend on the row length"
    if _sees_windows(config) and config._attn_implementation not in _MASKED:
        return f"it has windows, and attn_implementation={config._attn_implementation!r} takes no mask"
    difference = _tried_out(model, pad)
    if not difference <= _SAME:  # NaN is no agreement
        return f"{type(owner).__name__} gives different results with a cache (logits differ by {difference:.0%})"
    return None


@torch.no_grad()
def _tried_out(model: Any, pad: int) -> float:
    """How far logits of rows that go on from a shared beginning are from whole rows', relative to their size."""
    vocabulary = innermost(model).config.get_text_config().vocab_size
    tokens = [(7 * place + 2) % vocabulary for place in range(24)]  # any do, as long as they differ
    rows = [tokens[:12], [*tokens[:8], *tokens[12:14]], tokens[14:17]]
    try:
        wanted = whole_rows(model, rows, pad)
        forward, tree = Forward(model, pad), KeyValueTree(most=0)
        forward.last([tokens[:8]], tree)
        found = forward.last(rows, tree)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError):
        return float("inf")
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
