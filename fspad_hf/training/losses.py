"""The training objective (arXiv 2408.15562, section 3.2): regress the feature, align the logits.

    loss = feature_weight * SmoothL1(o_feature, f) + logit_weight * CE(softmax(head(f)), head(o_logit))

SmoothL1 is averaged over h; both terms are summed over the masked positions, so that a caller can divide by their
number across a whole optimiser step. The head is the target's and frozen. Of softmax(head(f)) the likeliest tokens are
taken (see [`FrozenTarget`]), and of these the ones that the draft drafts; softmax(head(o_logit)) is over those it
drafts. [`Objective`] adds what is not in the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..modeling_fspad import FSPADDraftOutput
from .packing import continues, segment_mask, segment_positions
from .self_feeding import self_fed_outputs
from .targets import FrozenTarget, TargetOutputs, positions_at_once


@dataclass(frozen=True)
class Objective:
    """
    What goes beyond the paper; by default nothing.

    Args:
        self_steps: how often the draft is run, after the first time on features of its own, see [`self_fed_outputs`].
        self_step_decay: step j weighs decay^(j-1) in the mean of the steps' losses.
        top_k_weight, top_k: `top_k_weight` times -sum p log q over the target's `top_k` likeliest tokens is added to
            the logit part, p and q the target's and the draft's softmax (HASS, arXiv 2408.15766, section 3.1).
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


def draft_loss(
    draft: nn.Module,
    target: FrozenTarget,
    ids: torch.LongTensor,
    known: TargetOutputs,
    mask: torch.BoolTensor,
    segments: torch.LongTensor | None = None,
    drafted: torch.LongTensor | None = None,
    noise: float = 0.0,
    seeds: Sequence[int] | None = None,
    objective: Objective = PAPER,
) -> LossSums:
    """
    The loss sums of a batch of rows. Position t reads (f_t + noise, e_{t+1}), and is held against f_{t+1} and the
    target's likeliest tokens there.

    With `objective.self_steps`, `feature` and `logit` are the weighted mean of the steps; `top1` and `positions` are
    the first step's. A later step's first positions in a document, which have nothing to feed on, count as zero.

    Args:
        target: gives embeddings, and the logits of the draft's outputs.
        ids (`[rows, length]`), known: the rows, and what the target makes of them.
        mask (`[rows, length]`): True on the assistant's tokens.
        segments (`[rows, length]`): the document of each token, see [`pack`]; a document's draft sees no other's.
        drafted (`[draft_vocab_size]`): the ids that the draft's softmax is over; `None` is the whole vocabulary.
        noise: half-width of the uniform noise at length 512; rows of another length get it scaled by 512 / length,
            packed documents each by their own length.
        seeds: of the noise, one a row; by default it comes from the global generator.
    """
    inputs = _draft_inputs(draft, target, ids, known.features, noise, segments, seeds)
    if segments is None:
        parts, at = None, torch.arange(ids.shape[1] - 1, device=ids.device)
    else:
        parts, at, mask = segments[:, :-1], inputs["position_ids"], mask & continues(segments)
    steps = range(objective.self_steps)
    outputs = self_fed_outputs(draft, inputs, len(steps), parts)
    masks = [mask[:, 1:] & (at >= step) for step in steps]
    sums = step_losses(outputs, masks, known, target, drafted, objective)
    weighted = list(zip(objective.step_weights, sums, strict=True))
    feature, logit = (sum(weight * getattr(part, name) for weight, part in weighted) for name in ("feature", "logit"))
    return LossSums(feature, logit, sums[0].top1, sums[0].positions)


def step_losses(
    outputs: Sequence[FSPADDraftOutput],
    masks: Sequence[torch.BoolTensor],
    known: TargetOutputs,
    target: FrozenTarget,
    drafted: torch.LongTensor | None = None,
    objective: Objective = PAPER,
    chunk: int | None = None,
) -> list[LossSums]:
    """
    The loss sums of each step.

    Args:
        outputs (`[rows, length - 1, hidden]`): at positions t.
        masks (`[rows, length - 1]`): True where token t+1 is the assistant's; a later step's keeps nothing that the
            first one's does not.
        known: the target's, at positions 0 ... length - 1.
        chunk: positions whose logits are held at a time; by default [`positions_at_once`].
    """
    first = masks[0]
    f, p = known.features[:, 1:], known.top_log_probs[:, 1:][first].float().exp()
    regressed = [
        F.smooth_l1_loss(out.features[mask].float(), f[mask].float(), reduction="none").mean(-1).sum()
        for out, mask in zip(outputs, masks, strict=True)
    ]
    if objective.top_k_weight:
        p[:, : objective.top_k] *= 1 + objective.top_k_weight
    columns = known.top_ids[:, 1:][first].long()
    if drafted is not None:
        columns = places_of(columns, drafted, target.view.text_config.vocab_size)
        p = p * (columns >= 0)
    x = torch.stack([out.logit_features[first] for out in outputs], dim=1)  # [positions, steps, hidden]
    counted = torch.stack([mask[first] for mask in masks], dim=1)  # [positions, steps]
    width = target.view.text_config.vocab_size if drafted is None else len(drafted)
    chunk = chunk or positions_at_once(x.device, width)
    logit, top1 = _ChunkedCrossEntropy.apply(x, columns, p, counted, lambda x: target.logits(x, drafted), chunk)
    return [LossSums(*sums) for sums in zip(regressed, logit, top1, counted.sum(0), strict=True)]


