"""Defects that an adversarial run has found, by their reproductions."""

import gc
import pickle
import threading
import weakref

import pytest
import torch
import transformers

from fspad_hf import FSPADDraftModel
from fspad_hf.generation import cache, drafting
from fspad_hf.generation import probe as probe_module
from fspad_hf.generation.probe import probe

from .. import tiny
from ..conftest import fresh_draft

KWARGS = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model():
    return tiny.build("llama")


@pytest.fixture
def draft(model):
    return fresh_draft(model)


def speculated(model, ids, draft, **kwargs):
    out = model.generate(ids, assistant_model=draft, return_dict_in_generate=True, **{**KWARGS, **kwargs})
    return out.speculation is not None


def test_a_loop_overridden_on_the_instance_is_not_stood_in_for(model, draft, prompt):
    original = model._update_model_kwargs_for_generation

    def shifted(outputs, kwargs, **rest):
        kwargs = original(outputs, kwargs, **rest)
        kwargs["position_ids"][..., -1] += 3 * (kwargs["position_ids"].shape[-1] >= 16)
        return kwargs

    for before in (False, True):  # whether or not the model has been probed
        if before:
            del model._update_model_kwargs_for_generation
            assert speculated(model, prompt, draft)
        model._update_model_kwargs_for_generation = shifted
        plain = model.generate(prompt, **KWARGS)
        assert model.generate(prompt, assistant_model=draft, **KWARGS).equal(plain)
        assert not speculated(model, prompt, draft)


@pytest.mark.parametrize("first", ["base", "prompt tuning"])
def test_prompt_tuning_and_its_base_model(model, draft, prompt, first):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    if first == "base":
        assert speculated(model, prompt, draft)
    tuned = peft.get_peft_model(model, config).eval()
    plain = tuned.generate(input_ids=prompt, **KWARGS)
    assert tuned.generate(input_ids=prompt, assistant_model=draft, **KWARGS).equal(plain)
    assert speculated(model, prompt, draft)  # what one of them cannot is not held against the other


@pytest.mark.parametrize("sampled", [False, True])
def test_lora_in_every_state_speculates_and_gives_its_own_tokens(model, prompt, same, sampled):
    """One draft throughout; `same` compares with plain generate in the very state."""
    peft = pytest.importorskip("peft")
    draft = fresh_draft(model)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    tuned = peft.get_peft_model(model, config).eval()

    def answer(state):
        plain, _ = same(state, prompt, draft=draft, do_sample=sampled)
        return plain.sequences.tolist()

    adapted = answer(tuned)
    with tuned.disable_adapter():
        disabled = answer(tuned)
    assert answer(tuned) == adapted != disabled
    merged = tuned.merge_and_unload()
    answer(merged)
    assert type(merged) is type(model) and not isinstance(merged, peft.PeftModel)
    assert disabled == answer(tiny.build("llama"))


