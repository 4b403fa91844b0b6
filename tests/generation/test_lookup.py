"""Tokens looked up in the text, grafted on the draft's tree: the same tokens as plain, in fewer rounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList

from fspad_hf.generation.lookup import LONGEST_MATCH, PromptLookup
from fspad_hf.generation.tree import CandidateTree, GrownTrees

from .. import tiny
from ..conftest import fresh_draft, plain_run
from .test_tree import grown
from .test_tuning import token_paths


def naive_continuation(text, most):
    """By the definition: the longest match that there is, the latest of these, read on into what is itself guessed."""
    for size in range(min(LONGEST_MATCH, len(text)), 0, -1):
        places = [end for end in range(size, len(text)) if text[end - size : end] == text[len(text) - size :]]
        if places:
            guessed = list(text)
            for i in range(most):
                guessed.append(guessed[places[-1] + i])
            return guessed[len(text) :]
    return []


@settings(deadline=None, max_examples=300)
@given(st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=5), st.integers(0, 9))
def test_a_continuation_is_what_followed_the_latest_longest_match(pieces, most):
    lookup, text = PromptLookup(pieces[0]), list(pieces[0])
    for piece in pieces[1:]:
        if len(text) % 2:  # asked or not on the way
            lookup.continuation(3)
        lookup.extend(piece)
        text += piece
    assert lookup.continuation(most).tokens == naive_continuation(text, most)


@settings(deadline=None, max_examples=300)
@given(st.data(), grown(), st.booleans())
def test_grafting_adds_a_path_and_nothing_else(data, nodes, padded):
    """Also on a tree with padding and of a chain with padding, as graphs hold them."""
    parents, depths, scores = nodes
    tokens = torch.zeros_like(parents)
    for parent in set(parents.tolist()):  # siblings differ; along a path tokens recur
        siblings = (parents == parent).nonzero()[:, 0]
        tokens[siblings] = torch.tensor(data.draw(st.permutations(range(4)))[: len(siblings)])
    total = data.draw(st.integers(1, 20))
    tree = GrownTrees(tokens[None], parents[None], depths, scores[None], total).best(torch.tensor([[3]]))
    before = token_paths(tree.trimmed())
    chain = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=7))
    if before != {()} and data.draw(st.booleans()):  # one that goes on where the tree has a path
        chain = [*data.draw(st.sampled_from(sorted(before - {()}))), *chain]
    if padded:
        held = torch.tensor([*chain, *data.draw(st.lists(st.integers(0, 3), max_size=5))])
        grafted = tree.grafted(held[None], torch.tensor([[len(chain)]]))
        assert len(grafted) == len(tree) + len(held)
    else:
        tree = tree.trimmed()
        grafted = tree.grafted(torch.tensor([chain]))
    whole = grafted.trimmed()
    assert token_paths(whole) == before | {tuple(chain[:end]) for end in range(len(chain) + 1)}
    assert len(token_paths(whole)) == len(whole) == len(whole.children()) + 1  # no node twice
    for node in range(1, len(whole)):
        assert whole.parents[0, node] < node
        assert whole.depths[0, node] == whole.depths[0, whole.parents[0, node]] + 1
    kept = len(tree.trimmed())
    assert whole.scores[0, :kept].equal(tree.trimmed().scores[0]) and whole.scores[0, kept:].isneginf().all()


def test_a_root_alone_can_be_grafted_on():
    tree = CandidateTree.chain(torch.tensor([[7]])).grafted(torch.tensor([[4, 5]]))
    assert tree.scores is None and token_paths(tree) == {(), (4,), (4, 5)}


class Refrain(LogitsProcessor):
    """Makes a text repeat itself, with a slip now and then."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 10 + input_ids.shape[1] % 7] += 0 if input_ids.shape[1] % 29 == 0 else 100
        return scores


def refrain():
    return {"logits_processor": LogitsProcessorList([Refrain()])}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
def test_a_text_that_repeats_itself_takes_few_rounds(name, options, prompt):
    model = tiny.build(name, "eager" if name == "gpt_oss" else "sdpa")
    kwargs, plain, state = plain_run(model, prompt, 3, refrain, {"max_new_tokens": 60, **options})
    outs = []
    for lookup in (0, 12):
        draft = fresh_draft(model, tree_depth=2, tree_top_k=4, tree_total_nodes=15, tree_lookup_tokens=lookup)
        torch.manual_seed(3)
        outs.append(model.generate(prompt, assistant_model=draft, **kwargs, **refrain()))
        assert outs[-1].sequences.tolist() == plain.sequences.tolist()
        assert torch.equal(torch.get_rng_state(), state)
    without, looked_up = (out.speculation for out in outs)
    assert looked_up.tau > 3 > without.tau and max(looked_up.accepted_lengths) == 13


@pytest.mark.parametrize("new_tokens", [1, 2, 5, 9, 14])
def test_a_path_ends_where_the_text_does(llama, same, prompt, new_tokens):
    draft = fresh_draft(llama, tree_lookup_tokens=20)
    _, fast = same(llama, prompt, draft=draft, each=refrain, max_new_tokens=new_tokens, min_tau=None)
    assert fast.sequences.shape[1] == prompt.shape[1] + new_tokens


def test_padding_is_no_part_of_the_text(llama, same, prompt):
    """Neither where it is looked up nor where it stands."""
    ids = torch.cat((torch.full((1, 5), 3), prompt, prompt), dim=-1)
    mask = (torch.arange(ids.shape[1]) >= 5).long()[None]
    same(llama, ids, draft=fresh_draft(llama, tree_lookup_tokens=8), attention_mask=mask, each=refrain)


def test_at_the_end_of_a_table_of_positions(same, prompt):
    """A path of looked up tokens must not reach past it, where a learned embedding has nothing."""
    model = tiny.build("gpt2")
    room = model.config.max_position_embeddings - prompt.shape[1]
    draft = fresh_draft(model, tree_depth=2, tree_top_k=8, tree_total_nodes=33, tree_lookup_tokens=30)
    _, fast = same(model, prompt, draft=draft, each=refrain, max_new_tokens=room)
    assert fast.sequences.shape[1] == model.config.max_position_embeddings
