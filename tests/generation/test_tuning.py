"""`tree="auto"`: the same tokens whatever is chosen, and the choice follows costs and accepted paths alone."""

import json

import pytest
import torch

from fspad_hf import FSPADConfig
from fspad_hf.generation import costs
from fspad_hf.generation.candidate_generator import FSPADCandidateGenerator
from fspad_hf.generation.costs import RoundCosts
from fspad_hf.generation.target import Target
from fspad_hf.generation.tree import CandidateTree, TreeShape
from fspad_hf.generation.tuning import PLAIN, TunedTrees, _needed, ladder

from .. import tiny
from ..conftest import fresh_draft

STEEP = RoundCosts(verify=((1, 1.0), (60, 1.3)), level=((2, 0.1), (10, 0.1)), first=((2, 0.1), (10, 0.1)))


@pytest.fixture
def auto(llama):
    return fresh_draft(llama, tree="auto", tree_depth=4, tree_top_k=3, tree_total_nodes=20)


@pytest.fixture
def steep(monkeypatch):
    monkeypatch.setattr("fspad_hf.generation.tuning.round_costs", lambda target, draft: STEEP)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FSPAD_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs"


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
            oracle(reference, accuracy, 64)
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
        chosen = TunedTrees(
            config, RoundCosts(((1, 1.0), (60, verify60)), ((2, level), (10, level)), ((2, level), (10, level)))
        )
        for _ in range(60):
            shape = chosen.choose()
            if shape != PLAIN:
                chosen.observe(chain(shape.total_nodes, len(path)), path)
        return chosen.choose()

    assert settled(1.0, 0.0).depth >= 2
    small, dear = settled(3.0, 0.1), settled(3.0, 3.0)
    assert small.depth >= 2 and small.total_nodes < 20 < root.total_nodes
    assert dear == PLAIN


def test_a_bad_draft_is_found_out_by_cheap_trees_and_a_good_one_climbs():
    config = tiny_config(depth=6, top_k=10, nodes=59)
    costs = RoundCosts(((1, 38.0), (60, 56.0)), ((2, 3.0), (10, 3.0)), ((2, 4.0), (10, 5.0)))
    chosen, shapes = TunedTrees(config, costs), []
    for _ in range(256):
        shapes.append(chosen.choose())
        if shapes[-1] != PLAIN:
            chosen.observe(chain(shapes[-1].total_nodes, 1), [0])
    assert {shape.depth for shape in shapes} == {0, 1}
    assert 256 * 38 / sum(costs.round(shape) for shape in shapes) > 0.98
    chosen, depths = TunedTrees(config, costs), []
    for _ in range(30):
        shape = chosen.choose()
        depths.append(shape.depth)
        accepted = 1 + min(shape.depth, shape.total_nodes)
        chosen.observe(chain(shape.total_nodes, accepted), list(range(accepted)))
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
        generator = FSPADCandidateGenerator(draft, Target(llama))
        with torch.no_grad():
            generator.accept(llama.model(prompt[:, :-1]).last_hidden_state, prompt[:, 1:])
        large = generator.grow(prompt[:, -1:], TreeShape.of(draft.config))
        leaves = set(range(len(large))) - set(large.parents[0].tolist())
        for shape in ladder(draft.config)[1:]:
            paths = token_paths(generator.grow(prompt[:, -1:], shape))
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
    return FSPADConfig(
        vocab_size=64,
        hidden_size=32,
        num_attention_heads=4,
        tree_depth=depth,
        tree_top_k=top_k,
        tree_total_nodes=nodes,
        tree_lookup_tokens=lookup,
    )


@pytest.mark.parametrize("looked_up", [0, 7])
@pytest.mark.parametrize("shape", [(6, 10, 59), (1, 1, 1), (3, 3, 8), (8, 2, 20), (2, 30, 200)])
def test_the_ladder(shape, looked_up):
    shapes = ladder(tiny_config(*shape, looked_up))
    assert shapes[0] == PLAIN and shapes[-1] == (*shape, looked_up) and len(set(shapes)) == len(shapes)
    assert (TreeShape(0, 0, 0, 7) in shapes) == (looked_up == 7)
    for depth, top_k, nodes, lookup in shapes[1:]:
        assert lookup == looked_up
        if not depth:
            continue
        assert nodes <= top_k + (depth - 1) * top_k**2 and depth <= nodes  # a tree that can be grown
        assert all(a <= b for a, b in zip((depth, top_k, nodes), shape, strict=True))


