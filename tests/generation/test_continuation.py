"""A text that goes on, its cache passed in: the tokens are plain `generate`'s, and nothing is read twice."""

import copy
import gc
import weakref

import pytest
import torch
from transformers.cache_utils import DynamicCache

from fspad_hf.generation import continuation
from fspad_hf.host import CACHE

from .. import tiny
from ..conftest import fresh_draft, plain_run

NEW = torch.tensor([[7, 30, 2, 44]])
MODES = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 0.9}}


@pytest.fixture
def read_lengths(monkeypatch):
    """`read_lengths(model)`: a list that grows by the number of tokens of each forward of its decoder."""
    handles = []

    def watch(model):
        lengths = []
        decoder = model.get_decoder()
        hook = lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1])  # noqa: E731
        handles.append(decoder.register_forward_pre_hook(hook, with_kwargs=True))
        return lengths

    yield watch
    for handle in handles:
        handle.remove()


def turns(model, prompt, number, draft, seed=5, **kwargs):
    """As many turns of a conversation, each on the cache of the one before: outputs and the state at the end."""
    kwargs = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True, **kwargs}
    ids, cache, outputs = prompt, None, []
    torch.manual_seed(seed)
    for _ in range(number):
        cache = {} if cache is None else {CACHE: cache}
        outputs.append(model.generate(ids, assistant_model=draft, **cache, **kwargs))
        ids, cache = torch.cat((outputs[-1].sequences, NEW), dim=1), outputs[-1][CACHE]
    return outputs, torch.get_rng_state()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_every_turn_is_plain_generate_s(name, mode, prompt, oracle):
    model = tiny.build(name)
    plain, state = turns(model, prompt, 4, None, **MODES[mode])
    oracle(plain[-1].sequences.tolist(), 0.9, model.config.get_text_config().vocab_size)
    fast, our_state = turns(model, prompt, 4, fresh_draft(model), **MODES[mode])
    assert torch.equal(state, our_state)
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours.sequences.tolist() == theirs.sequences.tolist()
        assert ours.speculation.tau > 2  # the oracle goes by what the draft has read: nothing is missing
        for a, b in zip(ours[CACHE].layers, theirs[CACHE].layers, strict=True):
            assert torch.allclose(a.keys, b.keys, atol=1e-5) and torch.allclose(a.values, b.values, atol=1e-5)


def test_a_turn_reads_only_what_is_new_and_the_draft_knows_the_rest(llama, llama_draft, prompt, read_lengths):
    (_, second), _ = turns(llama, prompt, 2, llama_draft)
    lengths = read_lengths(llama)
    ids = torch.cat((second.sequences, NEW), dim=1)
    again = llama.generate(
        ids, assistant_model=llama_draft, max_new_tokens=12, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, **{CACHE: second[CACHE]},
    )  # fmt: skip
    assert NEW.shape[1] + 1 in lengths and ids.shape[1] not in lengths  # and the probe's
    kwargs, plain, _ = plain_run(llama, ids, 0, dict, {"max_new_tokens": 12})
    whole = llama.generate(ids, assistant_model=llama_draft, **kwargs)
    assert again.sequences.tolist() == whole.sequences.tolist() == plain.sequences.tolist()
    # The very trees that it grows who reads the whole conversation at once.
    assert again.speculation.accepted_lengths == whole.speculation.accepted_lengths
    kept = [next(iter(continuation._read.of(output[CACHE]).values())).cache.layers[0] for output in (again, whole)]
    count = ids.shape[1] - 1
    assert torch.allclose(kept[0].keys[:, :, :count], kept[1].keys[:, :, :count], atol=1e-5)


@pytest.mark.parametrize("length", [5, 12, 16, 22])
def test_a_cache_that_was_cropped_or_copied(llama, llama_draft, prompt, length):
    """The conversation is taken up earlier, with other words: what the draft read after that point counts no more."""
    (output,), _ = turns(llama, prompt, 1, llama_draft)
    ids = output.sequences[:, : length + 1]
    ids = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % 50, NEW), dim=1)
    plain = llama.generate(ids, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
    for cache in (output[CACHE], copy.deepcopy(output[CACHE])):
        cache.crop(length - cache.get_seq_length())
        fast = llama.generate(
            ids, assistant_model=llama_draft, max_new_tokens=20, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, **{CACHE: cache},
        )  # fmt: skip
        assert fast.speculation is not None
        assert fast.sequences.tolist() == plain.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_that_plain_generate_filled(llama, llama_draft, prompt, mode):
    plain, state = turns(llama, prompt, 2, None, **MODES[mode])
    torch.manual_seed(5)
    kwargs = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    first = llama.generate(prompt, **kwargs, **MODES[mode])
    ids = torch.cat((first.sequences, NEW), dim=1)
    fast = llama.generate(ids, assistant_model=llama_draft, **{CACHE: first[CACHE]}, **kwargs, **MODES[mode])
    assert fast.speculation is not None
    assert fast.sequences.tolist() == plain[1].sequences.tolist() and torch.equal(torch.get_rng_state(), state)


def test_padding_in_front_of_the_first_turn(llama, llama_draft, prompt):
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), prompt), dim=1)
    results = []
    for draft in (None, llama_draft):
        ids, cache = padded, {}
        for _ in range(3):
            mask = torch.ones_like(ids)
            mask[:, :3] = 0
            output = llama.generate(
                ids, attention_mask=mask, assistant_model=draft, max_new_tokens=9, eos_token_id=None, pad_token_id=0,
                return_dict_in_generate=True, **cache,
            )  # fmt: skip
            ids, cache = torch.cat((output.sequences, NEW), dim=1), {CACHE: output[CACHE]}
        results.append(output.sequences.tolist())
    assert results[0] == results[1] and output.speculation is not None


def test_inference_mode_stays_inside(llama, llama_draft, prompt):
    with torch.inference_mode():
        (output,), _ = turns(llama, prompt, 1, llama_draft)
    ids = torch.cat((output.sequences, NEW), dim=1)
    plain = llama.generate(ids, max_new_tokens=9, eos_token_id=None, pad_token_id=0)
    fast = llama.generate(
        ids, assistant_model=llama_draft, max_new_tokens=9, eos_token_id=None, pad_token_id=0, **{CACHE: output[CACHE]}
    )
    assert fast.tolist() == plain.tolist()


def test_what_is_kept_goes_with_the_cache(llama, llama_draft, prompt):
    (output,), _ = turns(llama, prompt, 1, llama_draft)
    (state,) = continuation._read.of(output[CACHE]).values()
    state = weakref.ref(state)
    gc.collect()
    assert state() is not None
    del output
    gc.collect()
    assert state() is None


def test_a_cache_of_the_whole_prompt_does_what_plain_generate_does(llama, llama_draft, prompt):
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(prompt, use_cache=True, **{CACHE: cache})
    kwargs = {"max_new_tokens": 5, "pad_token_id": 0, "return_dict_in_generate": True}
    plain = llama.generate(prompt, **{CACHE: copy.deepcopy(cache)}, **kwargs)
    fast = llama.generate(prompt, assistant_model=llama_draft, **{CACHE: cache}, **kwargs)
    assert fast.sequences.tolist() == plain.sequences.tolist() and fast.speculation is None
