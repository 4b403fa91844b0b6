"""The draft fed with its own features, as it is below the root of a tree (HASS, arXiv 2408.15766, section 3.2).

At step 1 position t reads the target's f_t. At step j > 1 it reads o_feature of step j - 1 at position t - 1, which is
the draft's guess of f_t, and attends to what the cache would hold j levels deep: rows made from true features up to
position t - j + 1, where the root was drawn, and then one row of each later step, the last of them its own.

The fed features are constants (EAGLE-3 lets gradients through them). A later step then trains the draft to do with the
features it gets, and its token loss never reaches the half of the output that regresses the feature: partial alignment
holds at every step.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import DynamicCache

from ..modeling_fspad import FSPADDraftOutput


def self_fed_outputs(
    draft: Callable[..., FSPADDraftOutput],
    inputs: dict[str, torch.Tensor],
    steps: int,
    segments: torch.LongTensor | None = None,
) -> list[FSPADDraftOutput]:
    """
    The draft's outputs `[rows, length, hidden]` of each step; those of step j mean something from the j-th position
    of a document on.

    Args:
        inputs: the draft's arguments at step 1, with `features` the target's.
        segments (`[rows, length]`): the document of each position.
    """
    if steps == 1:
        return [draft(**inputs)]
    cache, true = DynamicCache(), inputs["features"]
    outputs = [draft(**inputs, cache=cache)]
    for step in range(2, steps + 1):
        own = torch.cat((true[:, :1], outputs[-1].features[:, :-1].detach().to(true.dtype)), dim=1)
        mask = step_mask(true.shape[1], step, true.dtype, true.device, segments)
        outputs.append(draft(**{**inputs, "features": own, "attention_mask": mask}, cache=cache))
    return outputs


def step_mask(
    length: int, step: int, dtype: torch.dtype, device: torch.device, segments: torch.LongTensor | None = None
) -> torch.Tensor:
    """
    The additive mask of step j = `step`, `[rows or 1, 1, length, step * length]`: its queries, the keys of all steps.

    A query always sees itself, so that none is without a key.
    """
    index = torch.arange(length, device=device)
    back = index[:, None] - index  # [queries, keys]
    own = [back == step - stream for stream in range(2, step + 1)]  # of each later stream one key
    seen = torch.stack((back >= step - 1, *own), dim=1)[None]  # [1, queries, streams, keys]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None])[:, :, None]
    seen = seen.flatten(-2)
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