def places_of(tokens: torch.LongTensor, drafted: torch.LongTensor, vocab_size: int) -> torch.LongTensor:
    """The place of each token among the drafted ids; -1 where it is none of them."""
    places = torch.full((vocab_size,), -1, device=tokens.device)
    places[drafted.to(tokens.device)] = torch.arange(len(drafted), device=tokens.device)
    return places[tokens]


def draft_outputs(
    draft: nn.Module,
    target: FrozenTarget,
    ids: torch.LongTensor,
    features: torch.Tensor,
    segments: torch.LongTensor | None = None,
) -> FSPADDraftOutput:
    """The draft's outputs `[rows, length - 1, hidden]` at positions t, from true features; as [`draft_loss`]."""
    return draft(**_draft_inputs(draft, target, ids, features, 0.0, segments, None))


def _draft_inputs(draft, target, ids, features, noise, segments, seeds) -> dict[str, torch.Tensor]:
    dtype = next(draft.parameters()).dtype
    inputs, packing = features[:, :-1].to(dtype), {}
    if segments is not None:
        packing["position_ids"] = segment_positions(segments)[:, :-1]
        packing["attention_mask"] = segment_mask(segments[:, :-1], dtype)
    if noise:
        drawn = torch.rand_like(inputs) if seeds is None else _seeded_rows(inputs, seeds)
        inputs = inputs + (drawn * 2 - 1) * (noise * 512 / _document_lengths(ids, segments))
    with torch.no_grad():
        inputs_embeds = target.embed(ids[:, 1:]).to(dtype)
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
    -sum p log softmax(head(x)) of each step, its gradient taken chunk by chunk so that few logits live at once; and
    how often the first column is the likeliest one.

    x `[positions, steps, hidden]`, columns and p `[positions, k]` (a column of -1 has p = 0), counted
    `[positions, steps]`.
    """

    @staticmethod
    def forward(ctx, x, columns, p, counted, head, chunk):
        steps = x.shape[1]
        total, top1 = x.new_zeros(steps, dtype=torch.float32), x.new_zeros(steps, dtype=torch.long)
        gradient = torch.empty_like(x)
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            for step in range(steps):
                # what does not count at one step does not at a later one
                wanted = p[part] * counted[part, step, None]
                loss, hits, gradient[part, step] = _cross_entropy(x.detach()[part, step], columns[part], wanted, head)
                total[step] += loss.to(total.device)
                top1[step] += (hits & counted[part, step]).sum()
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(top1)
        return total, top1

    @staticmethod
    def backward(ctx, grad_total, grad_top1):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total[:, None], None, None, None, None, None


def _cross_entropy(x, columns, p, head) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, hits and the gradient of x; a function of its own, so that its logits die with it."""
    with torch.enable_grad():
        x = x.requires_grad_()
        logits = head(x)
    values = logits.detach().to(torch.float32, copy=True)  # worked on in place: memory for more costs a CPU time
    columns, p = columns.to(values.device), p.to(values.device)
    places, peak = columns.clamp(min=0), values.amax(-1, keepdim=True)
    chosen = values.gather(1, places)
    hits = ((chosen[:, 0] == peak[:, 0]) & (columns[:, 0] >= 0)).to(x.device)
    total = values.sub_(peak).exp_().sum(-1, keepdim=True)
    loss = (p * (total.log() + peak - chosen)).sum()
    slope = values.mul_(p.sum(-1, keepdim=True) / total).scatter_add_(1, places, -p)  # of the logits
    return loss, hits, torch.autograd.grad(logits, x, slope.to(logits.dtype))[0]
