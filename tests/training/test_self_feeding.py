"""The draft on features of its own: as in drafting, as a plain loop says, and as an option of training."""

import pytest
import torch
import torch.nn.functional as F

from fspad_hf.generation.drafting import Drafter
from fspad_hf.generation.target import Target
from fspad_hf.generation.tree import TreeShape
from fspad_hf.training.arguments import FSPADTrainingArguments
from fspad_hf.training.losses import Objective, draft_loss, draft_outputs, step_losses
from fspad_hf.training.packing import segment_mask, segment_positions
from fspad_hf.training.self_feeding import self_fed_outputs

from ..conftest import fresh_draft, grown
from .runs import all_counted, known, logged, trained

STEPS = 4


class Chain(Drafter):
    """Grows the chain of `known` tokens, one a level, and keeps what the draft said at each."""

    def _children(self, logit_features, k, rows, depth):
        self.said.append(logit_features[0, 0])
        return torch.zeros(1, 1, 1), self.known[depth].view(1, 1, 1)


def drafted(draft, llama, ids, features, root):
    """o_logit of every level below the pair `root`, whose token is drawn from true features; a level each."""
    chain = Chain(draft, Target(llama))
    chain.said, chain.known = [], F.pad(ids[0, root + 2 :], (0, 1))  # what the last level draws is not read
    read = chain.accept(features[:, : root + 1], ids[:, 1 : root + 2])
    grown(chain, read, ids[:, root + 1 : root + 2], TreeShape(min(STEPS, ids.shape[1] - 1 - root), 1, STEPS))
    return chain.said


