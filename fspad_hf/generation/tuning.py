"""Which tree a round verifies.

With `tree="auto"` it is the one that promises most tokens a second. What trees cost is learned from the rounds, see
[`RoundCosts`]; what they yield, from the accepted paths of the call. A round that accepted a path through a large tree
tells what every smaller one would have accepted: the same path, as far as its nodes are among that tree's. Trees are
tried from the shallowest on, and a level more only once a path has reached the end of a tree, so that a draft that
guesses badly is found out by cheap ones. The tokens looked up in the text take the places of the draft's last nodes
where they promise more.
"""

import math
from collections.abc import Sequence
from itertools import takewhile

from ..runtime import common_prefix
from .costs import RoundCosts
from .lookup import Found
from .tree import PLAIN, CandidateTree, TreeShape

MEMORY = 0.95  # of what is known of a shape, at each round that tells something new
PRIOR = 0.6  # chance that a level is accepted, before anything is known; worth one round
LOOKED_UP = {1: 0.15, 2: 0.4, 3: 0.6}  # the same of a token looked up, by the length of the match; worth four tokens
LOOK_UP = 64  # rounds of smaller trees after which the largest is tried again
FIRST_PAUSE = 64  # plain tokens after which speculation is tried again; twice as many each time
NOTHING = Found()


class FixedTrees:
    """Every round's tree has the size of the settings."""

    def __init__(self, settings):
        self.shape = TreeShape.of(settings)

    def choose(self, found: Found = NOTHING, reread: int = 0) -> TreeShape:
        return self.shape.with_lookup(self.shape.lookup if found.tokens else 0)

    def observe(self, tree: CandidateTree, path: list[int], found: Found, emitted: Sequence[int]):
        """Nothing to learn."""