def test_what_is_looked_up_is_weighed_against_what_is_drafted():
    """Whichever guesses better is kept, also where both are in one tree."""
    costs = RoundCosts(((1, 1.0), (60, 1.3)), ((2, 0.2), (10, 0.2)), ((2, 0.3), (10, 0.3)))

    def settled(drafted, found):
        """`drafted` and `found`: how many tokens of the text the draft and the text itself guess each round."""
        chosen = TunedTrees(tiny_config(6, 10, 59, lookup=8), costs)
        for number in range(300):
            shape, text = chosen.choose(), [100 * number + i for i in range(9)]
            chain = [*text[:found], *[-1] * (8 - found)][: shape.lookup]
            depth = min(drafted, shape.depth)
            if not chain:
                tree, path = CandidateTree.root(torch.tensor([[0]])), [0]
            else:
                tree = CandidateTree.root(torch.tensor([[0]]))
                if shape.depth:
                    tree = straight(text[:depth] + [-2] * (shape.depth - depth))
                tree = tree.grafted(torch.tensor(chain)).trimmed()
                children, path = tree.children(), [0]
                while (node := children.get((path[-1], text[len(path) - 1]))) is not None:
                    path.append(node)
            chosen.observe(tree, path, chain)
        return chosen.choose()

    assert settled(0, 0) == PLAIN
    assert settled(0, 6) == settled(1, 6) == TreeShape(0, 0, 0, 8)
    assert settled(4, 0).depth >= 4 and settled(4, 1).depth >= 4


def straight(tokens):
    """A draft's tree that is one path."""
    numbers = torch.arange(len(tokens) + 1)
    parents = (numbers - 1).clamp(min=0)
    return CandidateTree(torch.tensor([[0, *tokens]]), parents[None], numbers[None], -0.1 * numbers[None])


def test_costs_are_interpolated():
    made = RoundCosts(((1, 1.0), (9, 2.0), (60, 4.0)), ((2, 0.1), (10, 0.5)), ((2, 0.2), (10, 0.6)))
    assert made.round(PLAIN) == 1.0
    assert made.round(TreeShape(1, 2, 4)) == pytest.approx(0.2 + 1.5)
    assert made.round(TreeShape(4, 6, 59)) == pytest.approx(0.4 + 3 * 0.3 + 4.0)
    assert made.round(TreeShape(1, 1, 200)) == pytest.approx(0.2 + 4.0)
    assert made.round(TreeShape(0, 0, 0, 8)) == 2.0
    assert made.round(TreeShape(1, 2, 4, 4)) == pytest.approx(0.2 + 2.0)


def test_costs_are_measured_once_and_stored(auto, cache, prompt, monkeypatch):
    model = tiny.build("llama")
    measured, measure = [], costs.measure
    monkeypatch.setattr(costs, "measure", lambda *args: measured.append(1) or measure(*args))

    def generate(**kwargs):
        torch.manual_seed(0)
        options = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
        tokens = model.generate(prompt, **options, **kwargs)
        return tokens.tolist(), torch.get_rng_state().tolist()

    plain = generate()
    assert generate(assistant_model=auto) == plain  # the measurement draws nothing from the generator
    (file,) = cache.iterdir()
    assert generate(assistant_model=auto) == plain and len(measured) == 1
    told = json.loads(file.read_text())
    assert [n for n, _ in told["verify"]] == [1, 2, 3, 6, 11, 21] and all(s > 0 for _, s in told["verify"])
    model.__dict__.pop("_fspad_costs")  # as another process
    generate(assistant_model=auto)
    assert len(measured) == 1 and model.__dict__["_fspad_costs"]
    for broken in ("{", "{}", '{"verify": [], "level": [], "first": []}', '{"verify": [[1, "x"]]}'):
        model.__dict__.pop("_fspad_costs")
        file.write_text(broken)
        generate(assistant_model=auto)
        assert json.loads(file.read_text())["verify"]  # measured anew, and written
    assert len(measured) == 5
    model.__dict__.pop("_fspad_costs")
    auto.config.tree_depth = 3
    generate(assistant_model=auto)  # another pair
    assert len(measured) == 6 and len(list(cache.iterdir())) == 2


def test_a_cache_folder_that_cannot_be_written(auto, tmp_path, prompt, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FSPAD_HF_CACHE", str(tmp_path / "file"))
    model = tiny.build("llama")
    plain = model.generate(prompt, max_new_tokens=8)
    assert model.generate(prompt, max_new_tokens=8, assistant_model=auto).tolist() == plain.tolist()
    assert model.__dict__["_fspad_costs"]


def test_fixed_trees_measure_nothing(llama, llama_draft, prompt, monkeypatch):
    def fails(*args):
        raise AssertionError("measured")

    monkeypatch.setattr(costs, "measure", fails)
    assert llama_draft.config.tree == "fixed"
    llama.generate(prompt, assistant_model=llama_draft, max_new_tokens=8)


def test_unknown(auto, llama, prompt):
    auto.config.tree = "best"
    with pytest.raises(ValueError, match="tree='best' is unknown: expected 'fixed' or 'auto'"):
        llama.generate(prompt, assistant_model=auto)