def attentive(llama, **overrides):
    """A fresh draft hardly attends to anything, and its two halves hardly differ."""
    draft = fresh_draft(llama, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for weight in (*draft.layer.self_attn.parameters(), draft.layer.mlp.down_proj.weight):
            torch.nn.init.normal_(weight, std=0.4)
    return draft


def streams(draft, llama, ids, features, segments=None, steps=STEPS):
    inputs = {"inputs_embeds": llama.get_input_embeddings()(ids[:, 1:]).detach(), "features": features[:, :-1]}
    parts = None
    if segments is not None:
        parts = segments[:, :-1]
        inputs["position_ids"] = segment_positions(segments)[:, :-1]
        inputs["attention_mask"] = segment_mask(parts, torch.float32)
    return self_fed_outputs(draft, inputs, steps, parts)


@pytest.fixture(scope="module")
def documents(llama):
    torch.manual_seed(0)
    found = [torch.randint(3, 64, (1, length)) for length in (11, 3, 8)]
    with torch.no_grad():
        return [(ids, llama.model(ids).last_hidden_state) for ids in found]


SHAPES = [{"feature_sampling": a, "partial_alignment": b} for a in (True, False) for b in (True, False)]
SHAPES += [{"num_key_value_heads": 2}]
CASES = [(shape, packed, "sdpa") for shape in SHAPES for packed in (False, True)]
CASES += [(SHAPES[0], True, "eager")]  # without segments step 1 leaves causality to sdpa


@pytest.mark.parametrize(("shape", "packed", "attention"), CASES, ids=str)
@torch.no_grad()
def test_every_step_is_that_of_drafting(llama, documents, shape, packed, attention):
    draft = attentive(llama, **shape)
    draft.set_attn_implementation(attention)
    used = documents if packed else documents[:1]
    ids, features = (torch.cat(parts, dim=1) for parts in zip(*used, strict=True))
    numbers = [n for n, (part, _) in enumerate(used, start=1) for _ in range(part.shape[1])]
    segments = torch.tensor([numbers])
    if packed:  # and padding
        ids, segments = F.pad(ids, (0, 2)), F.pad(segments, (0, 2))
        features = F.pad(features, (0, 0, 0, 2))
    outputs = streams(draft, llama, ids, features, segments if packed else None)
    compared, start = 0, 0
    for part, truth in used:
        length = part.shape[1]
        for root in range(length - 1):
            for step, said in enumerate(drafted(draft, llama, part, truth, root)):
                torch.testing.assert_close(outputs[step].logit_features[0, start + root + step], said)
                compared += 1
        start += length
    assert compared > (50 if packed else 30)


@torch.no_grad()
def test_a_true_feature_further_on_would_show(llama, documents):
    """The comparison above can fail: with true features in place of its own, or seen too far, the draft says else."""
    draft = attentive(llama)
    ids, features = documents[0]
    first, second, *_ = (out.logit_features for out in streams(draft, llama, ids, features))
    assert (first[:, 1:] - second[:, 1:]).abs().mean() > 0.05


def naive_loss(draft, llama, ids, features, counted, objective):
    """Each position's chain by itself, its rows one behind the other in one causal forward."""
    embeds, totals = llama.get_input_embeddings()(ids[:, 1:]).detach(), {"feature": 0.0, "logit": 0.0}
    for root in range(ids.shape[1] - 1):
        rows = features[:, : root + 1]
        for step, weight in enumerate(objective.step_weights):
            at = root + step
            if at >= ids.shape[1] - 1:
                break
            out = draft(inputs_embeds=embeds[:, : at + 1], features=rows)
            rows = torch.cat((rows, out.features[:, -1:].detach()), dim=1)
            if counted[0, at + 1]:
                q = llama.lm_head(features[0, at + 1]).softmax(-1)
                log_p = llama.lm_head(out.logit_features[0, -1]).log_softmax(-1)
                top = q.topk(objective.top_k).indices
                logit = -(q * log_p).sum() - objective.top_k_weight * (q * log_p)[top].sum()
                regression = F.smooth_l1_loss(out.features[0, -1], features[0, at + 1])
                totals["feature"] = totals["feature"] + weight * regression
                totals["logit"] = totals["logit"] + weight * logit
    return totals


@pytest.mark.parametrize(
    "objective", [Objective(3, 0.5), Objective(2, 1.0, 0.7, 5), Objective(1, 1.0, 2.0, 3)], ids=str
)
def test_loss_and_gradient_against_a_plain_loop(llama, documents, objective):
    draft = attentive(llama)
    used = documents[:2]
    ids = torch.cat([part for part, _ in used], dim=1)
    segments = torch.tensor([[1] * used[0][0].shape[1] + [2] * used[1][0].shape[1]])
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[:, 1:3] = True  # positions where later steps have nothing to feed on
    frozen, found = known(llama, ids, mask, segments)
    sums = draft_loss(draft, frozen, ids, found, mask, segments, objective=objective)
    ours = torch.autograd.grad(sums.feature + 0.1 * sums.logit, list(draft.parameters()))
    parts = [
        naive_loss(draft, llama, a, f, m, objective) for (a, f), m in zip(used, mask.split([11, 3], 1), strict=True)
    ]
    feature, logit = (sum(part[name] for part in parts) for name in ("feature", "logit"))
    torch.testing.assert_close((sums.feature, sums.logit), (feature, logit))
    theirs = torch.autograd.grad(feature + 0.1 * logit, list(draft.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_partial_alignment_holds_at_every_step(llama, documents):
    """The fed feature is a constant, so that no later step's token loss trains the half that regresses features."""
    draft, (ids, features) = attentive(llama), documents[0]
    outputs = streams(draft, llama, ids, features)
    for step in range(STEPS):
        of = outputs[step].logit_features[:, -1].sum()
        grad = torch.autograd.grad(of, draft.layer.mlp.down_proj.weight, retain_graph=True)[0]
        assert grad[:32].any() and not grad[32:].any()
    grad = torch.autograd.grad(outputs[-1].features[:, -1].sum(), draft.layer.self_attn.k_proj.weight)[0]
    assert grad.any()  # the keys of earlier steps learn


def test_without_the_options_nothing_changes(llama, documents):
    ids, _ = documents[0]
    mask, results = torch.ones_like(ids, dtype=torch.bool), []
    frozen, found = known(llama, ids, mask)
    for objective in (Objective(), Objective(self_steps=1, self_step_decay=0.3, top_k=1), None):
        draft = fresh_draft(llama)
        if objective:
            sums = draft_loss(draft, frozen, ids, found, mask, objective=objective)
        else:
            out = draft_outputs(draft, frozen, ids, found.features)
            (sums,) = step_losses([out], [mask[:, 1:]], found, frozen)
        (sums.feature + 0.1 * sums.logit).backward()
        results.append([*vars(sums).values(), *(p.grad for p in draft.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_noise_is_for_true_features_alone(llama, documents, monkeypatch):
    draft, (ids, features) = fresh_draft(llama), documents[0]
    seen, real = [], draft.forward
    made = []

    def forward(**kwargs):
        seen.append(kwargs["features"])
        made.append(real(**kwargs))
        return made[-1]

    monkeypatch.setattr(draft, "forward", forward)
    mask = torch.ones_like(ids, dtype=torch.bool)
    frozen, found = known(llama, ids, mask)
    draft_loss(draft, frozen, ids, found, mask, noise=0.1, objective=Objective(self_steps=3))
    assert not torch.equal(seen[0], features[:, :-1])
    for own, before in zip(seen[1:], made, strict=False):
        assert torch.equal(own[:, 1:], before.features[:, :-1]) and not own.requires_grad


# in the trainer


@pytest.fixture(scope="module")
def rows(llama):
    torch.manual_seed(0)
    return llama.generate(torch.randint(3, 64, (12, 4)), do_sample=True, max_new_tokens=28, eos_token_id=None)


def run(llama, rows, path, draft=None, **kwargs):
    draft = draft or fresh_draft(llama)
    return draft, logged(trained(draft, llama, all_counted(rows), path, **kwargs))


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_it_trains_the_later_steps(llama, rows, tmp_path):
    mask = torch.ones(rows.shape[0], rows.shape[1], dtype=torch.bool)
    frozen, found = known(llama, rows, mask)
    mask = mask[:, 1:].clone()
    mask[:, 0] = False

    def second_step(draft):
        with torch.no_grad():
            out = streams(draft.eval(), llama, rows, found.features, steps=2)[1]
            return float(step_losses([out], [mask], found, frozen)[0].logit)

    fed, _ = run(llama, rows, tmp_path / "fed", max_steps=80, self_steps=2)
    plain, _ = run(llama, rows, tmp_path / "plain", max_steps=80)
    assert second_step(fed) < second_step(plain) < second_step(fresh_draft(llama))


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_micro_batches_and_precision(llama, rows, tmp_path):
    options = {"self_steps": 3, "self_step_decay": 0.8, "top_k_weight": 0.5, "top_k": 4}
    whole, *others = [run(llama, rows, tmp_path / str(m), micro_rows=m, **options) for m in (4, 1, 2)]
    for draft, _ in others:
        for a, b in zip(whole[0].parameters(), draft.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    rounded = run(llama, rows, tmp_path / "bf16", bf16=True, **options)[1]
    assert [r["loss"] for r in rounded] == pytest.approx([r["loss"] for r in whole[1]], rel=0.02)
    draft = fresh_draft(llama)
    torch.nn.init.constant_(draft.layer.mlp.down_proj.weight, float("inf"))
    with pytest.raises(FloatingPointError, match="largest gradient is nan at step 1"):
        run(llama, rows, tmp_path / "nan", draft, **options)


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_refusals(llama, rows, tmp_path):
    run(llama, rows, tmp_path, self_steps=2)
    for options, said in {
        (("self_steps", 3),): "self_steps 2 -> 3",
        (("self_steps", 2), ("self_step_decay", 0.5)): "self_step_decay 1.0 -> 0.5",
        (("self_steps", 2), ("top_k_weight", 1)): "top_k_weight 0.0 -> 1",
        (("self_steps", 2), ("top_k", 5)): "top_k 10 -> 5",
    }.items():
        with pytest.raises(ValueError, match=f"other settings .{said}"):
            run(llama, rows, tmp_path, resume=True, **dict(options))
    with pytest.raises(ValueError, match="self_steps=32, but the rows have 32 tokens"):
        run(llama, rows, tmp_path / "x", self_steps=32)
    for name, value, said in (
        ("self_steps", 0, "expected 1 or more"),
        ("self_step_decay", 0, "expected more than 0"),
        ("self_step_decay", 1.1, "expected more than 0, at most 1"),
        ("top_k_weight", -1, "expected 0 or more"),
        ("top_k", 0, "expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=f"{name}=.*{said}"):
            FSPADTrainingArguments("x", **{name: value})