class TunedTrees:
    """
    Chooses each round's shape among [`ladder`], by expected tokens over seconds.

    Args:
        settings: a resolved [`SpeculationConfig`]; its tree is the largest that is grown.
        costs: of this draft and target, on this device.
    """

    def __init__(self, settings, costs: RoundCosts):
        self.shapes, self.costs, self.lookup = ladder(settings), costs, TreeShape.of(settings).lookup
        self._rounds = dict.fromkeys(self.shapes, 1.0)
        self._tokens = {s: sum(PRIOR**level for level in range(s.depth + 1)) for s in self.shapes}
        self._right = {match: 4 * chance for match, chance in LOOKED_UP.items()}  # of the tokens looked up
        self._checked = dict.fromkeys(LOOKED_UP, 4.0)
        self._shape, self._plain, self._small, self._pause = PLAIN, 0, 0, FIRST_PAUSE
        self._depth = 1  # of the deepest trees that are tried

    def choose(self, found: Found = NOTHING, reread: int = 0) -> TreeShape:
        """
        The next round's shape; without a depth and a lookup it is a plain step.

        Args:
            found: what the text itself offers.
            reread: rows that the forward has besides, of tokens that were read before.
        """

        def speed(shape: TreeShape) -> float:
            return self._speed(shape, reread)

        tried = [shape for shape in self.shapes if shape.depth <= self._depth]
        best, largest = max(tried, key=speed), tried[-1]
        if best == PLAIN and self._plain >= self._pause:
            best, self._pause = max(tried[1:], key=speed), 2 * self._pause
        elif best != PLAIN and self._small >= LOOK_UP:
            best = largest
        self._plain = self._plain + 1 if best == PLAIN else 0
        self._small = 0 if best == largest else self._small + (best != PLAIN)
        most = min(len(found.tokens), self.lookup)
        if most:
            right = self._right[found.match] / self._checked[found.match]
            options = [best] if best.top_k == 1 else [best, best.with_lookup(min(most, best.total_nodes // 2))]
            options += [TreeShape(0, 0, 0, n) for n in {min(most, size) for size in _halvings(self.lookup)}]
            best = max(options, key=lambda shape: self._speed(shape, reread, right))
        self._shape = best
        return best

    def observe(self, tree: CandidateTree, path: list[int], found: Found, emitted: Sequence[int]):
        """
        Learns from a round.

        Args:
            path: the nodes of `tree` at which tokens were drawn, the root first.
            found: what the text offered, verified or not.
            emitted: the tokens drawn.
        """
        if found.tokens:
            right = common_prefix(found.tokens, emitted)
            checked = min(right + 1, len(found.tokens), len(emitted))
            self._right[found.match] = MEMORY * self._right[found.match] + right
            self._checked[found.match] = MEMORY * self._checked[found.match] + checked
        grown = self._shape
        if not grown.depth:
            return
        needed = _needed(tree, path)
        for shape in self.shapes[1:]:
            if all(ours <= theirs for ours, theirs in zip(shape[:3], grown[:3], strict=True)):
                self._rounds[shape] = MEMORY * self._rounds[shape] + 1
                self._tokens[shape] = MEMORY * self._tokens[shape] + 1 + _within(shape, needed)
        if _within(grown, needed) >= grown.depth:
            self._climb(grown)

    def _climb(self, reached: TreeShape):
        """A path has reached a tree's end: trees one level deeper may be tried, and promise more than this one."""
        self._depth = max(self._depth, reached.depth + 1)
        promise = self._yield(reached) + PRIOR
        for shape in self.shapes:
            if shape.depth == reached.depth + 1 and self._rounds[shape] == 1.0:  # not tried yet
                self._tokens[shape] = max(self._tokens[shape], promise)

    def _yield(self, shape: TreeShape) -> float:
        """Tokens a round, of what the draft grows alone; a shape between the ladder's steps yields what they do."""
        if shape not in self._rounds:
            below = [s for s in self.shapes if all(a <= b for a, b in zip(s[:3], shape[:3], strict=True))]
            return max(self._tokens[s] / self._rounds[s] for s in below)
        return self._tokens[shape] / self._rounds[shape]

    def _speed(self, shape: TreeShape, reread: int = 0, right: float = 0.0) -> float:
        """Expected tokens a second, if a token looked up is right with such a chance."""
        drafted, tokens = self._yield(shape._replace(lookup=0)) - 1, 1.0
        likely = drafted / (1 + drafted)  # of a level to be accepted, were the tree endless
        for level in range(1, max(shape.depth, shape.lookup) + 1):
            missed = 1 - right**level if level <= shape.lookup else 1.0
            tokens += 1 - missed * (1 - likely**level)
        return (tokens if shape.lookup else 1 + drafted) / max(self.costs.round(shape, reread), 1e-9)


def trees_of(settings, costs: RoundCosts | None) -> FixedTrees | TunedTrees:
    """The trees of a call; without costs they are all of one size."""
    return FixedTrees(settings) if costs is None else TunedTrees(settings, costs)


def ladder(settings) -> list[TreeShape]:
    """
    Plain decoding first, then every depth with about every halving of the nodes; the settings' own tree last. Few
    sizes, for a number of rows costs some time when it is first seen.
    """
    largest = TreeShape.of(settings).with_lookup(0)
    shapes = {largest}
    if largest.top_k == 1:  # chains
        return [PLAIN, *(TreeShape(depth, 1, depth) for depth in range(1, largest.depth + 1))]
    for nodes in _halvings(largest.total_nodes):
        for depth in range(1, min(largest.depth, nodes) + 1):
            wide = math.ceil(largest.top_k * math.sqrt(nodes / largest.total_nodes))
            shape = next(
                (s for k in range(wide, largest.top_k + 1) if (s := TreeShape(depth, k, nodes)).can_grow), None
            )
            shapes |= {shape} - {None}
    return [PLAIN, *sorted(shapes, key=lambda shape: (shape.total_nodes, shape))]


def _halvings(size: int) -> list[int]:
    """31, 15, 7, 3: so that with the root there are powers of two."""
    sizes = [size]
    while sizes[-1] > 3:
        sizes.append(sizes[-1] // 2)
    return sizes


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
