"""`tree="auto"`: the same tokens whatever is chosen, and the choice follows costs and accepted paths alone."""

import gc
import weakref

import pytest
import torch

from fspad_hf import FSPADDraftModel
from fspad_hf.generation.costs import LATEST, RoundCosts, Stopwatch, costs_of
from fspad_hf.generation.drafting import Drafter
from fspad_hf.generation.lookup import Found
from fspad_hf.generation.target import Target
from fspad_hf.generation.tree import CandidateTree, TreeShape
from fspad_hf.generation.tuning import NOTHING, PLAIN, FixedTrees, TunedTrees, _needed, ladder
from fspad_hf.speculation_config import SpeculationConfig

from .. import tiny
from ..conftest import fresh_draft, grown


def known_costs(forward: dict[int, float], level: float) -> RoundCosts:
    known = RoundCosts()
    for rows, seconds in forward.items():
        known.add_forward(rows, 10 * seconds)  # the first of a size does not count
        known.add_forward(rows, seconds)
    known.add_draft(1, level)
    return known


@pytest.fixture
def auto(llama):
    return fresh_draft(llama, tree="auto", tree_depth=4, tree_top_k=3, tree_total_nodes=20)


@pytest.fixture
def steep(monkeypatch):
    """Trees pay as soon as they are right, and no clock has a say in it."""
    known = known_costs({1: 1.0, 60: 1.3}, 0.1)
    monkeypatch.setattr("fspad_hf.generation.decoding.costs_of", lambda *_: known)
    monkeypatch.setattr(RoundCosts, "add_forward", lambda *_: None)
    monkeypatch.setattr(RoundCosts, "add_draft", lambda *_: None)


def trees(monkeypatch):
    """The sizes of the trees that are verified from here on."""
    sizes, verify = [], Target.verify

    def counted(self, tree, *args, **kwargs):
        sizes.append(len(tree))
        return verify(self, tree, *args, **kwargs)

    monkeypatch.setattr(Target, "verify", counted)
    return sizes


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 0}, {"do_sample": True, "repetition_penalty": 1.3}]
)
def test_tokens_are_those_of_plain_generate(llama, auto, same, prompt, steep, options, monkeypatch):
    sizes = trees(monkeypatch)
    same(llama, prompt, draft=auto, max_new_tokens=60, **options)
    assert 1 in sizes and max(sizes) > 8  # plain steps and trees, in one and the same call


def test_it_speculates_where_that_pays_and_only_there(llama, auto, oracle, prompt, steep, monkeypatch):
    sizes = trees(monkeypatch)
    reference = llama.generate(prompt, max_new_tokens=230, min_new_tokens=230)[0].tolist()
    made = {}
    for accuracy in (0.0, 0.95):
        again = []
        for _ in range(2):
            oracle([reference], accuracy, 64)
            sizes.clear()
            output = llama.generate(
                prompt, assistant_model=auto, max_new_tokens=230, min_new_tokens=230, return_dict_in_generate=True
            )
            again.append((output.speculation.accepted_lengths, list(sizes)))
        assert again[0] == again[1]  # a run repeats
        made[accuracy] = again[0][1]
    assert 1 <= sum(size > 1 for size in made[0.0]) < 20 and made[0.0][40:60] == [1] * 20
    assert any(size > 1 for size in made[0.0][60:])  # it is tried again, later
    assert sum(size > 1 for size in made[0.95]) > 0.9 * len(made[0.95])


def test_costs_decide():
    """The very same paths: where rows are dear, small trees; where they are free, large ones; where all is, none."""
    config = tiny_config(depth=6, top_k=10, nodes=59)
    root, path = TreeShape(6, 10, 59), [0, 1, 2]

    def settled(verify60, level):
        chosen = TunedTrees(config, known_costs({1: 1.0, 60: verify60}, level))
        for _ in range(60):
            shape = chosen.choose()
            if shape != PLAIN:
                chosen.observe(chain(shape.total_nodes, len(path)), path, NOTHING, path)
        return chosen.choose()

    assert settled(1.0, 0.0).depth >= 2
    small, dear = settled(3.0, 0.1), settled(3.0, 3.0)
    assert small.depth >= 2 and small.total_nodes < 20 < root.total_nodes
    assert dear == PLAIN


