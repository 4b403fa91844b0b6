"""What captured rounds keep between calls: graphs that are still right, and nothing for longer than it is of use."""

import copy
import gc
import weakref

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from fspad_hf import FSPADDraftModel
from fspad_hf.generation import graphs
from fspad_hf.generation.graphs import IDLE_WORKSPACES, GraphPool, free_graphs, why_no_graphs
from fspad_hf.generation.target import Target

from .. import tiny
from ..conftest import fresh_draft


@pytest.fixture
def prompt():
    return torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(1))


def generate(model, draft, prompt, **kwargs):
    return model.generate(
        prompt, assistant_model=draft, max_new_tokens=30, eos_token_id=None, pad_token_id=0, **kwargs
    )


def test_a_second_call_captures_nothing_and_follows_changed_weights(captured, prompt):
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True, draft_vocab_size=40)
    generate(model, draft, prompt)
    before = len(captured)
    assert before == 2  # draft, verify
    for change in (
        lambda: None,
        lambda: model.lm_head.weight.mul_(-1),
        lambda: model.model.layers[0].mlp.up_proj.weight.zero_(),
    ):
        with torch.no_grad():
            change()
        plain = model.generate(prompt, max_new_tokens=30, eos_token_id=None, pad_token_id=0)
        assert generate(model, draft, prompt).tolist() == plain.tolist() and len(captured) == before
    other = tiny.build("llama", seed=1).model.layers[1]
    model.model.layers[1] = other  # other addresses: the graphs are another pair's
    plain = model.generate(prompt, max_new_tokens=30, eos_token_id=None, pad_token_id=0)
    assert generate(model, draft, prompt).tolist() == plain.tolist() and len(captured) == before + 2


def test_hooks_that_transformers_leaves_behind_do_no_harm(captured, prompt):
    model = tiny.build("llama")
    model(prompt, output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    draft = fresh_draft(model, cuda_graphs=True)
    plain = model.generate(prompt, max_new_tokens=30, eos_token_id=None, pad_token_id=0)
    assert generate(model, draft, prompt).tolist() == plain.tolist() and len(captured) == 2


def test_other_settings_are_other_graphs(captured, prompt):
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True)
    for settings in (
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.3},
        {"do_sample": True, "top_k": 3},
    ):
        for _ in range(2):
            torch.manual_seed(4)
            plain = model.generate(prompt, max_new_tokens=30, eos_token_id=None, pad_token_id=0, **settings)
            torch.manual_seed(4)
            assert generate(model, draft, prompt, **settings).tolist() == plain.tolist()
    assert len(captured) == 8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.model.layers[0].register_forward_hook(lambda *_: None), "hooks are on the target"),
        (lambda model: setattr(model.lm_head, "forward", model.lm_head.forward), "a forward of its own"),
        (lambda model: setattr(model.model, "norm", Stranger()), "modules of tests"),
        (lambda model: model.double(), "another dtype"),
    ],
    ids=["hook", "forward", "stranger", "dtype"],
)
def test_a_target_that_is_not_captured(captured, prompt, change, reason):
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True)
    change(model)
    target = Target(model)
    assert reason in why_no_graphs(target, draft, model.dtype)
    plain = model.generate(prompt, max_new_tokens=30, eos_token_id=None, pad_token_id=0)
    assert generate(model, draft, prompt).tolist() == plain.tolist() and not captured


@pytest.mark.parametrize(
    "change",
    [
        lambda model, draft: [setattr(layer.self_attn, "scaling", 0.01) for layer in model.model.layers],
        lambda model, draft: torch.set_float32_matmul_precision("high"),
        lambda model, draft: setattr(draft.config, "rms_norm_eps", 0.3),
        lambda model, draft: setattr(model.config, "rms_norm_eps", 0.5),
    ],
    ids=["attribute", "precision", "draft", "config"],
)
def test_what_a_graph_has_frozen_is_not_replayed_when_it_has_changed(captured, prompt, change, monkeypatch):
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True)
    generate(model, draft, prompt)
    before, precision = len(captured), torch.get_float32_matmul_precision()
    change(model, draft)
    try:
        plain = model.generate(prompt, max_new_tokens=30, eos_token_id=None, pad_token_id=0)
        assert generate(model, draft, prompt).tolist() == plain.tolist() and len(captured) == before + 2
    finally:
        torch.set_float32_matmul_precision(precision)


def test_models_that_share_weights(captured, prompt):
    model = tiny.build("gemma2", "eager")
    other = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    other.config.final_logit_softcapping = 0.5
    draft = fresh_draft(model, cuda_graphs=True)
    for one in (model, other):
        torch.manual_seed(0)
        plain = one.generate(prompt, max_new_tokens=30, eos_token_id=None, pad_token_id=0, do_sample=True)
        torch.manual_seed(0)
        assert generate(one, draft, prompt, do_sample=True).tolist() == plain.tolist()


def test_under_inference_mode_and_not(captured, prompt):
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True)
    plain = model.generate(prompt, max_new_tokens=30, eos_token_id=None, pad_token_id=0)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert generate(model, draft, prompt).tolist() == plain.tolist()


