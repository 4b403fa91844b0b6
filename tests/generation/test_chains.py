"""Targets that verify chains and no trees: plain `generate`'s tokens all the same."""

import functools

import pytest
import torch
from transformers import AttentionInterface, pipeline
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fspad_hf.generation.probe import probe
from fspad_hf.host import CACHE

from .. import tiny
from ..conftest import fresh_draft

SETTINGS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 0},
    "penalty": {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2},
}


def causal_only(module, query, key, value, attention_mask, **kwargs):
    """As flash attention: causal by itself, the newest query at the newest key; a mask of its own it does not take."""
    if attention_mask is not None and attention_mask.dim() == 4:
        raise ValueError("no 4-D masks here")
    window, (rows, columns) = kwargs.get("sliding_window"), (query.shape[2], key.shape[2])
    back = torch.arange(columns - rows, columns)[:, None] - torch.arange(columns)
    visible = (back >= 0) & (back < (window or columns))
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, -columns:].bool()
    mask = torch.zeros(len(query), 1, rows, columns).masked_fill(~visible.view(-1, 1, rows, columns), -1e30)
    kwargs.pop("is_causal", None)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def registered():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register("causal_only", causal_only)
    flash = ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]  # 2-D masks are handed on, all ones as none
    ALL_MASK_ATTENTION_FUNCTIONS.register("causal_only", flash)


def model_of(name):
    if name in tiny.CHAINS:
        return tiny.build(name, "eager")
    model = tiny.build(name, "sdpa")
    model.set_attn_implementation("causal_only")
    return model


NAMES = [*tiny.CHAINS, "llama", "mistral", "gemma3_text", "gpt2", "mixtral"]


@pytest.mark.parametrize("mode", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokens(name, mode, same, prompt):
    model = model_of(name)
    found = probe(model)
    assert found.reason is None and found.chains_only
    draft = fresh_draft(model, tree_depth=5, tree_top_k=4, tree_total_nodes=30)
    _, fast = same(model, prompt, draft=draft, **SETTINGS[mode])
    assert max(fast.speculation.accepted_lengths) == 6


def test_masks_that_the_model_makes_itself(same, prompt):
    """Of layers whose first positions are gone, too."""
    model = tiny.build("mistral", "eager")
    kind = type(model)

    class OwnMasks(kind):
        @functools.wraps(kind.forward)
        def forward(self, *args, attention_mask=None, **kwargs):
            if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.dim() != 2):
                raise ValueError("no masks but 2-D ones here")
            return kind.forward(self, *args, attention_mask=attention_mask, **kwargs)

    OwnMasks.__module__ = kind.__module__
    model.__class__ = OwnMasks
    assert probe(model).chains_only
    same(model, prompt, accuracies=(0.9,))


@pytest.mark.parametrize("name", NAMES)
def test_left_padding(name, same, prompt):
    ids = torch.cat((torch.zeros(1, 4, dtype=torch.long), prompt), dim=1)
    same(model_of(name), ids, attention_mask=(torch.arange(ids.shape[1]) >= 4).long()[None], accuracies=(0.9,))


@pytest.mark.parametrize("overrides", [{}, {"tree_lookup_tokens": 6}, {"tree": "auto", "tree_lookup_tokens": None}])
@pytest.mark.parametrize("name", ["bloom", "mistral"])
def test_a_drafts_own_chains(name, overrides, prompt):
    model = model_of(name)
    draft, ids = fresh_draft(model, **overrides), torch.cat((prompt, prompt), dim=1)
    for seed in range(4):
        for settings in SETTINGS.values():
            outcomes = []
            for assistant in (None, draft):
                torch.manual_seed(seed)
                out = model.generate(
                    ids, assistant_model=assistant, max_new_tokens=40, eos_token_id=[5, 9], pad_token_id=0, **settings
                )
                outcomes.append((out.tolist(), torch.get_rng_state().tolist()))
            assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("mode", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_batches(name, mode, same, prompt):
    """Sequences of which one gets ahead end at the same column all the same; the cache is as plain decoding's."""
    ids = torch.cat((prompt, prompt.flip(1), prompt.roll(3, 1)))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    model = model_of(name)
    plain, fast = same(model, ids, attention_mask=mask, eos_token_id=[7, 19], min_tau=1.5, **SETTINGS[mode])
    for ours, theirs in zip(fast[CACHE].layers, plain[CACHE].layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length() == plain.sequences.shape[1] - 1
        for row, columns in enumerate(mask.tolist()):  # padding before the prompt is whatever it is
            first = max(ours.keys.shape[-2] - plain.sequences.shape[1] + 1 + columns.index(1), 0)
            for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                torch.testing.assert_close(one[row, :, first:], other[row, :, first:], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["bloom", "mistral"])
def test_batches_whose_cache_is_not_wanted(name, prompt):
    """Sequences that have ended are gone; returned sequences, lookups, and shapes by their cost as well."""
    model, ids = model_of(name), torch.cat((prompt, prompt.flip(1)), dim=1).repeat(2, 1)
    for overrides in ({"tree_lookup_tokens": 6}, {"tree": "auto", "tree_lookup_tokens": None}):
        for settings in SETTINGS.values():
            outs = []
            for draft in (None, fresh_draft(model, **overrides)):
                torch.manual_seed(4)
                kwargs = {"eos_token_id": [5, 9], "pad_token_id": 0, "max_new_tokens": 40}
                if "do_sample" in settings:
                    kwargs["num_return_sequences"] = 2
                out = model.generate(ids, assistant_model=draft, **kwargs, **settings)
                outs.append((out.tolist(), torch.get_rng_state().tolist()))
            assert outs[0] == outs[1]


def test_a_pipeline(tokenizer):
    model = model_of("bloom")
    answers = []
    for draft in (None, fresh_draft(model)):
        pipe = pipeline("text-generation", model, tokenizer=tokenizer, assistant_model=draft)
        torch.manual_seed(5)
        answers.append(pipe("hello there", do_sample=True, top_k=0, max_new_tokens=16))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", tiny.UNSUPPORTED)
def test_what_can_verify_neither(name):
    found = probe(tiny.build(name, "eager"))
    assert found.reason is not None and not found.chains_only
