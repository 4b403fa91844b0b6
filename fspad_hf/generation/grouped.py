"""Grouped-query attention over a tree without repeated keys and values.

With a mask transformers repeats the keys and values of each group for all of its query heads before it calls
`scaled_dot_product_attention`: a copy of the whole cache in every layer. The same product comes from one head whose
rows are those of the whole group.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from .stand_ins import StandIns


class FoldedGroups(StandIns):
    """
    Within it the `repeat_kv` of transformers repeats nothing, and `scaled_dot_product_attention` of more query heads
    than key heads folds the heads of a group into rows.
    """

    def __init__(self):
        super().__init__({torch.Tensor.reshape: _reshape, nn.functional.scaled_dot_product_attention: self._attention})
        self._mask: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)  # the last one, and it folded

    def begin(self):
        self._mask = (None, None)  # a graph must hold its own

    def _attention(self, func, args, kwargs):
        query, key, value = args[:3]
        batch, heads, rows, width = query.shape
        groups = heads // key.shape[1]
        if groups == 1 or kwargs.get("enable_gqa") or len(args) > 3 or kwargs.get("is_causal"):
            return func(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        if mask is not None:
            kwargs = {**kwargs, "attn_mask": self._folded(mask, key.shape[1], groups)}
        out = func(query.reshape(batch, key.shape[1], groups * rows, width), key, value, **kwargs)
        return out.reshape(batch, heads, rows, out.shape[-1])

    def _folded(self, mask: torch.Tensor, key_heads: int, groups: int) -> torch.Tensor:
        if mask.shape[1] > 1:  # of each head its own
            return mask.reshape(mask.shape[0], key_heads, groups * mask.shape[2], mask.shape[3])
        if self._mask[0] is not mask:
            self._mask = mask, mask.repeat(1, 1, groups, 1)
        return self._mask[1]


def _reshape(func, args, kwargs):
    """`repeat_kv` without its last step, which copies; the tensor is `[batch, heads, groups, keys, width]`."""
    tensor = args[0]
    if tensor.dim() == 5 and len(args) == 5 and tensor.stride(2) == 0 and tensor.shape[2] > 1:
        batch, heads, groups, keys, width = tensor.shape
        if args[1:] == (batch, heads * groups, keys, width):
            return tensor[:, :, 0]
    return func(*args, **kwargs)


def has_groups(model: PreTrainedModel) -> bool:
    """Whether folding is worth a try: several query heads share keys, and attention is `sdpa`."""
    text = model.config.get_text_config()
    heads, key_heads = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    return text._attn_implementation == "sdpa" and bool(heads and key_heads and heads > key_heads)