def test_graphs_of_many_settings_are_bounded(captured, prompt, monkeypatch):
    monkeypatch.setattr(graphs, "KINDS", 3)
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True)
    for number in range(6):
        generate(model, draft, prompt, do_sample=True, temperature=0.5 + number / 10)
    (found,) = GraphPool.of(draft).idle
    assert len(captured) == 12 and [len(bucket.graphs) for bucket in found.buckets.values()] == [3]


def test_an_earlier_text_with_nan_does_no_harm(captured, prompt):
    model = tiny.build("llama")
    settings = {"max_new_tokens": 90, "eos_token_id": None, "pad_token_id": 0}
    ids = prompt.clamp(max=59)
    plain = model.generate(ids, **settings)
    never = min({60, 61, 62, 63} - set(plain[0].tolist()))
    with torch.no_grad():
        model.model.embed_tokens.weight[never] = float("nan")
    draft = fresh_draft(model, cuda_graphs=True, draft_vocab_size=60)
    poisoned = torch.full((1, 100), 5)
    poisoned[0, 90] = never
    generate(model, draft, poisoned)  # leaves a large workspace full of NaN
    assert model.generate(ids, assistant_model=draft, **settings).tolist() == plain.tolist()


class Stranger(torch.nn.Module):
    def forward(self, hidden_states):
        return hidden_states


def test_on_a_cpu_there_are_no_graphs(prompt):
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True)
    plain = model.generate(prompt, max_new_tokens=30, eos_token_id=None, pad_token_id=0)
    assert generate(model, draft, prompt).tolist() == plain.tolist() and not GraphPool.of(draft).idle


def test_workspaces_go_with_the_draft(captured, prompt, tmp_path):
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True)
    for length in range(4, 200, 28):
        ids = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(length))
        generate(model, draft, ids)
    pool = GraphPool.of(draft)
    assert len(pool.idle) == 1 and not GraphPool.of(copy.deepcopy(draft)).idle
    draft.save_pretrained(tmp_path)
    assert FSPADDraftModel.from_pretrained(tmp_path).speculation_config.cuda_graphs
    buckets = list(pool.idle[0].buckets.values())
    seen = [weakref.ref(one) for one in (*buckets, *(bucket.arena for bucket in buckets))]
    del buckets
    del draft, pool
    captured.clear()
    gc.collect()
    assert all(one() is None for one in seen)


def test_three_buckets_are_captured_once(captured):
    """Also where one call crosses all of them, and the next one does again."""
    model, made = tiny.build("llama"), []
    draft = fresh_draft(model, cuda_graphs=True)
    ids = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        before = len(captured)
        out = model.generate(ids, assistant_model=draft, max_new_tokens=220, eos_token_id=None, pad_token_id=0)
        made.append(len(captured) - before)
    assert out.shape == (1, 240) and made == [6, 0, 0]
    assert sorted(GraphPool.of(draft).idle[0].buckets) == [128, 256, 512]
    free_graphs(draft)
    gone = weakref.ref(draft)
    assert not GraphPool.of(draft).idle
    generate(model, draft, ids)
    assert len(captured) == 8
    del draft
    gc.collect()
    assert gone() is None


def test_within_a_bucket_nothing_is_captured_again(captured, prompt, monkeypatch):
    monkeypatch.setattr(graphs, "SMALLEST_BUCKET", 512)
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True)
    out = model.generate(prompt, assistant_model=draft, max_new_tokens=240, eos_token_id=None, pad_token_id=0)
    assert out.shape == (1, 249) and len(captured) == 2


def test_workspaces_of_several_targets_are_bounded(captured, prompt):
    models = [tiny.build("llama") for _ in range(IDLE_WORKSPACES + 1)]
    draft = fresh_draft(models[0], cuda_graphs=True)
    for model in models:
        generate(model, draft, prompt)
    assert [one.owner() for one in GraphPool.of(draft).idle] == models[1:]


def test_no_capture_beside_another_call_where_it_breaks_draws(captured, prompt, monkeypatch):
    """torch below 2.13."""
    model = tiny.build("llama")
    draft, plain = fresh_draft(model, cuda_graphs=True), model.generate(prompt, max_new_tokens=30, eos_token_id=None)
    for breaks, made in ((True, 0), (False, 2)):
        monkeypatch.setattr(graphs, "BREAKS_DRAWS", breaks)
        with graphs.counted_call():
            assert generate(model, draft, prompt).tolist() == plain.tolist()
        assert len(captured) == made


def test_workspaces_do_not_keep_a_target(captured, prompt):
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True)
    generate(model, draft, prompt)
    gone = weakref.ref(model)
    del model
    captured.clear()
    gc.collect()
    assert gone() is None


def test_a_call_within_a_call_has_a_workspace_of_its_own(captured, prompt):
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True)
    plain = model.generate(prompt, max_new_tokens=30, eos_token_id=None, pad_token_id=0)
    inner = []

    class Nested(BaseStreamer):
        def put(self, value):
            if len(inner) < 4:
                inner.append(None)
                inner[-1] = generate(model, draft, prompt).tolist()

        def end(self):
            pass

    assert generate(model, draft, prompt, streamer=Nested()).tolist() == plain.tolist()
    assert len(inner) == 4 and all(one == plain.tolist() for one in inner)