def test_a_bad_draft_is_found_out_by_cheap_trees_and_a_good_one_climbs():
    config = tiny_config(depth=6, top_k=10, nodes=59)
    costs = known_costs({1: 38.0, 60: 56.0}, 4.0)
    chosen, shapes = TunedTrees(config, costs), []
    for _ in range(256):
        shapes.append(chosen.choose())
        if shapes[-1] != PLAIN:
            chosen.observe(chain(shapes[-1].total_nodes, 1), [0], NOTHING, [7])
    assert {shape.depth for shape in shapes} == {0, 1}
    assert 256 * 38 / sum(costs.round(shape) for shape in shapes) > 0.98
    chosen, depths = TunedTrees(config, costs), []
    for _ in range(30):
        shape = chosen.choose()
        depths.append(shape.depth)
        accepted = 1 + min(shape.depth, shape.total_nodes)
        chosen.observe(chain(shape.total_nodes, accepted), list(range(accepted)), NOTHING, [7] * accepted)
    assert depths[0] == 1 and max(depths[:10]) == 6 and depths[-1] == 6


def test_a_path_tells_what_smaller_trees_would_have_accepted(llama, prompt):
    """Against the smaller trees themselves, grown from the same state: whatever is promised, they have."""
    config = {"tree_depth": 4, "tree_top_k": 4, "tree_total_nodes": 24}
    promised = had = 0
    for seed in range(6):
        torch.manual_seed(seed)
        draft = fresh_draft(llama, **config)
        for weight in draft.parameters():
            weight.data.mul_(1 + seed)
        generator = Drafter(draft, Target(llama))
        with torch.no_grad():
            read = generator.accept(llama.model(prompt[:, :-1]).last_hidden_state, prompt[:, 1:])
        large = grown(generator, read, prompt[:, -1:], TreeShape.of(draft.speculation_settings()))
        leaves = set(range(len(large))) - set(large.parents[0].tolist())
        for shape in ladder(draft.speculation_settings())[1:]:
            paths = token_paths(grown(generator, read, prompt[:, -1:], shape))
            for leaf in leaves:
                path = [leaf]
                while path[0]:
                    path.insert(0, int(large.parents[0, path[0]]))
                for needed, node in zip(_needed(large, path), path[1:], strict=True):
                    reached = token_path(large, node) in paths
                    had += reached
                    if all(a <= b for a, b in zip(needed, shape, strict=True)):
                        promised += 1
                        assert reached, (shape, needed)
    assert promised > 0.8 * had > 100  # and hardly less than they have


def token_path(tree, node):
    tokens = []
    while node:
        tokens.insert(0, int(tree.tokens[0, node]))
        node = int(tree.parents[0, node])
    return tuple(tokens)


def token_paths(tree):
    return {token_path(tree, node) for node in range(len(tree))}


def chain(nodes, length):
    """A tree whose nodes 1 ... length - 1 are a chain, the others children of the root that are worth less."""
    parents = [max(node - 1, 0) if node < length else 0 for node in range(nodes + 1)]
    depths = [min(node, length - 1) if node < length else 1 for node in range(nodes + 1)]
    scores = [-0.1 * node for node in range(nodes + 1)]
    rows = (torch.arange(nodes + 1)[None], torch.tensor([parents]), torch.tensor([depths]), torch.tensor([scores]))
    return CandidateTree(*rows)


def tiny_config(depth, top_k, nodes, lookup=0):
    return SpeculationConfig("auto", depth, top_k, nodes, lookup).resolved(torch.device("cpu"))


@pytest.mark.parametrize("shape", [(6, 10, 59), (1, 1, 1), (3, 3, 8), (8, 2, 20), (2, 16, 200), (6, 8, 31)])
def test_the_ladder(shape):
    shapes = ladder(tiny_config(*shape))
    assert shapes[0] == PLAIN and shapes[-1] == (*shape, 0) and len(set(shapes)) == len(shapes)
    for one in shapes[1:]:
        assert one.can_grow and 1 <= one.depth <= one.total_nodes
        assert all(a <= b for a, b in zip(one, (*shape, 0), strict=True))
    if shape == (6, 8, 31):
        assert {one.rows for one in shapes} == {1, 4, 8, 16, 32}
        assert {one.depth for one in shapes} == set(range(7))


def test_what_is_looked_up_is_weighed_against_what_is_drafted():
    """Whichever guesses better is kept, also where both are in one tree; together they never exceed the budget."""

    def settled(drafted, right, match=3):
        """`drafted` and `right`: how many tokens of the text the draft and the text itself guess each round."""
        chosen, shapes = TunedTrees(tiny_config(6, 8, 31, 15), known_costs({1: 1.0, 60: 1.3}, 0.2)), []
        for number in range(300):
            text = [100 * number + i for i in range(1, 17)]
            found = Found([*text[:right], *[-1] * (15 - right)], match)
            shape = chosen.choose(found)
            assert shape.rows <= 32
            shapes.append(shape)
            tree = CandidateTree.chain(torch.tensor([[0]]))
            if shape.depth:
                depth = min(drafted, shape.depth)
                tree = straight(text[:depth] + [-2] * (shape.depth - depth))
            if shape.lookup:
                tree = tree.grafted(torch.tensor([found.tokens[: shape.lookup]])).trimmed()
            children, path = tree.children(), [0]
            while (node := children.get((path[-1], text[len(path) - 1]))) is not None:
                path.append(node)
            chosen.observe(tree, path, found, text[: len(path)])
        return shapes[-1]

    assert settled(0, 0) == PLAIN
    assert settled(0, 6).lookup >= 6 and not settled(0, 6).depth
    assert settled(1, 12).lookup >= 12
    assert settled(4, 0).depth >= 4 and not settled(4, 0).lookup


