"""Prepacked weights: the same tokens, kernels of their own, and nothing left where they do not belong."""

import copy
import pickle
import threading

import pytest
import torch

from fspad_hf.generation.prepacked import PrepackedLinears, prepacked

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


def test_off_by_default(llama, prompt, packed_calls):
    llama.generate(prompt, assistant_model=fresh_draft(llama), max_new_tokens=8, do_sample=False)
    assert not packed_calls


def test_only_inside_and_only_in_its_thread(packed_calls):
    layer, rows, seen = torch.nn.Sequential(torch.nn.Linear(8, 16)), torch.randn(1, 3, 8), []
    with torch.no_grad(), prepacked(layer):
        inside = layer(rows)
        assert len(packed_calls) == 1
        thread = threading.Thread(target=lambda: seen.append(layer(rows)))
        thread.start()
        thread.join()
    torch.testing.assert_close(inside, layer(rows))
    torch.testing.assert_close(inside, seen[0])
    assert len(packed_calls) == 1


def test_a_changed_weight_is_packed_anew():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False))
    rows = torch.randn(3, 8)
    with torch.no_grad():
        with prepacked(layer):
            before = layer(rows)
        layer[0].weight.mul_(2)
        with prepacked(layer):
            torch.testing.assert_close(layer(rows), 2 * before)
        layer[0].weight = torch.nn.Parameter(torch.zeros(16, 8))
        with prepacked(layer):
            assert not layer(rows).any()


def test_gradients_and_autocast_are_left_alone(packed_calls):
    layer, rows = torch.nn.Sequential(torch.nn.Linear(8, 16)), torch.randn(3, 8)
    with prepacked(layer):
        layer(rows).sum().backward()
    assert layer[0].weight.grad is not None and not packed_calls
    with torch.autocast("cpu", torch.bfloat16):
        assert not isinstance(prepacked(layer), PrepackedLinears)


def test_copies_and_pickles_hold_no_packed_weights():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 16))
    prepacked(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not other.__dict__["_fspad_prepacked"]
        torch.testing.assert_close(other(torch.ones(1, 8)), layer(torch.ones(1, 8)))


def test_what_cannot_be_packed_stays():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 16, dtype=torch.float64), torch.nn.Linear(16, 8, device="meta"))
    assert not isinstance(prepacked(layer), PrepackedLinears)


def test_the_reduced_head_is_packed_too(llama, prompt, packed_calls):
    draft = fresh_draft(llama, prepack_linears=True, draft_vocab_size=24)
    output = llama.generate(prompt, assistant_model=draft, max_new_tokens=12, do_sample=False)
    assert torch.equal(output, llama.generate(prompt, max_new_tokens=12, do_sample=False))
    assert any(found.size(0) == 24 for _, found, *_ in packed_calls)
