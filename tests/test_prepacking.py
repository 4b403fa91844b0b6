"""Prepacked weights: the same tokens, on the caller's word, and reversible."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fspad_hf.prepacking import PackedLinear, prepack, unpack

from . import tiny
from .conftest import fresh_draft

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@pytest.fixture
def model():
    return tiny.build("llama")


@pytest.mark.parametrize("sampled", [False, True])
def test_same_tokens_plain_and_speculated(model, prompt, sampled):
    kwargs = {"max_new_tokens": 24, "do_sample": sampled, "eos_token_id": None, "pad_token_id": 0}
    draft, found = fresh_draft(model), []
    for packed in (False, True):
        assert not packed or prepack(model) == 7 * model.config.num_hidden_layers + 1
        for assistant in (None, draft):
            torch.manual_seed(0)
            found.append(model.generate(prompt, assistant_model=assistant, **kwargs).tolist())
    assert found == [found[0]] * 4


def test_it_runs_on_the_copy_and_the_copy_can_go(model, prompt):
    kinds = [type(module) for module in model.modules()]
    with torch.no_grad():
        before = model(prompt).logits
        prepack(model)
        torch.testing.assert_close(model(prompt).logits, before)
        model.lm_head.weight.zero_()
        assert model(prompt).logits.any()  # the copy does not follow
        prepack(model)
        assert not model(prompt).logits.any()
    unpack(model)
    assert [type(module) for module in model.modules()] == kinds
    assert not [module for module in model.modules() if "packed" in vars(module)]


def test_copies_pickles_and_gradients_know_nothing_of_it(model, prompt):
    prepack(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.lm_head) is PackedLinear and "packed" not in vars(other.lm_head)
        with torch.no_grad():
            torch.testing.assert_close(other(prompt).logits, model(prompt).logits)
    model(prompt).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_what_cannot_be_packed_is_left():
    odd = nn.Sequential(nn.Linear(8, 8, dtype=torch.float64), nn.Linear(8, 8, device="meta"), nn.Conv1d(8, 8, 1))
    assert prepack(odd) == 0 and type(odd[0]) is nn.Linear
