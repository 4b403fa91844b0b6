"""The training objective (arXiv 2408.15562, section 3.2): regress the feature, align the logits.

    loss = feature_weight * SmoothL1(o_feature, f) + logit_weight * CE(softmax(head(f)), head(o_logit))

SmoothL1 is averaged over h; both terms are summed over the masked positions, so that a caller can divide by their
number across a whole optimiser step. The head is the target's and frozen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


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


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum CE(softmax(head(target)), head(x)), its gradient taken chunk by chunk so that few logits live at once."""

    @staticmethod
    def forward(ctx, x, target, head, chunk):
        total, top1, gradients = x.new_zeros((), dtype=torch.float32), x.new_zeros((), dtype=torch.long), []
        for part, target_part in zip(x.detach().split(chunk), target.split(chunk), strict=True):
            with torch.no_grad():
                target_logits = head(target_part).float()
                probabilities = target_logits.softmax(-1)
            with torch.enable_grad():
                part = part.requires_grad_()
                logits = head(part).float()
                loss = F.cross_entropy(logits, probabilities, reduction="sum")
            gradients.append(torch.autograd.grad(loss, part)[0])
            total += loss.detach()
            top1 += (logits.argmax(-1) == target_logits.argmax(-1)).sum()
        ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(x))
        ctx.mark_non_differentiable(top1)
        return total, top1

    @staticmethod
    def backward(ctx, grad_total, grad_top1):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total, None, None, None
