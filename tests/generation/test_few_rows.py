"""Linear layers over few rows: the very product, by whichever way is quickest, and the user's model as it was."""

import copy

import pytest
import torch

from fspad_hf.generation import target
from fspad_hf.generation.few_rows import MOST, TRIALS, FewRowsLinear, Products, direct, has_choice, transposed
from fspad_hf.generation.twin import twin

from .. import tiny
from ..conftest import fresh_draft

WAYS = [transposed, *([direct] if torch.backends.mkldnn.is_available() else [])]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (1, 1, 24), (1, 5, 24), (2, 4, 24)])
@pytest.mark.parametrize("biased", [False, True])
def test_every_way_gives_the_product(way, shape, biased):
    x, weight, bias = torch.randn(shape), torch.randn(40, 24), torch.randn(40) if biased else None
    made = way(x, weight, bias)
    torch.testing.assert_close(made, torch.nn.functional.linear(x, weight, bias))
    assert made.is_contiguous()


def test_products_take_turns_and_the_quickest_stays(monkeypatch):
    products, calls, now = Products(), [], [0.0]
    costs = {"slow": 3.0, "quick": 1.0, "lucky": 2.0}

    def way(name):
        def product(x, weight, bias):
            calls.append(name)
            now[0] += 0.1 if name == "lucky" and calls.count(name) == 1 else costs[name]  # the first warms up
            return torch.nn.functional.linear(x, weight, bias)

        return product

    products.kinds = tuple(way(name) for name in costs)
    monkeypatch.setattr("fspad_hf.generation.few_rows.time.perf_counter", lambda: now[0])
    x, weight = torch.randn(4, 8), torch.randn(16, 8)
    for _ in range(3 * TRIALS + 5):
        products(x, weight, None)
    assert all(calls[: 3 * TRIALS].count(name) == TRIALS for name in costs)
    assert set(calls[3 * TRIALS :]) == {"quick"}
    products(torch.randn(5, 8), weight, None)  # other rows are another question
    assert calls[-1] == "slow"
    calls.clear()
    products(torch.randn(MOST + 1, 8), weight, None)
    products(torch.randn(0, 8), weight, None)
    assert not calls


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3_text"])
@pytest.mark.parametrize("sampled", [False, True])
def test_same_tokens_as_plain(name, prompt, same, sampled):
    """Whatever is chosen while the ways still take turns."""
    model = tiny.build(name)
    same(model, prompt, draft=fresh_draft(model), max_new_tokens=24, do_sample=sampled, min_tau=None)


def test_the_twin_has_them_and_the_model_does_not(llama):
    made = twin(llama)
    assert sum(type(m) is FewRowsLinear for m in made.modules()) == 7 * llama.config.num_hidden_layers + 1
    assert not any(type(m) is FewRowsLinear for m in llama.modules())
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, llama(ids).logits)
    llama_like = copy.deepcopy(llama).to(torch.bfloat16)
    assert not any(type(m) is FewRowsLinear for m in twin(llama_like).modules())


def test_a_weight_edited_in_place_is_seen_at_once(prompt):
    """qa: a packed copy of a weight was stale after an edit through `.data`; here there is no copy."""
    model = tiny.build("llama")
    draft = fresh_draft(model)
    kwargs = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    before = model.generate(prompt, assistant_model=draft, **kwargs)
    token = int(before[0, -1])
    weight = model.lm_head.weight
    weight.data[token] = -5 * weight.data.mean(0)
    plain = model.generate(prompt, **kwargs)
    assert plain.tolist() == model.generate(prompt, assistant_model=draft, **kwargs).tolist()


def test_where_there_is_no_choice():
    weight = torch.randn(8, 8)
    assert has_choice(weight) and not has_choice(weight.T) and not has_choice(weight.double())
    assert not has_choice(weight.bfloat16()) and not has_choice(weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not has_choice(weight)
    layer = FewRowsLinear(8, 4)
    layer(torch.randn(2, 8)).sum().backward()  # with gradients it is a plain layer
    assert layer.weight.grad is not None


def test_a_draft_over_the_whole_vocabulary_uses_them_for_the_head(llama, monkeypatch):
    """Of a plain head on this machine, and never where several processes would each choose for themselves."""
    used, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(target, "few_rows_product", lambda *args: used.append(1) or linear(*args))
    view = target.Target(llama)
    with torch.no_grad():
        features = torch.randn(1, 3, llama.config.hidden_size)
        torch.testing.assert_close(view.draft_logits(features), llama.lm_head(features))
        assert used
        used.clear()
        monkeypatch.setattr(llama, "_tp_size", 2, raising=False)
        view = target.Target(llama)
        view.draft_logits(features), view.draft_logits(features, torch.arange(5))
    assert not used
