import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fspad_hf.modeling_fspad import FSPADDraftOutput
from fspad_hf.training import losses
from fspad_hf.training.losses import Objective, SampledHead, draft_loss, fspad_loss, step_losses

from ..conftest import fresh_draft


def test_against_the_formula_and_its_gradient():
    torch.manual_seed(0)
    head = nn.Linear(8, 40, bias=False).requires_grad_(False)
    logit_features, features = (torch.randn(2, 5, 8, requires_grad=True) for _ in range(2))
    target, mask = torch.randn(2, 5, 8), torch.rand(2, 5) > 0.4
    sums = fspad_loss(logit_features, features, target, mask, head, chunk=3)
    (sums.feature + 0.1 * sums.logit).backward()
    ours = logit_features.grad.clone(), features.grad.clone()
    logit_features.grad = features.grad = None
    regression = F.smooth_l1_loss(features, target, reduction="none").mean(-1)[mask].sum()
    alignment = -(head(target).softmax(-1) * head(logit_features).log_softmax(-1)).sum(-1)[mask].sum()
    (regression + 0.1 * alignment).backward()
    torch.testing.assert_close(sums.feature, regression)
    torch.testing.assert_close(sums.logit, alignment)
    torch.testing.assert_close(ours, (logit_features.grad, features.grad))
    assert int(sums.positions) == int(mask.sum())
    assert int(sums.top1) == int((head(target).argmax(-1) == head(logit_features).argmax(-1))[mask].sum())


def test_the_targets_top_k_and_its_gradient():
    torch.manual_seed(0)
    head = nn.Linear(8, 40, bias=False).requires_grad_(False)
    x, target, mask = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8), torch.rand(2, 5) > 0.4
    out = FSPADDraftOutput(logit_features=x, features=x)
    for weight, k in ((0.7, 6), (2.0, 1), (1.0, 400)):
        (sums,) = step_losses([out], [mask], target, head, 3, Objective(top_k_weight=weight, top_k=k))
        weighed = head(target).softmax(-1) * head(x).log_softmax(-1)
        top = head(target).topk(min(k, 40)).indices
        expected = -(weighed.sum(-1) + weight * weighed.gather(-1, top).sum(-1))[mask].sum()
        torch.testing.assert_close(sums.logit, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (sums.logit, expected)))


@pytest.mark.parametrize("steps", [1, 3])
def test_few_logits_live_at_once(steps):
    """Of the masked positions alone, and of one chunk at most; the target's once for all steps."""
    alive = peak = asked = 0
    linear = nn.Linear(8, 40, bias=False).requires_grad_(False)

    def dead(count):
        nonlocal alive
        alive -= count

    def head(x):
        nonlocal alive, peak, asked
        logits = linear(x)
        weakref.finalize(logits, dead, len(x))
        alive, asked = alive + len(x), asked + len(x)
        peak = max(peak, alive)
        return logits

    outs = [FSPADDraftOutput(*(torch.randn(4, 16, 8, requires_grad=True) for _ in range(2))) for _ in range(steps)]
    mask = torch.arange(64).view(4, 16) % 2 == 0
    losses = step_losses(outs, [mask] * steps, torch.randn(4, 16, 8), head, 4, Objective(steps, 1.0, 0.5, 3))
    sum(sums.feature + sums.logit for sums in losses).backward()
    assert asked == (1 + steps) * 32 and peak == 4 and alive == 0


def test_sampled_head_estimates_the_full_partition_function():
    torch.manual_seed(0)
    head, x = nn.Linear(8, 500, bias=False), torch.randn(3, 8)
    frequent = torch.arange(50)
    estimates = torch.stack([
        SampledHead(head, frequent, 100, torch.Generator().manual_seed(i))(x).exp().sum(-1) for i in range(400)
    ])  # fmt: skip
    exact = head(x).exp().sum(-1)
    torch.testing.assert_close(estimates.mean(0), exact, rtol=0.02, atol=0)
    full = SampledHead(head, frequent, 450, torch.Generator())(x)
    torch.testing.assert_close(full.logsumexp(-1), exact.log())
    with pytest.raises(ValueError, match=r"plain nn\.Linear"):
        SampledHead(nn.Identity(), frequent, 1, torch.Generator())


def test_the_shift(llama, prompt):
    """Position t reads (f_t, e_{t+1}), is held against f_{t+1}, and counts if token t+1 is the assistant's."""
    draft = fresh_draft(llama)
    with torch.no_grad():
        features = llama.model(prompt).last_hidden_state
        mask = torch.zeros_like(prompt, dtype=torch.bool)
        mask[0, 4] = True
        sums = draft_loss(draft, llama.get_input_embeddings(), llama.lm_head, prompt, features, mask)
        out = draft(inputs_embeds=llama.get_input_embeddings()(prompt[:, 1:5]), features=features[:, :4])
    expected = F.smooth_l1_loss(out.features[0, 3], features[0, 4])
    torch.testing.assert_close(sums.feature, expected)
    assert int(sums.positions) == 1


def test_partial_alignment_keeps_the_two_goals_apart(llama, prompt):
    draft = fresh_draft(llama)
    features = llama.model(prompt).last_hidden_state.detach()
    mask = torch.ones_like(prompt, dtype=torch.bool)
    sums = draft_loss(draft, llama.get_input_embeddings(), llama.lm_head, prompt, features, mask)
    grad = torch.autograd.grad(sums.logit, draft.layer.mlp.down_proj.weight, retain_graph=True)[0]
    assert grad[:32].any() and not grad[32:].any()
    grad = torch.autograd.grad(sums.feature, draft.layer.mlp.down_proj.weight)[0]
    assert grad[32:].any() and not grad[:32].any()


def test_few_logits_of_a_large_vocabulary_are_held_at_once(monkeypatch):
    """However many positions there are; and what they add up to is the same."""
    generator, seen = torch.Generator().manual_seed(0), []
    x, features, target = (torch.randn(2, 9, 8, generator=generator) for _ in range(3))
    weight, mask = torch.randn(50, 8, generator=generator), torch.ones(2, 9, dtype=torch.bool)

    def head(rows):
        seen.append(len(rows))
        return rows @ weight.T

    whole = fspad_loss(x.clone().requires_grad_(), features, target, mask, head)
    assert max(seen) == 18
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 200)
    seen.clear()
    parts = fspad_loss(x.clone().requires_grad_(), features, target, mask, head)
    assert max(seen) == 4
    torch.testing.assert_close(parts.logit, whole.logit)
