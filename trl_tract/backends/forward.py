"""Forward passes over left-padded rows, and what rows have in common computed once for all of them.

Knows models and their caches; knows nothing of sampling, of stop texts or of scores.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


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


def shared_cache(model: Any, prefixes: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Keys and values of the rows' prefixes, where equal prefixes are computed once.

    Args:
        model: The model, in evaluation mode.
        prefixes: Token ids that each row begins with, `B` sequences.
        pad: Token id to pad with.

    Returns:
        The cache of `B` rows, left padded to the longest prefix, by the name that the model calls it: an argument for
        `forward` or `model.generate`. Empty where nothing is to be gained (all prefixes differ, or are empty) or where
        the model's cache cannot be shared.
    """
    unique = list(dict.fromkeys(tuple(prefix) for prefix in prefixes))
    name = _cache_argument(model)
    if name is None or len(unique) == len(prefixes) or not any(unique):
        return {}
    cache: Any = DynamicCache(config=innermost(model).config.get_text_config())
    forward(model, *left_padded(unique, pad, model.device), use_cache=True, **{name: cache})
    place = {prefix: row for row, prefix in enumerate(unique)}
    # Not batch_repeat_interleave: a batch may hold three rows of one prompt and one of the next.
    cache.batch_select_indices(torch.tensor([place[tuple(prefix)] for prefix in prefixes]))
    return {name: cache}


def _cache_argument(model: Any) -> str | None:
    """What the model calls its cache; None if its memory of a prefix is not keys and values of tokens alone.

    A window of the last tokens is: it holds what it would hold had every row computed it. State-space and convolution
    layers keep a running state that `generate` does not go on from in the same way, models with a memory of their own
    kind take another argument, and a prompt-learning adapter puts vectors of its own before the tokens.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return None
    owner = innermost(model)
    layers = DynamicCache(config=owner.config.get_text_config()).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    parameters = inspect.signature(owner.forward).parameters
    # transformers renames the argument in 5.24.
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)
