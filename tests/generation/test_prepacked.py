"""Prepacked weights: the same tokens, kernels of their own, and nothing left where they do not belong."""

import copy
import pickle
import threading

import pytest
import torch

from fspad_hf.generation.prepacked import FEW, PackedLinear, PackedWeight, packed_weights, product
from fspad_hf.generation.twin import twin

from .. import tiny
from ..conftest import fresh_draft

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@pytest.fixture
def packed_calls(monkeypatch):
    """How many products ran on packed weights."""
    calls, real = [], torch.ops.mkldnn._linear_pointwise

    def counting(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counting)
    return calls


@pytest.mark.parametrize("sampled", [False, True])
def test_same_tokens_as_plain(llama, prompt, sampled, packed_calls):
    draft = fresh_draft(llama, prepack_linears=True)
    arguments = {"max_new_tokens": 24, "do_sample": sampled, "return_dict_in_generate": True}
    torch.manual_seed(0)
    plain = llama.generate(prompt, **arguments)
    assert not packed_calls
    torch.manual_seed(0)
    output = llama.generate(prompt, assistant_model=draft, **arguments)
    assert torch.equal(output.sequences, plain.sequences)
    layers = llama.config.num_hidden_layers
    assert len(packed_calls) > output.speculation.rounds * (7 * layers + 1)  # the target's alone are as many
    assert {weight.dtype for _, weight, *_ in packed_calls} == {torch.float32}


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_plain_step_in_float32_costs_what_it_costs_in_plain_decoding(llama, packed_calls, rows):
    """Few rows run on the plain weights, by the very product; in bfloat16 even one row is quicker packed."""
    linear = next(m for m in twin(llama, packed_weights(llama)).modules() if type(m) is PackedLinear)
    given = torch.randn(1, rows, linear.in_features)
    with torch.no_grad():
        made = linear(given)
        assert bool(packed_calls) == (rows > FEW)
        torch.testing.assert_close(made, torch.nn.functional.linear(given, linear.weight, linear.bias))
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            packed_calls.clear()
            half = linear.weight.to(torch.bfloat16)
            product(given.to(torch.bfloat16), half, PackedWeight.of(half).packed, None)
            assert packed_calls


def test_off_by_default(llama, prompt, packed_calls):
    llama.generate(prompt, assistant_model=fresh_draft(llama), max_new_tokens=8, do_sample=False)
    assert not packed_calls


def test_the_model_itself_and_other_threads_are_left_alone(llama, packed_calls):
    ids, seen = torch.tensor([[5, 6, 7]]), []
    before = llama(ids).logits
    with torch.no_grad():
        other = twin(llama, packed_weights(llama))
        inside = other(ids).logits
        made = len(packed_calls)
        assert made == 7 * llama.config.num_hidden_layers + 1
        thread = threading.Thread(target=lambda: seen.append(llama(ids).logits))
        thread.start()
        thread.join()
    torch.testing.assert_close(inside, before)
    assert torch.equal(seen[0], before) and torch.equal(llama(ids).logits, before) and len(packed_calls) == made
    assert [p.data_ptr() for p in other.parameters()] == [p.data_ptr() for p in llama.parameters()]


def test_a_changed_weight_is_packed_anew(prompt):
    model = tiny.build("llama")
    draft = fresh_draft(model, prepack_linears=True)
    settings = {"max_new_tokens": 12, "do_sample": False}
    found = []
    for change in (
        lambda: None,
        lambda: model.model.layers[0].mlp.up_proj.weight.mul_(-2),
        lambda: model.lm_head.weight.data.mul_(-1),  # which counts no version
        lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight.flip(0))),
        lambda: model.model.layers.__setitem__(1, tiny.build("llama", seed=2).model.layers[1]),
    ):
        with torch.no_grad():
            change()
        plain = model.generate(prompt, **settings)
        assert torch.equal(model.generate(prompt, assistant_model=draft, **settings), plain)
        found.append(plain.tolist())
    assert len({str(one) for one in found}) == 5


def test_gradients_and_autocast_are_left_alone(llama, packed_calls):
    other = twin(llama, packed_weights(llama))
    other(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert llama.lm_head.weight.grad is not None and not packed_calls
    llama.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        assert not packed_weights(llama)


def test_copies_and_pickles_hold_no_packed_weights(llama):
    packed = packed_weights(llama)
    assert packed and not copy.deepcopy(llama).__dict__["_fspad_prepacked"] and not pickle.loads(pickle.dumps(packed))


def test_what_cannot_be_packed_stays():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 16, dtype=torch.float64), torch.nn.Linear(16, 8, device="meta"))
    assert not packed_weights(layer)


def test_the_reduced_head_is_packed_too(llama, prompt, packed_calls):
    draft = fresh_draft(llama, prepack_linears=True, draft_vocab_size=24)
    output = llama.generate(prompt, assistant_model=draft, max_new_tokens=12, do_sample=False)
    assert torch.equal(output, llama.generate(prompt, max_new_tokens=12, do_sample=False))
    assert any(found.size(0) == 24 for _, found, *_ in packed_calls)
