"""A target's twin and its folded groups: what repeated keys and values give, without the copies."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fspad_hf.generation import grouped
from fspad_hf.generation import probe as probe_module
from fspad_hf.generation.grouped import folded_attention, folded_config
from fspad_hf.generation.probe import probe
from fspad_hf.generation.twin import twin

from .. import tiny
from ..conftest import fresh_draft

WITHOUT_GROUPS = ("gpt2", "gpt_neox", "opt", "deepseek_v3")
EAGER = ("gemma2", "gpt_oss")


def build(name):
    return tiny.build(name, "eager" if name in EAGER else "sdpa")


@pytest.fixture
def attended(monkeypatch):
    """Query and key heads of each call of torch's attention."""
    seen, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def counting(query, key, *args, **kwargs):
        seen.append((query.shape[1], key.shape[1]))
        return sdpa(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    return seen


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("mask_heads", [0, 1, 6])
def test_the_same_as_repeated(key_heads, mask_heads):
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 6 // key_heads, False
    query, key, value = torch.randn(2, 6, 5, 8), torch.randn(2, key_heads, 9, 8), torch.randn(2, key_heads, 9, 8)
    mask = torch.randn(2, mask_heads, 5, 9) if mask_heads else None
    for scaling in (None, 0.7):
        for _ in range(2):  # the second layer finds the mask's other form
            found = folded_attention(module, query, key, value, mask, scaling=scaling)[0]
            expected = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling)[0]
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
def test_models(name, prompt, attended):
    """Folded where the model has groups and `sdpa`; tokens as plain, and the model as it was."""
    model = build(name)
    assert probe(model).reason is None and probe(model).use_twin
    folds = name not in (*WITHOUT_GROUPS, *EAGER)
    assert (folded_config(model) is not None) == folds
    plain = model.generate(prompt, max_new_tokens=20, do_sample=False)
    attended.clear()
    out = model.generate(prompt, assistant_model=fresh_draft(model), max_new_tokens=20, do_sample=False)
    assert out.tolist() == plain.tolist()
    assert ((2, 2) in attended) == folds
    assert model.config.get_text_config()._attn_implementation == ("eager" if name in EAGER else "sdpa")


def test_a_twin_shares_all_but_its_modules(llama):
    other = twin(llama, config=folded_config(llama))
    mine, theirs = dict(llama.named_modules()), dict(other.named_modules())
    assert mine.keys() == theirs.keys() and not {map(id, mine.values())} & {map(id, theirs.values())}
    assert [id(p) for p in llama.parameters()] == [id(p) for p in other.parameters()]
    assert all(isinstance(theirs[name], type(module)) for name, module in mine.items())
    heard = []
    handle = llama.model.register_forward_hook(lambda *_: heard.append(None))
    with torch.no_grad():
        torch.testing.assert_close(other(torch.tensor([[3, 4]])).logits, llama(torch.tensor([[3, 4]])).logits)
    handle.remove()
    assert len(heard) == 2
    other.model.layers[0] = torch.nn.Identity()
    assert llama.model.layers[0] is mine["model.layers.0"]


def test_tied_modules_stay_tied(llama):
    llama_like = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
    llama_like["b"] = llama_like["a"]
    llama_like.config = llama.config
    other = twin(llama_like)
    assert other["a"] is other["b"] and other["a"] is not llama_like["a"]


@pytest.mark.parametrize("broken", ["raises", "is wrong"])
def test_where_a_twin_does_not_work_the_model_itself_verifies(prompt, monkeypatch, broken):
    model = tiny.build("llama")

    def attention(module, query, *args, **kwargs):
        if broken == "raises":
            raise RuntimeError("no such attention")
        return query.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, grouped.FOLDED, attention)
    assert probe(model).reason is None and not probe(model).use_twin
    plain = model.generate(prompt, max_new_tokens=20, do_sample=False)
    draft = fresh_draft(model)
    assert model.generate(prompt, assistant_model=draft, max_new_tokens=20, do_sample=False).tolist() == plain.tolist()


def test_a_forward_of_a_modules_own_has_no_twin(prompt, monkeypatch):
    model = tiny.build("llama")
    model.lm_head.forward = model.lm_head.forward  # as accelerate's hooks leave one, bound to this very module
    monkeypatch.setattr(probe_module, "twin", None, raising=False)
    assert probe(model).reason is None and not probe(model).use_twin


def test_a_hook_sees_the_modules_that_it_knows(prompt):
    model = tiny.build("llama")
    layer, vector = model.model.layers[1].mlp, torch.randn(32, generator=torch.Generator().manual_seed(0)) / 4
    for one in model.model.layers:
        one.mlp.register_forward_hook(lambda module, args, output: output + vector if module is layer else None)
    draft = fresh_draft(model)
    for seed in range(4):
        found = []
        for assistant in (None, draft):
            torch.manual_seed(seed)
            found.append(model.generate(prompt, assistant_model=assistant, max_new_tokens=40, do_sample=True).tolist())
        assert found[0] == found[1]
    assert not probe(model).use_twin


def test_what_this_attention_does_not_know_is_left_to_transformers(monkeypatch):
    seen = []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *args, **kwargs: seen.append(kwargs))
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    folded_attention(
        torch.nn.Module(), query, key, key, torch.zeros(1, 1, 3, 5), position_bias=torch.zeros(1, 4, 3, 5)
    )
    assert seen[0]["position_bias"].shape == (1, 4, 3, 5)
