"""Grouped-query attention over a tree without repeated keys and values.

With a mask transformers repeats the keys and values of each group for all of its query heads before it calls
`scaled_dot_product_attention`: a copy of the whole cache in every layer. The same product comes from one head whose
rows are those of the whole group. Only the twin of a target attends so, see [`twin`].
"""

import copy

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FOLDED = "fspad_folded_sdpa"


def folded_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    As transformers' `sdpa`, the query heads of a group folded into rows.

    Args:
        query (`[batch, heads, rows, width]`), key, value (`[batch, key heads, keys, width]`).
        attention_mask (`[batch, 1, rows, keys]`).

    Returns:
        `[batch, rows, heads, width]`.
    """
    (batch, heads, rows, width), key_heads = query.shape, key.shape[1]
    groups = heads // key_heads
    special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias"))
    if groups == 1 or attention_mask is None or attention_mask.shape[1] > 1 or special:
        attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    folded = query.reshape(batch, key_heads, groups * rows, width)
    out = nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=_repeated(attention_mask, groups), scale=scaling
    )
    return out.reshape(batch, heads, rows, -1).transpose(1, 2).contiguous(), None


def _repeated(mask: torch.Tensor, groups: int) -> torch.Tensor:
    """For the rows of a whole group; made once for all layers, which share a mask."""
    known = getattr(mask, "_fspad_repeated", None)
    if known is None:
        known = mask._fspad_repeated = mask.repeat(1, 1, groups, 1)
    return known


AttentionInterface.register(FOLDED, folded_attention)


def folded_config(model: PreTrainedModel) -> PreTrainedConfig | None:
    """A copy of the text configuration that attends folded; `None` where there are no groups or no `sdpa`."""
    text = model.config.get_text_config()
    heads, key_heads = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if text._attn_implementation != "sdpa" or not (heads and key_heads and heads > key_heads):
        return None
    config = copy.copy(text)
    config._attn_implementation_internal = FOLDED
    return config
