import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fspad_hf.generation.tree import CandidateTree, GrownTrees, best_nodes

ROOT = torch.tensor([[7]])
INF = float("inf")


@st.composite
def grown(draw):
    """Levels of nodes with non-increasing cumulative scores, many of them tied, -inf or NaN."""
    parents, depths, scores = [], [], []
    level = [(0, 0.0)]
    for depth in range(1, draw(st.integers(1, 5)) + 1):
        nodes = []
        for parent, score in level:
            for _ in range(draw(st.integers(1, 3))):
                step = draw(st.sampled_from([0.0, 0.0, -1e-9, -0.5, -2.0, -INF, float("nan")]))
                parents.append(parent), depths.append(depth), scores.append(score + step)
                nodes.append((len(parents), score + step))
        level = nodes[: draw(st.integers(1, 4))]
    return torch.tensor(parents), torch.tensor(depths), torch.tensor(scores, dtype=torch.float32)


@settings(deadline=None, max_examples=300)
@given(grown(), st.integers(1, 20))
def test_every_kept_node_keeps_its_parent(nodes, total):
    parents, depths, scores = nodes
    kept, counts = (part[0] for part in best_nodes(scores[None], total))
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    padded, kept = len(kept), kept[counts]
    ids = set((kept + 1).tolist())
    assert len(ids) <= total
    assert all(int(parents[i]) in ids | {0} for i in kept)
    assert torch.isfinite(scores[kept]).all()
    finite = scores[torch.isfinite(scores)]
    assert len(kept) == min(total, len(finite))
    if len(kept):
        assert scores[kept].min() >= torch.sort(finite, descending=True).values[len(kept) - 1]
    tree = GrownTrees(torch.arange(len(parents))[None], parents[None], depths, scores[None], total).best(ROOT)
    assert len(tree) == 1 + padded == 1 + min(total, len(scores))
    tree = tree.trimmed()
    assert len(tree) == 1 + len(kept)
    for node in range(1, len(tree)):
        assert tree.depths[0, node] == tree.depths[0, tree.parents[0, node]] + 1
        assert tree.parents[0, node] < node


@settings(deadline=None, max_examples=100)
@given(grown(), st.integers(0, 6), st.one_of(st.none(), st.integers(1, 5)), st.integers(0, 3))
def test_mask_shows_ancestors_and_the_prefix_within_the_window(nodes, length, window, spare):
    """With so many `spare` columns behind the nodes', and stale ones where these are to be."""
    parents, depths, scores = nodes
    tree = GrownTrees(torch.arange(len(parents))[None], parents[None], depths, scores[None], 30).best(ROOT)
    prefix = torch.arange(length)[None] % 4 != 1
    columns = torch.cat((prefix, torch.ones(1, len(tree) + spare, dtype=torch.bool)), dim=-1)
    visible = tree.attention_mask(columns, torch.tensor([[length]]), torch.float32, window)[0, 0] == 0
    assert not visible[:, length + len(tree) :].any()
    padding = {node for node in range(1, len(tree)) if int(tree.parents[0, node]) == node}
    for node in range(len(tree)):
        path, at = {node}, node
        while at not in padding | {0}:
            at = int(tree.parents[0, at])
            path.add(at)
        position = length + int(tree.depths[0, node])
        for column in range(length + len(tree)):
            if column < length:
                seen, where = bool(prefix[0, column]), column
            else:
                seen, where = column - length in path, length + int(tree.depths[0, column - length])
            assert visible[node, column] == (seen and (window is None or position - where < window))


def test_a_plain_topk_would_orphan_ties():
    """The trap itself: a child that ties with its parent, and room for one of them."""
    assert best_nodes(torch.tensor([[-1.0, 0.0, 0.0, -3.0]]), 1)[0].tolist() == [[1]]
    assert best_nodes(torch.full((1, 50), 0.0), 20)[0].tolist() == [list(range(20))]


def test_a_batch_of_trees():
    tree = CandidateTree(
        torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]),
        torch.tensor([[0, 0, 1, 1], [0, 0, 0, 2]]),
        torch.tensor([[0, 1, 2, 2], [0, 1, 1, 2]]),
    )
    seen = tree.ancestors().int().tolist()
    assert seen[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert seen[1] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    assert tree.children(1) == {(0, 2): 1, (0, 3): 2, (2, 4): 3}
