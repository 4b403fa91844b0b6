"""Targets with recurrent layers: a chain begins where their states are sure, and the rest is read again."""

import pytest
import torch
from transformers import DynamicCache

from fspad_hf.generation import decoding
from fspad_hf.generation.probe import probe
from fspad_hf.generation.rounds import Rounds
from fspad_hf.generation.stateful import MOST_PENDING, StatefulCache
from fspad_hf.host import CACHE, length_of

from .. import families, tiny
from ..conftest import fresh_draft

SETTINGS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 0},
    "penalty": {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2},
}
CROPPED = {"lfm2"}  # convolutions alone


def model_of(name):
    model = tiny.build(name, "eager")  # mamba2 takes no other
    if probe(model).reason is not None and name == "mamba2" and CACHE == "past_key_values":
        pytest.skip("this transformers has a name of its own for mamba2's cache, and it runs plain")
    return model


def draft_for(model, **overrides):
    return fresh_draft(model, tree_depth=5, tree_top_k=4, tree_total_nodes=30, **overrides)


@pytest.fixture
def read(monkeypatch):
    """The rows of each verification."""
    rows, begin = [], StatefulCache.begin

    def watched(self, tokens):
        host, all_of_them = begin(self, tokens)
        rows.append(all_of_them.shape[1])
        return host, all_of_them

    monkeypatch.setattr(StatefulCache, "begin", watched)
    return rows


def states(cache):
    for layer in cache.layers:
        yield from (getattr(layer, "keys", None), getattr(layer, "values", None))
        for name in ("conv_states", "recurrent_states"):
            yield from getattr(layer, name, {}).values()


