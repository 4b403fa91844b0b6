import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fspad_hf.modeling_fspad import FSPADDraftOutput
from fspad_hf.training import targets
from fspad_hf.training.losses import Objective, draft_loss, step_losses
from fspad_hf.training.targets import TargetOutputs

from ..conftest import fresh_draft
from .runs import known


class Head:
    """A target of which there is nothing but the LM head."""

    def __init__(self, width=40, hidden=8):
        self.linear = nn.Linear(hidden, width, bias=False).requires_grad_(False)
        self.view = SimpleNamespace(text_config=SimpleNamespace(vocab_size=width))

    def logits(self, x, ids=None):
        return self.linear(x) if ids is None else F.linear(x, self.linear.weight[ids])

    def outputs(self, features, k=40):
        """What [`FrozenTarget`] makes of rows with these features (`[rows, length, hidden]`)."""
        top = self.linear(features).log_softmax(-1).topk(k, dim=-1)
        return TargetOutputs(features, top.indices, top.values)


def made(rows=2, length=6):
    """Outputs of a draft that learn, and the target's features and mask at the positions they are held against."""
    torch.manual_seed(0)
    out = FSPADDraftOutput(*(torch.randn(rows, length - 1, 8, requires_grad=True) for _ in range(2)))
    return out, torch.randn(rows, length, 8), torch.rand(rows, length - 1) > 0.4


def gradients(loss, out):
    return torch.autograd.grad(loss, [out.logit_features, out.features], allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("drafted", [None, torch.arange(3, 40, 3)])
def test_against_the_formula_and_its_gradient(drafted):
    """Over the whole vocabulary the paper's; over the drafted ids, softmax of those and p of the whole vocabulary."""
    (out, f, mask), head = made(), Head()
    (sums,) = step_losses([out], [mask], head.outputs(f), head, drafted, chunk=3)
    columns = torch.arange(40) if drafted is None else drafted
    regression = F.smooth_l1_loss(out.features, f[:, 1:], reduction="none").mean(-1)[mask].sum()
    p = head.linear(f[:, 1:]).softmax(-1)[..., columns]
    logits = head.linear(out.logit_features)[..., columns]
    alignment = -(p * logits.log_softmax(-1)).sum(-1)[mask].sum()
    torch.testing.assert_close((sums.feature, sums.logit), (regression, alignment))
    ours, theirs = (gradients(loss[0] + 0.1 * loss[1], out) for loss in
                    ((sums.feature, sums.logit), (regression, alignment)))  # fmt: skip
    torch.testing.assert_close(ours, theirs)
    assert int(sums.positions) == int(mask.sum())
    best = head.linear(f[:, 1:]).argmax(-1)
    assert int(sums.top1) == int((best == columns[logits.argmax(-1)])[mask].sum())


def test_the_targets_top_k_and_its_gradient():
    (out, f, mask), head = made(), Head()
    for weight, k in ((0.7, 6), (2.0, 1), (1.0, 400)):
        objective = Objective(top_k_weight=weight, top_k=k)
        (sums,) = step_losses([out], [mask], head.outputs(f), head, None, objective, 3)
        weighed = head.linear(f[:, 1:]).softmax(-1) * head.linear(out.logit_features).log_softmax(-1)
        top = head.linear(f[:, 1:]).topk(min(k, 40)).indices
        expected = -(weighed.sum(-1) + weight * weighed.gather(-1, top).sum(-1))[mask].sum()
        torch.testing.assert_close(sums.logit, expected)
        torch.testing.assert_close(gradients(sums.logit, out)[0], gradients(expected, out)[0])


def test_of_the_target_the_likeliest_tokens_count():
    (out, f, mask), head = made(), Head()
    (sums,) = step_losses([out], [mask], head.outputs(f, k=5), head)
    p = head.linear(f[:, 1:]).softmax(-1)
    p = torch.where(p >= p.topk(5).values[..., -1:], p, 0.0)
    torch.testing.assert_close(sums.logit, -(p * head.linear(out.logit_features).log_softmax(-1)).sum(-1)[mask].sum())


@pytest.mark.parametrize("steps", [1, 3])
def test_few_logits_live_at_once(steps, monkeypatch):
    """Of the masked positions alone, and of one chunk at most."""
    alive = peak = asked = 0
    head = Head()

    def dead(count):
        nonlocal alive
        alive -= count

    def logits(x, ids=None):
        nonlocal alive, peak, asked
        found = head.linear(x)
        weakref.finalize(found, dead, len(x))
        alive, asked = alive + len(x), asked + len(x)
        peak = max(peak, alive)
        return found

    outs = [FSPADDraftOutput(*(torch.randn(4, 16, 8, requires_grad=True) for _ in range(2))) for _ in range(steps)]
    mask = torch.arange(64).view(4, 16) % 2 == 0
    found = head.outputs(torch.randn(4, 17, 8))
    monkeypatch.setattr(head, "logits", logits)
    monkeypatch.setattr(targets, "LOGITS_AT_ONCE_CPU", 160)
    each = step_losses(outs, [mask] * steps, found, head, None, Objective(steps, 1.0, 0.5, 3))
    sum(sums.feature + sums.logit for sums in each).backward()
    assert asked == steps * 32 and peak == 4 and alive == 0


def test_the_shift(llama, prompt):
    """Position t reads (f_t, e_{t+1}), is held against f_{t+1}, and counts if token t+1 is the assistant's."""
    draft = fresh_draft(llama)
    mask = torch.zeros_like(prompt, dtype=torch.bool)
    mask[0, 4] = True
    frozen, found = known(llama, prompt, mask)
    features = llama.model(prompt).last_hidden_state.detach()
    with torch.no_grad():
        sums = draft_loss(draft, frozen, prompt, found, mask)
        out = draft(inputs_embeds=llama.get_input_embeddings()(prompt[:, 1:5]), features=features[:, :4])
    expected = F.smooth_l1_loss(out.features[0, 3], features[0, 4])
    torch.testing.assert_close(sums.feature, expected)
    assert int(sums.positions) == 1


def test_partial_alignment_keeps_the_two_goals_apart(llama, prompt):
    draft = fresh_draft(llama)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    frozen, found = known(llama, prompt, mask)
    sums = draft_loss(draft, frozen, prompt, found, mask)
    grad = torch.autograd.grad(sums.logit, draft.layer.mlp.down_proj.weight, retain_graph=True)[0]
    assert grad[:32].any() and not grad[32:].any()
    grad = torch.autograd.grad(sums.feature, draft.layer.mlp.down_proj.weight)[0]
    assert grad[32:].any() and not grad[:32].any()
