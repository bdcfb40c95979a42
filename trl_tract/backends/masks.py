"""What each token sees, as the masks that a model's layers take. Knows attention; knows no trees' tokens or scores."""

from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask


def layer_masks(config: Any, ends: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> Any:
    """Write what each token of a tree sees as the masks that a model's layers take.

    Args:
        ends: Index behind the last descendant of each token, `(R, T)`; see `tree.Layout`.
        positions: Of each token, `(R, T)`.

    Returns:
        `(R, 1, T, T)`: bool for sdpa; 0 and the lowest number for sdpa on a CPU, and for eager, which would add a bool
        mask as 0 and 1; a BlockMask for flex_attention. By the type of layer where types differ.
    """
    index = torch.arange(ends.shape[1], device=ends.device)
    visible = (index <= index[:, None]) & (index[:, None] < ends[:, None])
    return written_masks(config, visible, positions, positions, dtype)


def written_masks(
    config: Any, visible: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, dtype: torch.dtype
) -> Any:
    """The same of what is visible to each query, bool `(R, Q, T)`, and of positions, `(R, Q)` and `(R, T)`."""

    def written(mask: torch.Tensor) -> Any:
        # On a CPU, sdpa makes numbers of a bool mask in each layer anew, and keeps all of them for the backward pass.
        if config._attn_implementation == "sdpa" and mask.device.type != "cpu":
            return mask[:, None]
        if config._attn_implementation == "flex_attention":
            rows, queries, keys = mask.shape
            return create_block_mask(
                lambda row, head, query, key: mask[row, query, key], rows, None, queries, keys, device=mask.device
            )
        # sdpa takes float32 beside queries of any 16 bits.
        kind = torch.promote_types(dtype, torch.float32) if config._attn_implementation == "sdpa" else dtype
        return torch.zeros(mask.shape, dtype=kind, device=mask.device).masked_fill(~mask, torch.finfo(kind).min)[
            :, None
        ]

    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    if window is None or (types and "sliding_attention" not in types):
        return written(visible)
    seen = visible & (queries[:, :, None] - keys[:, None] < window)
    if not types:
        return written(seen)
    return {"full_attention": written(visible), "sliding_attention": written(seen)}
