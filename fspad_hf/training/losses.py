"""The training objective (arXiv 2408.15562, section 3.2): regress the feature, align the logits.

    loss = feature_weight * SmoothL1(o_feature, f) + logit_weight * CE(softmax(head(f)), head(o_logit))

SmoothL1 is averaged over h; both terms are summed over the masked positions, so that a caller can divide by their
number across a whole optimiser step. The head is the target's and frozen. [`Objective`] adds what is not in the paper.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..generation.target import has_rows
from ..modeling_fspad import FSPADDraftOutput
from .packing import continues, segment_mask, segment_positions
from .self_feeding import self_fed_outputs

LOGITS_AT_ONCE = 1 << 26  # of a loss: a quarter of a gigabyte in float32, several times


@dataclass(frozen=True)
class Objective:
    """
    What goes beyond the paper; by default nothing.

    Args:
        self_steps: how often the draft is run, after the first time on features of its own, see [`self_fed_outputs`].
        self_step_decay: step j weighs decay^(j-1) in the mean of the steps' losses.
        top_k_weight, top_k: `top_k_weight` times -sum q log p over the target's `top_k` likeliest tokens is added to
            the logit part, q and p the target's and the draft's whole softmax (HASS, arXiv 2408.15766, section 3.1).
    """

    self_steps: int = 1
    self_step_decay: float = 1.0
    top_k_weight: float = 0.0
    top_k: int = 10

    @property
    def step_weights(self) -> list[float]:
        """Of the steps; their sum is 1."""
        weights = [self.self_step_decay**step for step in range(self.self_steps)]
        return [weight / sum(weights) for weight in weights]


PAPER = Objective()


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
        if not has_rows(head):
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
    chunk: int | None = None,
) -> LossSums:
    """
    Args:
        logit_features, features (`[batch, length, hidden]`): o_logit and o_feature at positions t.
        target_features (`[batch, length, hidden]`): f_{t+1}.
        mask (`[batch, length]`): True where token t+1 is the assistant's.
        head: features -> logits, frozen.
        chunk: positions whose logits are held at a time; by default as many as make `LOGITS_AT_ONCE`.
    """
    out = FSPADDraftOutput(logit_features=logit_features, features=features)
    return step_losses([out], [mask], target_features, head, chunk)[0]


def step_losses(
    outputs: Sequence[FSPADDraftOutput],
    masks: Sequence[torch.BoolTensor],
    target_features: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    chunk: int | None = None,
    objective: Objective = PAPER,
) -> list[LossSums]:
    """[`fspad_loss`] of each step's outputs; a later step's mask keeps nothing that the first one's does not."""
    first = masks[0]
    regressed = [
        F.smooth_l1_loss(out.features[mask].float(), target_features[mask].float(), reduction="none").mean(-1).sum()
        for out, mask in zip(outputs, masks, strict=True)
    ]
    x = torch.stack([out.logit_features[first] for out in outputs], dim=1)  # [positions, steps, hidden]
    counted = torch.stack([mask[first] for mask in masks], dim=1)  # [positions, steps]
    logit, top1 = _ChunkedCrossEntropy.apply(x, target_features[first], counted, head, chunk, objective)
    return [LossSums(*sums) for sums in zip(regressed, logit, top1, counted.sum(0), strict=True)]


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
    objective: Objective = PAPER,
) -> LossSums:
    """
    The loss sums of a batch of rows. Position t reads (f_t + noise, e_{t+1}), and is held against f_{t+1}.

    With `objective.self_steps`, `feature` and `logit` are the weighted mean of the steps; `top1` and `positions` are
    the first step's. A later step's first positions in a document, which have nothing to feed on, count as zero.

    Args:
        embedding, head: the target's, frozen: ids -> embeddings, features -> logits.
        ids (`[rows, length]`), features (`[rows, length, hidden]`): the rows and the target's features of them.
        mask (`[rows, length]`): True on the assistant's tokens.
        noise: half-width of the uniform noise at length 512; rows of another length get it scaled by 512 / length,
            packed documents each by their own length.
        segments (`[rows, length]`): the document of each token, see [`pack`]; a document's draft sees no other's.
        seeds: of the noise, one a row; by default it comes from the global generator.
    """
    inputs = _draft_inputs(draft, embedding, ids, features, noise, segments, seeds)
    if segments is None:
        parts, at = None, torch.arange(ids.shape[1] - 1, device=ids.device)
    else:
        parts, at, mask = segments[:, :-1], inputs["position_ids"], mask & continues(segments)
    steps = range(objective.self_steps)
    outputs = self_fed_outputs(draft, inputs, len(steps), parts)
    masks = [mask[:, 1:] & (at >= step) for step in steps]
    sums = step_losses(outputs, masks, features[:, 1:], head, objective=objective)
    weighted = list(zip(objective.step_weights, sums, strict=True))
    feature, logit = (sum(weight * getattr(part, name) for weight, part in weighted) for name in ("feature", "logit"))
    return LossSums(feature, logit, sums[0].top1, sums[0].positions)


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
    return draft(**_draft_inputs(draft, embedding, ids, features, noise, segments, seeds))


def _draft_inputs(draft, embedding, ids, features, noise, segments, seeds) -> dict[str, torch.Tensor]:
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
    return {"inputs_embeds": inputs_embeds, "features": inputs, **packing}


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
    """
    sum CE(softmax(head(target)), head(x)) of each step, its gradient taken chunk by chunk so that few logits live at
    once. x `[positions, steps, hidden]`, target `[positions, hidden]`, counted `[positions, steps]`.
    """

    @staticmethod
    def forward(ctx, x, target, counted, head, chunk, objective):
        steps = x.shape[1]
        total, top1 = x.new_zeros(steps, dtype=torch.float32), x.new_zeros(steps, dtype=torch.long)
        gradient = torch.empty_like(x)
        if chunk is None and len(x):
            with torch.no_grad():
                chunk = max(LOGITS_AT_ONCE // head(target[:1]).shape[-1], 1)
        for start in range(0, len(x), chunk or 1):
            part = slice(start, start + chunk)
            best, wanted = _soft_targets(target[part], head, objective)
            for step in range(steps):
                here = counted[part, step].to(wanted.device)
                if step:
                    wanted *= here[:, None]  # what does not count at one step does not at a later one
                loss, hits, gradient[part, step] = _cross_entropy(x.detach()[part, step], wanted, best, here, head)
                total[step] += loss.to(total.device)
                top1[step] += hits.to(top1.device)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(top1)
        return total, top1

    @staticmethod
    def backward(ctx, grad_total, grad_top1):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total[:, None], None, None, None, None, None


@torch.no_grad()
def _soft_targets(target, head, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's first token `[positions]` and, `[positions, vocabulary]`, what weighs -log p: q, the top k more."""
    logits = head(target).float()
    q = logits.softmax(-1)
    if objective.top_k_weight:
        top = q.topk(min(objective.top_k, q.shape[-1]), dim=-1)
        q.scatter_add_(-1, top.indices, objective.top_k_weight * top.values)
    return logits.argmax(-1), q


def _cross_entropy(x, wanted, best, counted, head) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, agreements and the gradient of x; a function of its own, so that its logits die with it."""
    with torch.enable_grad():
        x = x.requires_grad_()
        logits = head(x).float()
        loss = F.cross_entropy(logits, wanted, reduction="sum")
    hits = ((logits.argmax(-1) == best) & counted).sum()
    return loss.detach(), hits, torch.autograd.grad(loss, x)[0]
