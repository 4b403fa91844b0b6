"""What captured rounds keep between calls: graphs that are still right, and nothing for longer than it is of use."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from fspad_hf import FSPADDraftModel
from fspad_hf.generation import workspace
from fspad_hf.generation.capturing import why_no_graphs
from fspad_hf.generation.target import Target
from fspad_hf.generation.workspace import IDLE_WORKSPACES, WorkspacePool

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
    assert before == 3  # draft, walk, keep
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
    assert generate(model, draft, prompt).tolist() == plain.tolist() and len(captured) == before + 3


def test_hooks_that_transformers_leaves_behind_do_no_harm(captured, prompt):
    model = tiny.build("llama")
    model(prompt, output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    draft = fresh_draft(model, cuda_graphs=True)
    plain = model.generate(prompt, max_new_tokens=30, eos_token_id=None, pad_token_id=0)
    assert generate(model, draft, prompt).tolist() == plain.tolist() and len(captured) == 3


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
    assert len(captured) == 12


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
        lambda model, draft: setattr(draft.config, "coupling_kappa", 0.3),
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
        assert generate(model, draft, prompt).tolist() == plain.tolist() and len(captured) == before + 3
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
    monkeypatch.setattr(workspace, "KINDS", 3)
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True)
    for number in range(6):
        generate(model, draft, prompt, do_sample=True, temperature=0.5 + number / 10)
    ((_, found),) = WorkspacePool.of(draft).idle
    assert len(captured) == 18 and [len(kept) for kept in found._graphs.values()] == [3, 3, 3]


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
    assert generate(model, draft, prompt).tolist() == plain.tolist() and "_fspad_graphs" not in vars(draft)


def test_workspaces_go_with_the_draft(captured, prompt, tmp_path):
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True)
    for length in range(4, 200, 28):
        ids = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(length))
        generate(model, draft, ids)
    pool = WorkspacePool.of(draft)
    assert len(pool.idle) == IDLE_WORKSPACES
    copied = copy.deepcopy(draft)
    assert not WorkspacePool.of(copied).idle and not pickle.loads(pickle.dumps(pool)).idle
    draft.save_pretrained(tmp_path)
    assert FSPADDraftModel.from_pretrained(tmp_path).speculation_config.cuda_graphs
    seen = [weakref.ref(one) for _, one in pool.idle] + [weakref.ref(one.arena) for _, one in pool.idle]
    del draft, pool
    captured.clear()
    gc.collect()
    assert all(one() is None for one in seen)


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