@pytest.mark.parametrize("mode", SETTINGS)
@pytest.mark.parametrize("name", tiny.STATEFUL)
def test_the_same_tokens_and_states(name, mode, same, prompt, read):
    model = model_of(name)
    found = probe(model)
    assert found.reason is None and found.chains_only and found.use_twin
    plain, fast = same(model, prompt, draft=draft_for(model), **SETTINGS[mode])
    assert max(fast.speculation.accepted_lengths) == 6
    assert (max(read) > 6) == (name not in CROPPED)
    for ours, theirs in zip(states(fast[CACHE]), states(plain[CACHE]), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert not any(getattr(layer, "record_past", False) for layer in fast[CACHE].layers)


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1", "qwen3_5_text"])
def test_a_cache_that_goes_on(name, prompt):
    """Also where the text ends with tokens that were to be read again."""
    model, draft = model_of(name), draft_for(model_of(name))
    kwargs = {"eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    for length in range(2, 12):
        texts = []
        for assistant in (None, draft):
            first = model.generate(prompt, max_new_tokens=length, assistant_model=assistant, **kwargs)
            assert length_of(first[CACHE]) == first.sequences.shape[1] - 1
            longer = torch.cat((first.sequences, prompt[:, :3]), dim=1)
            again = model.generate(
                longer, **{CACHE: first[CACHE]}, max_new_tokens=12, assistant_model=assistant, **kwargs
            )
            texts.append(again.sequences.tolist())
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1"])
def test_a_text_that_ends_within_a_chain(name, prompt, oracle):
    """What was to be read again is in the cache that is returned, as plain decoding has it."""
    model, kwargs = model_of(name), {"pad_token_id": 0, "max_new_tokens": 30, "return_dict_in_generate": True}
    whole = model.generate(prompt, eos_token_id=None, **kwargs).sequences
    for eos in sorted(set(whole[0, prompt.shape[1] + 1 : -8].tolist())):
        plain = model.generate(prompt, eos_token_id=eos, **kwargs)
        oracle(whole.tolist(), 0.8, 64)
        fast = model.generate(prompt, eos_token_id=eos, assistant_model=draft_for(model), **kwargs)
        assert fast.sequences.tolist() == plain.sequences.tolist()
        for ours, theirs in zip(states(fast[CACHE]), states(plain[CACHE]), strict=True):
            if ours is not None:
                torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1"])
def test_an_error_of_the_users_leaves_a_sound_cache(name, prompt, oracle):
    model = model_of(name)
    kwargs, draft = {"eos_token_id": None, "pad_token_id": 0}, draft_for(model)
    whole = model.generate(prompt, max_new_tokens=30, **kwargs)
    oracle(whole.tolist(), 0.7, 64)
    for at in range(3, 20):

        class Stops:
            left = at + 1  # the prompt is put first

            def put(self, tokens):
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt

            def end(self):
                pass

        cache = DynamicCache(config=model.config)
        with pytest.raises(KeyboardInterrupt):
            more = {CACHE: cache, "streamer": Stops(), **kwargs}
            model.generate(prompt, max_new_tokens=30, assistant_model=draft, **more)
        assert prompt.shape[1] <= length_of(cache) <= prompt.shape[1] + at
        assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
        again = model.generate(whole[:, : prompt.shape[1] + at + 1], max_new_tokens=8, **{CACHE: cache}, **kwargs)
        assert again.tolist() == whole[:, : again.shape[1]].tolist()


def test_what_is_pending_is_taken_in(prompt, oracle, read):
    """A draft that is never right makes a round read a token more each time, up to a limit."""
    model = model_of("falcon_h1")
    kwargs = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 60}
    plain = model.generate(prompt, **kwargs)
    oracle(plain.tolist(), 0.0, 64)
    fast = model.generate(prompt, assistant_model=draft_for(model), **kwargs)
    assert fast.tolist() == plain.tolist()
    assert max(read) == MOST_PENDING + 6 and MOST_PENDING + 2 in read and read.count(6) > 2


@pytest.mark.parametrize("name", tiny.STATEFUL)
def test_left_padding_and_stops(name, same, prompt):
    ids, model = torch.cat((torch.zeros(1, 4, dtype=torch.long), prompt), dim=1), model_of(name)
    mask = (torch.arange(ids.shape[1]) >= 4).long()[None]
    same(model, ids, attention_mask=mask, accuracies=(0.9,), draft=draft_for(model))
    for eos in (3, 9, 17):
        same(model, prompt, eos_token_id=[eos, 40], accuracies=(0.7,), min_tau=None, draft=draft_for(model))


@pytest.mark.parametrize("overrides", [{}, {"tree_lookup_tokens": 6}, {"tree": "auto", "tree_lookup_tokens": None}])
def test_a_drafts_own_chains(overrides, prompt):
    model = model_of("qwen3_5_text")
    draft, ids = fresh_draft(model, **overrides), torch.cat((prompt, prompt), dim=1)
    for settings in SETTINGS.values():
        outcomes = []
        for assistant in (None, draft):
            torch.manual_seed(1)
            out = model.generate(
                ids, assistant_model=assistant, max_new_tokens=60, eos_token_id=None, pad_token_id=0, **settings
            )
            outcomes.append((out.tolist(), torch.get_rng_state().tolist()))
        assert outcomes[0] == outcomes[1]


def test_states_that_are_written_in_place_come_back(prompt):
    """Not even an address changes: compiled code may know it."""
    model = model_of("falcon_h1")
    cache = model(prompt, use_cache=True)[CACHE]
    before = [part.clone() for part in states(cache)]
    addresses = [part.data_ptr() for layer in cache.layers for part in layer.recurrent_states.values()]
    held = StatefulCache(cache, prompt.shape[1])
    host, tokens = held.begin(prompt[:, :4])
    model(tokens, **{CACHE: host}, use_cache=True)
    held.keep([[0, 1]])
    assert held.longest == prompt.shape[1] + 2 and held.reread_rows == 2
    for now, was in zip(states(cache), before, strict=True):
        assert torch.equal(now, was)
    assert addresses == [part.data_ptr() for layer in cache.layers for part in layer.recurrent_states.values()]


def test_a_batch_runs_plain(prompt, monkeypatch):
    model, ids = model_of("lfm2"), prompt.repeat(2, 1)
    monkeypatch.setattr(Rounds, "run", None)
    arguments = {"max_new_tokens": 8, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    out = model.generate(ids, assistant_model=draft_for(model), **arguments)
    assert out.tolist() == model.generate(ids, **arguments).tolist()


def test_what_a_chain_costs_is_learned_unless_trees_are_set(prompt, monkeypatch):
    """Of no recurrent model it is known, also where other targets have trees of one size."""
    model, asked = model_of("qwen3_5_text"), []
    settings_of_call, costs_of = decoding.settings_of_call, decoding.costs_of

    def fixed(*arguments):
        settings = settings_of_call(*arguments)
        settings.tree = "fixed"  # as where no CPU is
        return settings

    monkeypatch.setattr(decoding, "settings_of_call", fixed)
    monkeypatch.setattr(decoding, "costs_of", lambda *arguments: asked.append(1) or costs_of(*arguments))
    for tree, learned in ((None, 1), ("fixed", 0)):
        asked.clear()
        for target in (model, tiny.build("llama")):
            draft = fresh_draft(target, tree=tree)
            target.generate(prompt, assistant_model=draft, max_new_tokens=12, eos_token_id=None)
        assert len(asked) == learned


def test_a_model_whose_steps_differ_from_its_chains_is_found_out(monkeypatch):
    """Nemotron-H clamps its steps of time where it reads several tokens, and not where it reads one."""
    monkeypatch.setitem(families.OWN, "nemotron_h", {})
    assert "a trial chain came out wrong" in probe(families.build("nemotron_h")).reason
    monkeypatch.setitem(families.OWN, "nemotron_h", {"time_step_min": 1e-9})
    assert probe(families.build("nemotron_h")).chains_only