def test_matches_of_each_length_are_judged_by_themselves():
    chosen = TunedTrees(tiny_config(6, 8, 31, 15), known_costs({1: 1.0, 60: 1.3}, 0.2))
    for _ in range(30):
        for match in (1, 3):
            chosen.choose(Found([1, 2, 3], match))
            chosen.observe(
                CandidateTree.chain(torch.tensor([[0]])), [0], Found([1, 2, 3], match), [1 if match > 1 else 9]
            )
    assert chosen.choose(Found([1, 2, 3], 1)).lookup == 0 < chosen.choose(Found([1, 2, 3], 3)).lookup


def test_fixed_trees_share_their_nodes_with_what_is_looked_up():
    trees = FixedTrees(SpeculationConfig("fixed", 6, 10, 59, 8).resolved(torch.device("cpu")))
    assert trees.choose() == (6, 10, 59, 0) and trees.choose(Found([1], 1)) == (6, 10, 51, 8)
    only = FixedTrees(SpeculationConfig("fixed", 2, 2, 3, 3).resolved(torch.device("cpu")))
    assert only.choose(Found([1], 1)) == (0, 0, 0, 3)


def straight(tokens):
    """A draft's tree that is one path."""
    numbers = torch.arange(len(tokens) + 1)
    parents = (numbers - 1).clamp(min=0)
    return CandidateTree(torch.tensor([[0, *tokens]]), parents[None], numbers[None], -0.1 * numbers[None])


def test_costs_are_interpolated_and_the_quickest_counts():
    made = known_costs({1: 1.0, 9: 2.0}, 0.1)
    assert made.round(PLAIN) == 1.0
    assert made.round(TreeShape(3, 2, 4)) == pytest.approx(0.3 + 1.5)
    assert made.round(TreeShape(0, 0, 0, 8)) == 2.0
    assert made.round(TreeShape(1, 9, 200)) == pytest.approx(0.1 + 2.0)  # unseen: no dearer than what was seen
    for seconds in (1.5, 9.0, 4.0, 9.0):  # the first does not count; then a machine that was busy
        made.add_forward(60, seconds)
    assert made.round(TreeShape(1, 9, 59)) == pytest.approx(0.1 + 4.0)
    for _ in range(LATEST):  # and that has changed since
        made.add_forward(60, 5.0)
    assert made.round(TreeShape(1, 9, 59)) == pytest.approx(0.1 + 5.0)
    assert RoundCosts().round(TreeShape(1, 9, 59)) == 0.0


def test_costs_are_learned_from_the_rounds_and_die_with_the_model(auto, prompt):
    model = tiny.build("llama")
    model.generate(prompt, assistant_model=auto, max_new_tokens=12)
    known = costs_of(Target(model), auto, 1, False)
    assert known.round(PLAIN) > 0
    known.add_forward(1000, 7.0), known.add_forward(1000, 7.0)
    model.generate(prompt, assistant_model=auto, max_new_tokens=2)
    assert costs_of(Target(model), auto, 1, False) is known and 1000 in known._verify  # gone on with
    assert not [name for name in vars(model) if "fspad" in name]
    gone = weakref.ref(known)
    del known, model
    gc.collect()
    assert gone() is None


def test_with_nothing_set_a_cpu_chooses_and_fixed_trees_time_nothing(llama, prompt, monkeypatch):
    watched = []
    monkeypatch.setattr("fspad_hf.generation.rounds.Stopwatch", lambda device: watched.append(1) or Stopwatch(device))
    llama.generate(prompt, assistant_model=fresh_draft(llama), max_new_tokens=8)
    assert not watched
    llama.generate(prompt, assistant_model=FSPADDraftModel.from_target(llama), max_new_tokens=8)
    assert watched


def test_unknown(auto):
    with pytest.raises(ValueError, match="tree='best' is unknown: expected 'auto' or 'fixed'"):
        auto.speculation_config.tree = "best"
