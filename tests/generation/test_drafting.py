import pytest
import torch

from fspad_hf import SpeculationRecord
from fspad_hf.generation.drafting import Drafter, latest
from fspad_hf.generation.noise import NoiseQueue
from fspad_hf.generation.target import Target
from fspad_hf.generation.tree import TreeShape
from fspad_hf.modeling_fspad import FSPADDraftOutput

from ..conftest import fresh_draft, grown


def prepared(llama, draft, prompt):
    generator = Drafter(draft, Target(llama))
    with torch.no_grad():
        features = llama.model(prompt[:, :-1]).last_hidden_state
    generator.accept(features[:, :6], prompt[:, 1:7])  # in two parts, as rounds do
    return generator, features, generator.accept(features[:, 6:], prompt[:, 7:])


@pytest.mark.parametrize("vocabulary", [None, 20])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("variant", [(True, True), (True, False), (False, True), (False, False)])
def test_a_tree_equals_one_grown_node_by_node(llama, prompt, coupled, variant, vocabulary):
    """Batched levels, tree masks and caches against the definition: each node's path through the draft on its own."""
    sampling, alignment = variant
    depth, k, total = 4, 3, 14
    draft = fresh_draft(
        llama, tree_depth=depth, tree_top_k=k, tree_total_nodes=total,
        feature_sampling=sampling, partial_alignment=alignment, draft_vocab_size=vocabulary,
    )  # fmt: skip
    ids = torch.arange(64)
    if vocabulary:
        ids = draft.draft_vocab_ids = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:vocabulary]
    torch.manual_seed(3)
    noise = NoiseQueue(torch.device("cpu"), 64) if coupled else None
    generator, features, read = prepared(llama, draft, prompt)
    seen = noise.peek(depth) if coupled else None
    tree = grown(generator, read, prompt[:, -1:], TreeShape.of(draft.speculation_settings()), seen)
    rows = seen[:, 0] if coupled else None

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
            scores = scores.log_softmax(-1) - rows[len(path)][ids].log()
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
    assert generator.cache.lengths == [prompt.shape[1] - 1]  # nothing of the tree stays in the draft's cache


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


@pytest.mark.parametrize("coupled", [True, False])
@torch.no_grad()
def test_a_batch_is_its_rows_side_by_side(llama, coupled):
    """Texts of one length, each with noise of its own: the trees are those that each row grows alone."""
    draft, shape = fresh_draft(llama), TreeShape(4, 5, 30)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for weight in (*draft.layer.self_attn.parameters(), draft.layer.mlp.down_proj.weight):
            torch.nn.init.normal_(weight, std=0.4)  # a fresh draft hardly attends to anything
        ids = torch.randint(3, 64, (3, 9))
        noise = torch.empty(4, 3, 64).exponential_() if coupled else None
    features = llama.model(ids).last_hidden_state
    drafter = Drafter(draft, Target(llama), texts=3)
    read = drafter.accept(features[:, :-1], ids[:, 1:])
    last = FSPADDraftOutput(read.logit_features[:, -1:], read.features[:, -1:])
    trees = drafter.grow_at(last, torch.full((3, 1), 7), shape, noise).best(ids[:, -1:])
    for row in range(3):
        alone = Drafter(draft, Target(llama))
        read = alone.accept(features[row : row + 1, :-1], ids[row : row + 1, 1:])
        expected = grown(alone, read, ids[row : row + 1, -1:], shape, noise[:, [row]] if coupled else None)
        for part in ("tokens", "parents", "depths"):
            assert getattr(trees, part)[row].tolist() == getattr(expected, part)[0].tolist(), (row, part)
        torch.testing.assert_close(trees.scores[row], expected.scores[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_text_that_waits_keeps_its_tree(llama):
    """What another text reads meanwhile moves nothing of it."""
    drafter, shape = Drafter(fresh_draft(llama), Target(llama), texts=2), TreeShape(3, 4, 12)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(4))
    features = llama.model(ids).last_hidden_state

    def trees(read):
        return read, drafter.grow(read, drafter.cache.behind(ids.device), ids[:, [5]], shape)

    counts = torch.tensor([[5], [3]])
    read, before = trees(latest(drafter.accept(features[:, :5], ids[:, 1:6], [5, 3]), counts))
    counts = torch.tensor([[0], [3]])
    _, after = trees(latest(drafter.accept(features[:, 3:6], ids[:, 4:7], [0, 3]), counts, read))
    assert drafter.cache.lengths == [5, 6]
    assert before.of(0).tokens.tolist() == after.of(0).tokens.tolist()
    torch.testing.assert_close(before.of(0).scores, after.of(0).scores, atol=1e-5, rtol=1e-5)
    assert before.of(1).tokens.tolist() != after.of(1).tokens.tolist()


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
