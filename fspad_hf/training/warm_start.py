"""The best linear guess, in closed form, as the place to start from."""

from collections.abc import Callable, Iterable

import torch

from ..modeling_fspad import FSPADDraftModel
from .packing import continues


@torch.no_grad()
def warm_start(draft: FSPADDraftModel, embedding: Callable, batches: Iterable[tuple]):
    """
    Starts the draft at the best linear guess: `fc` solves the ridge regression f_{t+1} ~ W [e_{t+1}; f_t] + b in
    closed form, and every residual branch starts at zero.

    Args:
        embedding: ids `[rows, length]` -> embeddings, on the features' device.
        batches: (ids `[rows, length]`, features `[rows, length, hidden]`, segments `[rows, length]` of packed rows or
            `None`); some 100,000 tokens are plenty.
    """
    gram = cross = 0.0
    for ids, features, segments in batches:
        kept = torch.ones_like(ids, dtype=torch.bool) if segments is None else continues(segments)
        kept = kept[:, 1:].to(features.device)
        x = torch.cat((embedding(ids[:, 1:]), features[:, :-1]), dim=-1)[kept].double()
        x = torch.cat((x, torch.ones_like(x[:, :1])), dim=-1)
        gram = gram + x.T @ x
        cross = cross + x.T @ features[:, 1:][kept].double()
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram + ridge, cross)
    fc = draft.feature_sampler.fc
    fc.weight.copy_(solution[:-1].T)
    if fc.bias is not None:
        fc.bias.copy_(solution[-1])
    if draft.config.feature_sampling:
        draft.feature_sampler.down_proj.weight.zero_()
    draft.layer.self_attn.o_proj.weight.zero_()
    draft.layer.mlp.down_proj.weight.zero_()