def test_a_model_is_probed_by_one_thread_and_draws_nothing(prompt, monkeypatch):
    """While another one draws: its numbers come once each, and nothing is held against the model."""
    probed, tried = [], probe_module._tried
    monkeypatch.setattr(probe_module, "_tried", lambda *args: probed.append(1) or tried(*args))
    model = tiny.build("llama")
    draft, outcomes, drawn, stop = fresh_draft(model), [], [], threading.Event()

    def draw():
        while not stop.is_set():
            drawn.append(float(torch.rand(())))

    def ask():
        outcomes.append(speculated(model, prompt, draft, do_sample=True))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    other = threading.Thread(target=draw)
    other.start()
    try:
        probe(model)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        other.join()
    assert outcomes == [True] * 4 and probe(model).reason is None and len(probed) == 1
    model = tiny.build("llama")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    probe(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_that_draws_is_found_out_without_a_draw(prompt):
    model = tiny.build("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + 0 * torch.randn_like(output))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert probe(model).reason == "its forward draws random numbers" and torch.equal(torch.get_rng_state(), state)


def test_bad_luck_is_not_remembered(model, draft, prompt, monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(probe_module, "_tried", fails)
        assert not speculated(model, prompt, draft)
    assert speculated(model, prompt, draft)


@pytest.mark.parametrize("broken", ["draft", "target"])
def test_logits_that_are_not_numbers_under_eta_cutoff(model, draft, prompt, broken):
    kwargs = {"do_sample": True, "eta_cutoff": 0.01, "remove_invalid_values": True}
    with torch.no_grad():
        (draft.layer.mlp.down_proj if broken == "draft" else model.model.layers[1].mlp.down_proj).weight.fill_(
            torch.nan
        )
    found = []
    for assistant in (None, draft):
        torch.manual_seed(3)
        found.append((model.generate(prompt, assistant_model=assistant, **KWARGS, **kwargs), torch.get_rng_state()))
    assert found[0][0].equal(found[1][0]) and torch.equal(found[0][1], found[1][1])


class Editor(transformers.StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] % 5 == 0:
            input_ids[:, -1] = 7
        return torch.zeros(1, dtype=torch.bool)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_criterion_that_writes_another_token(model, prompt, oracle, captured, sampled, graphs):
    draft = fresh_draft(model, cuda_graphs=graphs)
    found = []
    for assistant in (None, draft):
        torch.manual_seed(3)
        out = model.generate(
            prompt.clone(), assistant_model=assistant, do_sample=sampled, return_dict_in_generate=True,
            stopping_criteria=transformers.StoppingCriteriaList([Editor()]), **{**KWARGS, "max_new_tokens": 40},
        )  # fmt: skip
        found.append(out.sequences)
        if assistant is None:
            oracle(out.sequences.tolist(), 0.9, 64)
    assert found[0].equal(found[1]) and out.speculation.tau > 1.05


def test_nothing_of_ours_travels_with_the_target(model, draft, prompt):
    assert speculated(model, prompt, draft)
    assert b"fspad" not in pickle.dumps(model) and not [name for name in vars(model) if "fspad" in name]


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "cohere2"])
def test_nan_of_padding_that_slides_out_of_the_window(name):
    model = tiny.build(name, "eager", dtype=torch.float64)
    ids, mask = torch.tensor([[5, 20, 30]]), torch.tensor([[0, 1, 1]])
    found = [
        model.generate(ids, attention_mask=mask, assistant_model=assistant, **{**KWARGS, "max_new_tokens": 40})
        for assistant in (None, fresh_draft(model))
    ]
    assert found[0].equal(found[1])


def test_a_call_leaves_no_arena_to_the_collector(model, prompt, monkeypatch):
    made = []
    initialise = cache.ArenaCache.__init__

    def noted(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(cache.ArenaCache, "__init__", noted)
    draft = fresh_draft(model)
    gc.collect()
    gc.disable()
    try:
        model.generate(prompt, assistant_model=draft, **KWARGS)
        assert made and not [one for one in made if one() is not None]
    finally:
        gc.enable()


def test_a_draft_in_another_dtype_is_copied_once(model, prompt):
    draft, like = fresh_draft(model).double(), torch.zeros(1)
    made = drafting.matched(draft, like)
    model.generate(prompt, assistant_model=draft, **KWARGS)
    assert drafting.matched(draft, like) is made and made.dtype == torch.float32
    with torch.no_grad():
        draft.feature_sampler.fc.weight.mul_(2)
    again = drafting.matched(draft, like)
    assert again.feature_sampler.fc.weight.equal(draft.feature_sampler.fc.weight.float())


def test_out_of_memory_in_a_capture_runs_eagerly(model, prompt, captured, monkeypatch):
    from fspad_hf.generation import graphs

    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "capture", fails)
    draft = FSPADDraftModel.from_target(model, cuda_graphs=True, tree="fixed")
    plain = model.generate(prompt, **KWARGS)
    assert model.generate(prompt, assistant_model=draft, **KWARGS).equal(plain)
