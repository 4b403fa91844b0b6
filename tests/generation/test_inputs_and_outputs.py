"""Prompts of embeddings, and what plain decoding's forwards return beside their logits."""

import pytest
import torch

from fspad_hf.generation.hook import logger

from .. import tiny
from ..conftest import fresh_draft, rng_state

SAMPLED = {"do_sample": True, "temperature": 1.2, "top_k": 0, "repetition_penalty": 1.1}
QUIET = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 24}


@pytest.fixture(autouse=True)
def speculates(monkeypatch):
    def said(line):
        raise AssertionError(line)

    monkeypatch.setattr(logger, "warning_once", said)


def both(model, oracle, accuracy=0.8, **kwargs):
    """Plain and ours, by an oracle; of embeddings the draft reads the last one, of which it has no token."""
    kwargs = {**QUIET, "return_dict_in_generate": True, **kwargs}
    torch.manual_seed(2)
    plain = model.generate(**kwargs)
    state = rng_state(model.device)
    if accuracy is not None:
        unknown = [] if "input_ids" in kwargs else [0]
        oracle([unknown + plain.sequences[0].tolist()], accuracy, 64)
    torch.manual_seed(2)
    fast = model.generate(**kwargs, assistant_model=fresh_draft(model))
    assert fast.sequences.tolist() == plain.sequences.tolist()
    assert torch.equal(rng_state(model.device), state)
    return plain, fast


@pytest.mark.parametrize("mode", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "bloom", "lfm2", "qwen3_5_text"])
def test_prompts_of_embeddings(name, mode, oracle, prompt):
    model = tiny.build(name, "eager")
    embeddings = model.get_input_embeddings()(prompt).detach() + 0.1
    plain, fast = both(model, oracle, inputs_embeds=embeddings, **mode)
    assert plain.sequences.shape == (1, 24) and fast.speculation.tau > 1.5
    plain, fast = both(model, oracle, inputs_embeds=embeddings, input_ids=prompt, **mode)
    assert plain.sequences.shape == (1, 24 + prompt.shape[1]) and fast.speculation.tau > 1.5


@pytest.mark.parametrize("mode", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_of_its_own_and_a_batch(mode, llama, prompt):
    """Tokens that are looked up, too: of a prompt of embeddings there are none."""
    embeddings = llama.get_input_embeddings()(prompt).detach().repeat(3, 1, 1)
    mask = torch.ones(3, prompt.shape[1], dtype=torch.long)
    mask[1, :4] = 0
    draft, outs = fresh_draft(llama, tree_lookup_tokens=4), []
    for assistant in (None, draft):
        torch.manual_seed(2)
        kwargs = {**QUIET, "eos_token_id": 7, "attention_mask": mask, "assistant_model": assistant}
        outs.append(llama.generate(inputs_embeds=embeddings, **kwargs, **mode).tolist())
    assert outs[0] == outs[1]


def test_up_to_the_last_position(oracle, prompt):
    """A table of positions counts the embeddings as well."""
    model = tiny.build("gpt2")
    embeddings = model.get_input_embeddings()(prompt).detach()
    both(model, oracle, inputs_embeds=embeddings, max_new_tokens=256 - prompt.shape[1])


def test_the_embeddings_are_no_part_of_max_length(llama, oracle, prompt):
    """All is accepted, up to the last tree: 23 tokens after the first, 7 a round."""
    embeddings = llama.get_input_embeddings()(prompt).detach()
    _, fast = both(llama, oracle, accuracy=1.0, inputs_embeds=embeddings)
    assert fast.speculation.accepted_lengths == [7, 7, 7, 2]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "falcon_h1", "qwen3_5_text", "gemma3_text"])
def test_hidden_states(name, oracle, prompt):
    model = tiny.build(name, "eager")
    for mode in ({}, SAMPLED):
        plain, fast = both(model, oracle, input_ids=prompt, output_hidden_states=True, **mode)
        assert fast.speculation.tau > 1.5
        compare(fast.hidden_states, plain.hidden_states)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "falcon_h1", "qwen3_5_text"])
def test_attentions(name, oracle, prompt):
    """A node's row over the text and its own ancestors; what it weighs of other nodes is nothing."""
    model = tiny.build(name, "eager")
    ids = torch.cat((torch.zeros(1, 3, dtype=torch.long), prompt), dim=1)
    mask = (torch.arange(ids.shape[1]) >= 3).long()[None]
    plain, fast = both(model, oracle, input_ids=prompt, output_attentions=True, output_scores=True)
    assert fast.speculation.tau > 1.5 and len(fast.scores) == len(fast.attentions)
    compare(fast.attentions, plain.attentions)
    plain, fast = both(
        model, oracle, input_ids=ids, attention_mask=mask, accuracy=None, output_attentions=True,
        output_hidden_states=True,
    )  # fmt: skip
    compare(fast.attentions, plain.attentions)
    compare(fast.hidden_states, plain.hidden_states)


def compare(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, plain in zip(ours, theirs, strict=True):
        assert len(mine) == len(plain)
        for one, other in zip(mine, plain, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
