import pytest
import torch
from transformers import GenerationMixin
from transformers.generation import CandidateGenerator

import fspad_hf
from fspad_hf import FSPADCandidateGenerator, SpeculationRecord
from fspad_hf.generation.target import Target
from fspad_hf.generation.tree import TreeShape
from fspad_hf.generation.verification import NoiseQueue

from .. import tiny
from ..conftest import fresh_draft


def prepared(llama, draft, prompt, noise=None):
    generator = FSPADCandidateGenerator(draft, Target(llama), noise=noise)
    with torch.no_grad():
        features = llama.model(prompt[:, :-1]).last_hidden_state
    generator.accept(features[:, :6], prompt[:, 1:7])  # in two parts, as rounds do
    generator.accept(features[:, 6:], prompt[:, 7:])
    return generator, features


@pytest.mark.parametrize("vocabulary", [None, 20])
@pytest.mark.parametrize("kappa", [None, 1.0, 2.0])
@pytest.mark.parametrize("variant", [(True, True), (True, False), (False, True), (False, False)])
def test_a_tree_equals_one_grown_node_by_node(llama, prompt, kappa, variant, vocabulary):
    """Batched levels, tree masks and caches against the definition: each node's path through the draft on its own."""
    sampling, alignment = variant
    depth, k, total = 4, 3, 14
    draft = fresh_draft(
        llama, tree_depth=depth, tree_top_k=k, tree_total_nodes=total, coupling_kappa=kappa or 1.0,
        feature_sampling=sampling, partial_alignment=alignment, draft_vocab_size=vocabulary,
    )  # fmt: skip
    ids = torch.arange(64)
    if vocabulary:
        ids = draft.draft_vocab_ids = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:vocabulary]
    torch.manual_seed(3)
    noise = NoiseQueue(torch.device("cpu"), 64) if kappa else None
    generator, features = prepared(llama, draft, prompt, noise)
    tree = generator.grow(prompt[:, -1:], TreeShape.of(draft.speculation_settings()))
    rows = noise.peek(depth) if kappa else None

    def expand(path):
        """The draft over the true pairs and then its own features: log-confidences of the node's children."""
        inputs, tokens = features, prompt[:, 1:]
        for token in [*path, None]:
            out = draft(inputs_embeds=llama.get_input_embeddings()(tokens), features=inputs)
            inputs = torch.cat((inputs, out.features[:, -1:]), dim=1)
            if token is not None:
                tokens = torch.cat((tokens, torch.tensor([[token]])), dim=1)
        scores = llama.lm_head(out.logit_features[0, -1])[ids]
        if rows is not None:
            scores = kappa * (scores.log_softmax(-1) - rows[len(path)][ids].log())
        return scores.log_softmax(-1)

    with torch.no_grad():
        frontier, nodes = [((), 0.0)], []
        for _ in range(depth):
            level = []
            for path, score in frontier:
                values, tokens = expand(path).topk(k)
                level += [((*path, int(ids[t])), score + float(v)) for v, t in zip(values, tokens, strict=True)]
            nodes += level
            frontier = sorted(level, key=lambda node: -node[1])[:k]
    expected = {path for path, _ in sorted(nodes, key=lambda node: -node[1])[:total]}
    paths = [()]
    for node in range(1, len(tree)):
        paths.append((*paths[int(tree.parents[0, node])], int(tree.tokens[0, node])))
    assert set(paths[1:]) == expected
    assert generator.cache.length == prompt.shape[1] - 1  # nothing of the tree stays in the draft's cache


def test_depth_zero_is_the_root_alone(llama, prompt):
    generator, _ = prepared(llama, fresh_draft(llama), prompt)
    assert generator.grow(prompt[:, -1:], TreeShape(0, 3, 3)).tokens.tolist() == prompt[:, -1:].tolist()


def test_coupled_drafting_accepts_more(llama, prompt):
    """A draft that is right about p still misses the draws unless it sees their noise."""
    taus = {}
    for coupled in (True, False):
        draft = fresh_draft(llama, coupled_drafting=coupled, tree_depth=3, tree_top_k=4, tree_total_nodes=8)
        emitted = rounds = 0
        for seed in range(12):
            torch.manual_seed(seed)
            out = llama.generate(
                prompt, assistant_model=draft, do_sample=True, temperature=4.0, top_k=0, max_new_tokens=40,
                eos_token_id=None, return_dict_in_generate=True,
            )  # fmt: skip
            emitted, rounds = emitted + sum(out.speculation.accepted_lengths), rounds + out.speculation.rounds
        taus[coupled] = emitted / rounds
    assert taus[True] > 1.2 * taus[False]


def test_the_hosts_own_loop_can_use_the_generator(llama, prompt, monkeypatch):
    """The base class's contract, in transformers' own assisted decoding."""
    draft = fresh_draft(llama)
    made = []

    def ours(self, **kwargs):
        made.append(FSPADCandidateGenerator(draft, Target(self)))
        return made[-1]

    assert issubclass(FSPADCandidateGenerator, CandidateGenerator)
    monkeypatch.setattr(GenerationMixin, "_get_candidate_generator", ours)
    fspad_hf.uninstall()
    try:
        fast = llama.generate(
            prompt, assistant_model=tiny.build("llama", seed=1), max_new_tokens=30, eos_token_id=None
        )
    finally:
        fspad_hf.install()
    assert fast.tolist() == llama.generate(prompt, max_new_tokens=30, eos_token_id=None).tolist()
    assert made[0].cache.length > prompt.shape[1]


def test_record_adds_up(llama, llama_draft, prompt):
    out = llama.generate(
        prompt, assistant_model=llama_draft, max_new_tokens=30, eos_token_id=None, return_dict_in_generate=True
    )
    record = out.speculation
    assert sum(record.accepted_lengths) == 29 and record.rounds == len(record.accepted_lengths)
    assert record.tau == pytest.approx(29 / record.rounds)
    one = llama.generate(prompt, assistant_model=llama_draft, max_new_tokens=1, return_dict_in_generate=True)
    assert one.speculation.rounds == 0 and one.speculation.tau is None


def test_the_record_shows_rounds_and_tau_not_every_length():
    assert repr(SpeculationRecord([1, 3, 2, 2] * 3)) == "SpeculationRecord(rounds=12, tau=2.00)"
    assert repr(SpeculationRecord()) == "SpeculationRecord(rounds=0, tau=None)"
