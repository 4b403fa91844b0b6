"""`tree="auto"`: each round's tree is the one that promises most tokens a second.

What a tree costs is measured once, see [`RoundCosts`]; what it yields is learned from the accepted paths of the call,
and from nothing else, so that a run repeats. A round that accepted a path through a large tree tells what every
smaller one would have accepted: the same path, as far as its nodes are among that tree's. Trees are tried from the
shallowest on, and a level more only once a path has reached the end of a tree, so that a draft that guesses badly is
found out by cheap ones. What is looked up in the text is part of every tree but a plain step's, and may be all of it.
"""

import math
from collections.abc import Sequence
from itertools import takewhile

from ..modeling_fspad import FSPADDraftModel
from .costs import RoundCosts, round_costs
from .target import Target
from .tree import PLAIN, CandidateTree, TreeShape

MEMORY = 0.95  # of what is known of a shape, at each round that tells something new
PRIOR = 0.6  # chance that a level is accepted, before anything is known; worth one round
LOOK_UP = 64  # rounds of smaller trees after which the largest is tried again
FIRST_PAUSE = 64  # plain tokens after which speculation is tried again; twice as many each time


class FixedTrees:
    """Every round's tree has the configuration's shape."""

    def __init__(self, config):
        self.shape = TreeShape.of(config)

    def choose(self) -> TreeShape:
        return self.shape

    def observe(self, tree: CandidateTree, path: list[int], chain: Sequence[int] = ()):
        """Nothing to learn."""


class TunedTrees:
    """
    Chooses each round's shape among [`ladder`], by expected tokens over measured seconds.

    Args:
        config: a [`FSPADConfig`]; its tree is the largest that is grown.
        costs: of this draft and target, on this device.
    """

    def __init__(self, config, costs: RoundCosts):
        self.shapes = ladder(config)
        self.seconds = {shape: costs.round(shape) for shape in self.shapes}
        self._rounds = dict.fromkeys(self.shapes, 1.0)
        self._tokens = {s: sum(PRIOR**level for level in range(s.depth + 1)) for s in self.shapes}
        self._shape, self._plain, self._small, self._pause = PLAIN, 0, 0, FIRST_PAUSE
        self._depth = 1  # of the deepest trees that are tried

    def choose(self) -> TreeShape:
        """The next round's shape; a `depth` of 0 is a plain step."""
        tried = [shape for shape in self.shapes if shape.depth <= self._depth]
        best, largest = max(tried, key=self._speed), tried[-1]
        if best == PLAIN and self._plain >= self._pause:
            best, self._pause = max(tried[1:], key=self._speed), 2 * self._pause
        elif best != PLAIN and self._small >= LOOK_UP:
            best = largest
        self._plain = self._plain + 1 if best == PLAIN else 0
        self._small = 0 if best == largest else self._small + (best != PLAIN)
        self._shape = best
        return best

    def observe(self, tree: CandidateTree, path: list[int], chain: Sequence[int] = ()):
        """
        Learns from a round.

        Args:
            path: the nodes of `tree` at which tokens were drawn, the root first.
            chain: the tokens looked up.
        """
        grown = self._shape
        needed = _needed(tree, path)
        looked_up = _common(tree.tokens[0, path[1:]].tolist(), chain)
        for shape in self.shapes[1:]:
            if all(ours <= theirs for ours, theirs in zip(shape, grown, strict=True)):
                accepted = 1 + max(_within(shape, needed), looked_up)
                self._rounds[shape] = MEMORY * self._rounds[shape] + 1
                self._tokens[shape] = MEMORY * self._tokens[shape] + accepted
        if grown.depth and _within(grown, needed) >= grown.depth:
            self._climb(grown)

    def _climb(self, reached: TreeShape):
        """A path has reached a tree's end: trees one level deeper may be tried, and promise more than this one."""
        self._depth = max(self._depth, reached.depth + 1)
        promise = self._tokens[reached] / self._rounds[reached] + PRIOR
        for shape in self.shapes:
            if shape.depth == reached.depth + 1 and self._rounds[shape] == 1.0:  # not tried yet
                self._tokens[shape] = max(self._tokens[shape], promise)

    def _speed(self, shape: TreeShape) -> float:
        return self._tokens[shape] / self._rounds[shape] / self.seconds[shape]


def ladder(config) -> list[TreeShape]:
    """
    Plain decoding first, then what is looked up alone, then every depth with about every halving of the
    configuration's nodes; itself last.
    """
    largest = depth, top_k, total_nodes, lookup = TreeShape.of(config)
    shapes = {largest, TreeShape(0, 0, 0, lookup)}
    nodes = total_nodes
    while nodes >= 2:
        width = max(math.ceil(top_k * math.sqrt(nodes / total_nodes)), 1)
        for levels in range(1, min(depth, nodes) + 1):
            reach = width + (levels - 1) * width**2
            shapes.add(TreeShape(levels, width, min(nodes, reach), lookup))
        nodes //= 2
    return [PLAIN, *sorted(shapes - {PLAIN}, key=lambda shape: (shape.total_nodes, shape))]


def _needed(tree: CandidateTree, path: list[int]) -> list[TreeShape]:
    """
    For each accepted node of a path that the draft grew the smallest shape that surely has it: its depth, its place
    among its siblings or its parent's among the nodes of its level, and its place among all nodes, by score.

    A narrower tree grows less, so places in it are the same or better.
    """
    if tree.scores is None:
        return []
    scores, parents, depths = (part[0].tolist() for part in (tree.scores, tree.parents, tree.depths))
    path = [node for node in path if scores[node] > float("-inf")]

    def place(node: int, among) -> int:
        return 1 + sum((-scores[other], other) < (-scores[node], node) for other in among if other != node)

    nodes, needed, expanded = range(1, len(tree)), [], 1
    for node in path[1:]:
        siblings = [other for other in nodes if parents[other] == parents[node]]
        needed.append(TreeShape(depths[node], max(place(node, siblings), expanded), place(node, nodes)))
        expanded = place(node, [other for other in nodes if depths[other] == depths[node]])
    return needed


def _within(shape: TreeShape, needed: list[TreeShape]) -> int:
    """How many of a path's nodes the draft would have grown in a tree of such a shape."""
    return len(list(takewhile(lambda one: all(a <= b for a, b in zip(one[:3], shape[:3], strict=True)), needed)))


def _common(these: Sequence[int], those: Sequence[int]) -> int:
    """Length of the common beginning."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(these, those, strict=False))))


def trees_of(target: Target, draft: FSPADDraftModel) -> FixedTrees | TunedTrees:
    """The trees of a call, as the draft's configuration wants them."""
    if draft.config.tree == "auto":
        return TunedTrees(draft.config, round_costs(target, draft))
    return FixedTrees(draft.config)
