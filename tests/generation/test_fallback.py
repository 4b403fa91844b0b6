"""What cannot be speculated gives plain generate's result, with one warning."""

import logging

import pytest
import torch
from transformers import StaticCache

from fspad_hf import FSPADConfig, FSPADDraftModel
from fspad_hf.generation import hook
from fspad_hf.host import CACHE

from .. import tiny
from ..conftest import fresh_draft


@pytest.fixture
def warnings_seen(monkeypatch):
    seen = []
    monkeypatch.setattr(hook.logger, "warning_once", seen.append)
    return seen


def both(model, draft, ids, seed=5, **kwargs):
    results = []
    for assistant in (None, draft):
        torch.manual_seed(seed)
        made = {k: v() if callable(v) else v for k, v in kwargs.items()}
        results.append((model.generate(ids, assistant_model=assistant, **made), torch.get_rng_state()))
    (plain, plain_state), (fast, fast_state) = results
    assert torch.equal(plain_state, fast_state)
    return plain, fast


CASES = {
    "batch": ({"logits_processor": [lambda ids, scores: scores]}, "of function in a batch"),
    "use_cache": ({"use_cache": False}, "use_cache is off"),
    "static": ({"cache_implementation": "static"}, "StaticCache"),
    "user_static": (
        {CACHE: lambda: StaticCache(config=tiny.CONFIGS["llama"](), max_cache_len=64)},
        "StaticCache",
    ),
    "hidden_states": (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states was asked for, of a batch",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_calls_that_fall_back(name, llama, llama_draft, prompt, warnings_seen):
    kwargs, reason = CASES[name]
    ids = prompt.repeat(2, 1) if name in ("batch", "hidden_states") else prompt
    mask = torch.ones_like(ids)
    if name == "batch":
        mask[0, :3] = 0
    plain, fast = both(llama, llama_draft, ids, max_new_tokens=12, attention_mask=mask, **kwargs)
    if name == "hidden_states":
        assert len(plain.hidden_states) == len(fast.hidden_states)
        torch.testing.assert_close(fast.hidden_states[3][-1], plain.hidden_states[3][-1])
        assert fast.speculation is None
        plain, fast = plain.sequences, fast.sequences
    assert fast.tolist() == plain.tolist()
    assert len(warnings_seen) == 1 and reason in warnings_seen[0]


@pytest.mark.parametrize("name", tiny.UNSUPPORTED)
@pytest.mark.parametrize("do_sample", [False, True])
def test_models_without_trees(name, do_sample, prompt, warnings_seen):
    model = tiny.build(name, "eager")
    text = model.config.get_text_config()
    draft = FSPADDraftModel(
        FSPADConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=4,
                    bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id)
    ).eval()  # fmt: skip
    plain, fast = both(model, draft, prompt, max_new_tokens=12, do_sample=do_sample)
    assert fast.tolist() == plain.tolist()
    assert len(warnings_seen) == 1


def test_beam_search_ignores_the_draft(llama, llama_draft, prompt, warnings_seen):
    plain, fast = both(llama, llama_draft, prompt, num_beams=3, max_new_tokens=10)
    assert fast.tolist() == plain.tolist() and "beam_search" in warnings_seen[0]


def test_train_mode_with_dropout(prompt, warnings_seen):
    model = tiny.build("gpt2")
    draft = fresh_draft(model)
    model.train()
    plain, fast = both(model, draft, prompt, max_new_tokens=10)
    assert fast.tolist() == plain.tolist() and "train mode" in warnings_seen[0]


def test_warns_once_for_real(llama, llama_draft, prompt, caplog):
    root = logging.getLogger("transformers")
    root.propagate, before = True, root.propagate
    try:
        with caplog.at_level("WARNING"):
            for _ in range(3):
                llama.generate(prompt, max_new_tokens=2, assistant_model=llama_draft, use_cache=False)
    finally:
        root.propagate = before
    assert sum("use_cache is off" in r.getMessage() for r in caplog.records) == 1


def test_stock_assistants_take_the_stock_path(llama, prompt, warnings_seen):
    assistant = tiny.build("llama", seed=1)
    fast = llama.generate(prompt, assistant_model=assistant, max_new_tokens=15)
    assert fast.tolist() == llama.generate(prompt, max_new_tokens=15).tolist()
    fast = llama.generate(prompt, prompt_lookup_num_tokens=3, max_new_tokens=15)
    assert fast.tolist() == llama.generate(prompt, max_new_tokens=15).tolist()
    assert not warnings_seen


def test_a_sabotaged_mask_is_caught_by_the_probe(prompt, monkeypatch):
    """The probe fails a model whose tree mask is not honoured: here, one that sees every node."""
    from fspad_hf.generation import tree
    from fspad_hf.generation.probe import _tried, probe

    monkeypatch.setattr(
        tree.CandidateTree,
        "ancestors",
        lambda self: torch.ones(*self.tokens.shape, len(self), dtype=torch.bool).tril(),
    )
    found = probe(tiny.build("llama"))
    assert found.chains_only and found.reason is None  # which need no such mask
    for use_twin in (True, False):
        with torch.no_grad():
            reason = _tried(tiny.build("llama"), use_twin, chains_only=False).reason
        assert "a trial tree came out wrong" in reason
