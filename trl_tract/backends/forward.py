"""Forward passes over left-padded rows, and what rows have in common computed once for all of them.

Knows models and their caches; knows nothing of sampling, of stop texts or of scores.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_PART = 2**14  # tokens of the vocabulary


def innermost(model: PreTrainedModel | PeftModel) -> Any:
    """The transformers model under an adapter: it holds the forward signature and the generation settings."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both `(B, L)` int64."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids.to(device), mask.to(device)


def forward(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **cache: Any) -> Any:
    """The model's own output; logits are those of the last position alone where the model can do that.

    Args:
        model: The model.
        input_ids: Left-padded rows, `(B, L)`.
        attention_mask: `(B, P + L)`, where `P` tokens of each row are in the cache.
        **cache: The cache, by the name that the model calls it, and `use_cache`.
    """
    parameters = inspect.signature(innermost(model).forward).parameters
    extra: dict[str, Any] = {}
    if "position_ids" in parameters:
        positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
        extra["position_ids"] = positions[:, -input_ids.shape[1] :]
    if "logits_to_keep" in parameters:
        extra["logits_to_keep"] = 1
    return model(input_ids=input_ids, attention_mask=attention_mask, **extra, **cache)


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


def last_logits(model: Any, rows: Sequence[Sequence[int]], prefixes: Sequence[int], pad: int) -> torch.Tensor:
    """Logits after the last token of each row, `(B, V)`; equal beginnings are computed once.

    Args:
        model: The model, in evaluation mode.
        rows: Token ids, `B` sequences.
        prefixes: How many tokens of each row may be shared, fewer than it has; see `common_prefixes`.
        pad: Token id to pad with.
    """
    beginnings = [row[:length] for row, length in zip(rows, prefixes, strict=True)]
    cache = shared_cache(model, beginnings, pad, gaps=True)
    if not cache:
        logits = forward(model, *left_padded(rows, pad, model.device), use_cache=False).logits
    else:
        # Behind the beginnings the rows are padded once more, and only the mask and the positions tell.
        _, before = left_padded(beginnings, pad, model.device)
        ids, mask = left_padded([row[n:] for row, n in zip(rows, prefixes, strict=True)], pad, model.device)
        logits = forward(model, ids, torch.cat([before, mask], dim=1), use_cache=True, **cache).logits
    last: torch.Tensor = logits[:, -1]
    return last


def common_prefixes(rows: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """For each row the number of its group, and how many tokens its group begins with in common.

    Rows that follow each other are of one group as long as they share half of their tokens or more: a prompt with
    several rationales. The last token is never shared.
    """
    groups: list[list[Sequence[int]]] = []
    common: list[Sequence[int]] = []
    for row in rows:
        shared = _common_beginning(common[-1], row) if groups else []
        if shared and 2 * len(shared) >= len(row):
            groups[-1].append(row)
            common[-1] = shared
        else:
            groups.append([row])
            common.append(row)
    lengths = [min(len(begin), *(len(row) - 1 for row in group)) for begin, group in zip(common, groups, strict=True)]
    return [(number, lengths[number]) for number, group in enumerate(groups) for _ in group]


def _common_beginning(one: Sequence[int], other: Sequence[int]) -> Sequence[int]:
    differ = (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return one[: next(differ, min(len(one), len(other)))]


def shared_cache(model: Any, prefixes: Sequence[Sequence[int]], pad: int, *, gaps: bool = False) -> dict[str, Any]:
    """Keys and values of the rows' prefixes, where equal prefixes are computed once.

    Args:
        model: The model, in evaluation mode.
        prefixes: Token ids that each row begins with, `B` sequences.
        pad: Token id to pad with.
        gaps: Rows go on behind padding. A window would count that padding, and so would a model that is not told
            positions.

    Returns:
        The cache of `B` rows, left padded to the longest prefix, by the name that the model calls it: an argument for
        `forward` or `model.generate`. Empty where nothing is to be gained (all prefixes differ, or are empty) or where
        the model's cache cannot be shared.
    """
    unique = list(dict.fromkeys(tuple(prefix) for prefix in prefixes))
    name = _cache_argument(model, gaps)
    if name is None or len(unique) == len(prefixes) or not any(unique):
        return {}
    cache: Any = DynamicCache(config=innermost(model).config.get_text_config())
    forward(model, *left_padded(unique, pad, model.device), use_cache=True, **{name: cache})
    place = {prefix: row for row, prefix in enumerate(unique)}
    # Not batch_repeat_interleave: a batch may hold three rows of one prompt and one of the next.
    cache.batch_select_indices(torch.tensor([place[tuple(prefix)] for prefix in prefixes]))
    return {name: cache}


def _cache_argument(model: Any, gaps: bool) -> str | None:
    """What the model calls its cache; None if its memory of a prefix is not keys and values of tokens alone.

    A window of the last tokens is: it holds what it would hold had every row computed it. State-space and convolution
    layers keep a running state that `generate` does not go on from in the same way, models with a memory of their own
    kind take another argument, and a prompt-learning adapter puts vectors of its own before the tokens.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return None
    owner = innermost(model)
    layers = DynamicCache(config=owner.config.get_text_config()).layers
    known = (DynamicLayer,) if gaps else (DynamicLayer, DynamicSlidingWindowLayer)
    parameters = inspect.signature(owner.forward).parameters
    if any(type(layer) not in known for layer in layers) or (gaps and "position_ids" not in parameters):
        return None
    # transformers renames the argument in 5.24.
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)
