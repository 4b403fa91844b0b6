"""The training objective (arXiv 2408.15562, section 3.2): regress the feature, align the logits.

    loss = feature_weight * SmoothL1(o_feature, f) + logit_weight * CE(softmax(head(f)), head(o_logit))

SmoothL1 is averaged over h; both terms are summed over the masked positions, so that a caller can divide by their
number across a whole optimiser step. The head is the target's and frozen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..modeling_fspad import FSPADDraftOutput
from .packing import continues, segment_mask, segment_positions


@dataclass
class LossSums:
    """Sums over `positions` masked positions; `top1` counts those where draft and target name the same token."""

    feature: torch.Tensor
    logit: torch.Tensor
    top1: torch.Tensor
    positions: torch.Tensor


class SampledHead:
    """
    The LM head over a subset of the vocabulary, for a softmax estimated from few columns.

    All of the most frequent ids plus a uniform draw from the rest, the latter corrected by log(rest / drawn), which
    makes the estimated partition function unbiased (sampled softmax, Jean et al. 2015). On a CPU the full head costs
    three times as much as the draft itself.

    Args:
        head: the target's LM head; must be a plain `nn.Linear`.
        frequent_ids (`[frequent]`): the ids always kept.
        extra: how many of the other ids to draw.
    """

    def __init__(self, head: nn.Module, frequent_ids: torch.LongTensor, extra: int, generator: torch.Generator):
        if type(head) is not nn.Linear:
            raise ValueError(f"A sampled softmax needs a plain nn.Linear LM head, got {type(head).__name__}.")
        rest = torch.ones(head.weight.shape[0], dtype=torch.bool)
        rest[frequent_ids] = False
        rest = rest.nonzero()[:, 0]
        drawn = rest[torch.randperm(len(rest), generator=generator)[:extra]]
        ids = torch.cat((frequent_ids, drawn)).to(head.weight.device)
        self.weight = head.weight.detach()[ids]
        self.bias = torch.zeros(len(ids), device=ids.device, dtype=head.weight.dtype)
        if len(drawn):
            self.bias[len(frequent_ids) :] = torch.log(torch.tensor(len(rest) / len(drawn)))
        if head.bias is not None:
            self.bias += head.bias.detach()[ids]

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.weight, self.bias)


def fspad_loss(
    logit_features: torch.Tensor,
    features: torch.Tensor,
    target_features: torch.Tensor,
    mask: torch.BoolTensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    chunk: int = 2048,
) -> LossSums:
    """
    Args:
        logit_features, features (`[batch, length, hidden]`): o_logit and o_feature at positions t.
        target_features (`[batch, length, hidden]`): f_{t+1}.
        mask (`[batch, length]`): True where token t+1 is the assistant's.
        head: features -> logits, frozen.
        chunk: positions whose logits are held at a time.
    """
    target = target_features[mask]
    feature = F.smooth_l1_loss(features[mask].float(), target.float(), reduction="none").mean(-1).sum()
    logit, top1 = _ChunkedCrossEntropy.apply(logit_features[mask], target, head, chunk)
    return LossSums(feature, logit, top1, mask.sum())


def draft_loss(
    draft: nn.Module,
    embedding: Callable,
    head: Callable,
    ids: torch.LongTensor,
    features: torch.Tensor,
    mask: torch.BoolTensor,
    noise: float = 0.0,
    segments: torch.LongTensor | None = None,
    seeds: Sequence[int] | None = None,
) -> LossSums:
    """
    The loss sums of a batch of rows. Position t reads (f_t + noise, e_{t+1}), and is held against f_{t+1}.

    Args:
        embedding, head: the target's, frozen: ids -> embeddings, features -> logits.
        ids (`[rows, length]`), features (`[rows, length, hidden]`): the rows and the target's features of them.
        mask (`[rows, length]`): True on the assistant's tokens.
        noise: half-width of the uniform noise at length 512; rows of another length get it scaled by 512 / length,
            packed documents each by their own length.
        segments (`[rows, length]`): the document of each token, see [`pack`]; a document's draft sees no other's.
        seeds: of the noise, one a row; by default it comes from the global generator.
    """
    if segments is not None:
        mask = mask & continues(segments)
    out = draft_outputs(draft, embedding, ids, features, noise, segments, seeds)
    return fspad_loss(out.logit_features, out.features, features[:, 1:], mask[:, 1:], head)


def draft_outputs(
    draft: nn.Module,
    embedding: Callable,
    ids: torch.LongTensor,
    features: torch.Tensor,
    noise: float = 0.0,
    segments: torch.LongTensor | None = None,
    seeds: Sequence[int] | None = None,
) -> FSPADDraftOutput:
    """The draft's outputs `[rows, length - 1, hidden]` at positions t, from true features; as [`draft_loss`]."""
    dtype = next(draft.parameters()).dtype
    inputs, packing = features[:, :-1].to(dtype), {}
    if segments is not None:
        packing["position_ids"] = segment_positions(segments)[:, :-1]
        packing["attention_mask"] = segment_mask(segments[:, :-1], dtype)
    if noise:
        drawn = torch.rand_like(inputs) if seeds is None else _seeded_rows(inputs, seeds)
        inputs = inputs + (drawn * 2 - 1) * (noise * 512 / _document_lengths(ids, segments))
    with torch.no_grad():
        inputs_embeds = embedding(ids[:, 1:]).to(dtype)
    return draft(inputs_embeds=inputs_embeds, features=inputs, **packing)


def _seeded_rows(like: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    drawn = torch.empty_like(like)
    for row, seed in zip(drawn, seeds, strict=True):
        row.uniform_(generator=torch.Generator(like.device).manual_seed(seed))
    return drawn


def _document_lengths(ids: torch.LongTensor, segments: torch.LongTensor | None) -> int | torch.Tensor:
    """The length of a row, or `[rows, length - 1, 1]` of the document that each input belongs to."""
    if segments is None:
        return ids.shape[1]
    counts = torch.zeros_like(segments).scatter_add_(1, segments, torch.ones_like(segments))
    return counts.gather(1, segments)[:, :-1, None]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum CE(softmax(head(target)), head(x)), its gradient taken chunk by chunk so that few logits live at once."""

    @staticmethod
    def forward(ctx, x, target, head, chunk):
        total, top1, gradients = x.new_zeros((), dtype=torch.float32), x.new_zeros((), dtype=torch.long), []
        for part, target_part in zip(x.detach().split(chunk), target.split(chunk), strict=True):
            loss, hits, gradient = _cross_entropy(part, target_part, head)
            total, top1 = total + loss.to(total.device), top1 + hits.to(top1.device)
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        ctx.mark_non_differentiable(top1)
        return total, top1

    @staticmethod
    def backward(ctx, grad_total, grad_top1):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total, None, None, None


def _cross_entropy(x, target, head) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, agreements and the gradient of x; a function of its own, so that its logits die with it."""
    with torch.no_grad():
        target_logits = head(target).float()
    with torch.enable_grad():
        x = x.requires_grad_()
        logits = head(x).float()
        loss = F.cross_entropy(logits, target_logits.softmax(-1), reduction="sum")
    hits = (logits.argmax(-1) == target_logits.argmax(-1)).sum()
    return loss.detach(), hits, torch.autograd.grad(loss, x)[0]
