"""Folded groups: what repeated keys and values give, without the copies."""

import pytest
import torch

from fspad_hf.generation.grouped import FoldedGroups, has_groups
from fspad_hf.generation.probe import probe
from fspad_hf.generation.stand_ins import StandIns, together

from .. import tiny
from ..conftest import fresh_draft

sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture
def heads(monkeypatch):
    """Query and key heads of each attention call that gets through."""
    seen = []

    def counting(query, key, *args, **kwargs):
        seen.append((query.shape[1], key.shape[1]))
        return sdpa(query, key, *args, **kwargs)

    monkeypatch.setattr(FoldedGroups, "_attention", _around(FoldedGroups._attention, counting))
    return seen


def _around(attention, counting):
    return lambda self, func, args, kwargs: attention(self, counting, args, kwargs)


@pytest.mark.parametrize("mask_heads", [0, 1, 6])
def test_the_same_as_repeated(mask_heads):
    query, key, value = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 4)
    mask = torch.randn(2, mask_heads, 5, 9) if mask_heads else None
    repeated = [x[:, :, None].expand(2, 3, 2, 9, x.shape[-1]).reshape(2, 6, 9, x.shape[-1]) for x in (key, value)]
    with FoldedGroups():
        folded = [x[:, :, None].expand(2, 3, 2, 9, x.shape[-1]).reshape(2, 6, 9, x.shape[-1]) for x in (key, value)]
        assert [x.data_ptr() for x in folded] == [key.data_ptr(), value.data_ptr()]
        found = torch.nn.functional.scaled_dot_product_attention(query, *folded, attn_mask=mask)
        torch.testing.assert_close(sdpa(query, *repeated, attn_mask=mask), found)
    torch.testing.assert_close(sdpa(query, *repeated, attn_mask=mask), found)


def test_other_reshapes_stay():
    tensor = torch.arange(24.0).view(1, 2, 1, 3, 4)
    with FoldedGroups():
        assert tensor.expand(1, 2, 5, 3, 4).reshape(1, 2, 5, 12).shape == (1, 2, 5, 12)
        assert tensor.reshape(1, 2, 3, 4).shape == (1, 2, 3, 4)
        assert tensor[0, :, 0].expand(2, 3, 4).reshape(6, 4).shape == (6, 4)


@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
def test_models(name, prompt, heads):
    """Folded where the model has groups and `sdpa`; tokens as plain either way."""
    model = tiny.build(name, "eager" if name in ("gemma2", "gpt_oss") else "sdpa")
    assert probe(model).reason is None
    assert (
        probe(model).fold_groups
        == has_groups(model)
        == (name not in ("gemma2", "gpt_oss", "gpt2", "gpt_neox", "opt", "deepseek_v3"))
    )
    heads.clear()
    plain = model.generate(prompt, max_new_tokens=20, do_sample=False)
    assert not heads
    out = model.generate(prompt, assistant_model=fresh_draft(model), max_new_tokens=20, do_sample=False)
    assert out.tolist() == plain.tolist()
    assert bool(heads) == probe(model).fold_groups and all(query == keys for query, keys in heads)


def test_a_model_that_cannot_be_folded_is_verified_as_it_is(prompt, monkeypatch):
    """One that looks at its repeated keys."""
    model = tiny.build("llama")
    monkeypatch.setattr(FoldedGroups, "_attention", lambda self, func, args, kwargs: func(*args, **kwargs))
    assert probe(model).reason is None and not probe(model).fold_groups
    plain = model.generate(prompt, max_new_tokens=20, do_sample=False)
    assert (
        model.generate(prompt, assistant_model=fresh_draft(model), max_new_tokens=20, do_sample=False).tolist()
        == plain.tolist()
    )


def test_stand_ins_together():
    begun = []

    class Begins(StandIns):
        def begin(self):
            begun.append(self)

    first = Begins({torch.relu: lambda func, args, kwargs: func(-args[0])})
    second = Begins({torch.sigmoid: lambda func, args, kwargs: args[0] + 1})
    both = together(first, second)
    one = torch.ones(1)
    for _ in range(2):
        with both:
            assert torch.relu(one) == 0 and torch.sigmoid(one) == 2 and torch.abs(-one) == 1
        assert torch.relu(one) == 1
    assert begun == [first, second] * 2 and together(first) is first
