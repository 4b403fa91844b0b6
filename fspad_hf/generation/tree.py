"""A draft tree as plain tensors; knows no model.

Shapes carry a batch dimension throughout. Node 0 is the root, the last token emitted; a parent always comes before its
children.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional


class TreeShape(NamedTuple):
    """
    How a tree is grown.

    Args:
        depth: levels below the root; with 0 there is nothing but the root, which is plain decoding.
        top_k: children of a node, and nodes expanded at each level.
        total_nodes: nodes kept, the root not counted.
        lookup: the most tokens of the text that are grafted on, beside the nodes kept.
    """

    depth: int
    top_k: int
    total_nodes: int
    lookup: int = 0

    @classmethod
    def of(cls, config) -> "TreeShape":
        """The shape that a resolved [`SpeculationConfig`] names: what is looked up is beside all of the nodes."""
        return cls(config.tree_depth, config.tree_top_k, config.tree_total_nodes, config.tree_lookup_tokens)

    def with_lookup(self, lookup: int) -> "TreeShape":
        """As large, but with so many tokens of the text in place of the last nodes."""
        nodes = self.total_nodes - lookup
        return self._replace(total_nodes=nodes, lookup=lookup) if nodes > 0 else TreeShape(0, 0, 0, lookup)

    @property
    def rows(self) -> int:
        """The most nodes there can be, the root counted."""
        return 1 + (self.total_nodes if self.depth else 0) + self.lookup

    @property
    def can_grow(self) -> bool:
        """Whether a tree of such a depth and width can have all of its nodes."""
        return self.total_nodes <= self.top_k + (self.depth - 1) * self.top_k**2


PLAIN = TreeShape(0, 0, 0)  # a plain step


@dataclass
class CandidateTree:
    """
    Beside the root, a node that is its own parent is padding: no path leads to it.

    Args:
        tokens (`[batch, nodes]`): token ids.
        parents (`[batch, nodes]`): index of each node's parent; the root's is 0.
        depths (`[batch, nodes]`): distance from the root.
        scores (`[batch, nodes]`): cumulative log-confidences, the root's 0, -inf of what no draft grew; `None` of a
            tree in which no draft grew anything.
    """

    tokens: torch.LongTensor
    parents: torch.LongTensor
    depths: torch.LongTensor
    scores: torch.Tensor | None = None

    @classmethod
    def chain(cls, tokens: torch.LongTensor) -> "CandidateTree":
        """Of each sequence the tokens (`[batch, nodes]`), each the child of the one before; the first is the root."""
        numbers = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return cls(tokens, (numbers - 1).clamp(min=0), numbers)

    def __len__(self) -> int:
        return self.tokens.shape[1]

    def clone(self) -> "CandidateTree":
        scores = None if self.scores is None else self.scores.clone()
        return CandidateTree(self.tokens.clone(), self.parents.clone(), self.depths.clone(), scores)

    def of(self, row: int) -> "CandidateTree":
        """One of the trees, as a batch of one."""
        parts = (self.tokens, self.parents, self.depths)
        scores = None if self.scores is None else self.scores[row : row + 1]
        return CandidateTree(*(part[row : row + 1] for part in parts), scores)

    @classmethod
    def stacked(cls, trees: Sequence["CandidateTree"]) -> "CandidateTree":
        """One batch of these, each of one sequence, with padding behind the smaller ones."""
        if len(trees) == 1:
            return trees[0]
        nodes = max(len(tree) for tree in trees)

        def padded(part: torch.Tensor, value: float = 0) -> torch.Tensor:
            return functional.pad(part, (0, nodes - part.shape[1]), value=value)

        numbers = torch.arange(nodes, device=trees[0].tokens.device)[None]
        scored = any(tree.scores is not None for tree in trees)
        none = float("-inf")
        return cls(
            torch.cat([padded(tree.tokens) for tree in trees]),
            torch.cat([torch.cat((tree.parents, numbers[:, len(tree) :]), dim=1) for tree in trees]),
            torch.cat([padded(tree.depths) for tree in trees]),
            torch.cat([
                padded(functional.pad(tree.scores.new_zeros(1, 1), (0, len(tree) - 1), value=none)
                       if tree.scores is None else tree.scores, none)
                for tree in trees
            ]) if scored else None,
        )  # fmt: skip

    def trimmed(self) -> "CandidateTree":
        """Without the padding; in a batch, without that which is behind all trees."""
        kept = ~self.is_padding()
        if kept.all():
            return self
        if len(kept) > 1:
            nodes = int(kept.any(0).nonzero().max()) + 1
            scores = None if self.scores is None else self.scores[:, :nodes]
            return CandidateTree(self.tokens[:, :nodes], self.parents[:, :nodes], self.depths[:, :nodes], scores)
        kept = kept[0]
        renumbered = kept.cumsum(0) - 1
        scores = None if self.scores is None else self.scores[:, kept]
        return CandidateTree(self.tokens[:, kept], renumbered[self.parents[:, kept]], self.depths[:, kept], scores)

    def is_padding(self) -> torch.BoolTensor:
        """`[batch, nodes]`."""
        numbers = torch.arange(len(self), device=self.parents.device)
        return (self.parents == numbers) & (numbers > 0)

    def grafted(self, chains: torch.LongTensor, counts: torch.LongTensor | None = None) -> "CandidateTree":
        """
        With a path for each chain below its root: the nodes that the tree has of it, and new ones behind them, padding
        where fewer are needed. Waits for no value, so that a graph can hold it.

        Args:
            chains (`[batch, tokens]`): token ids.
            counts (`[batch, 1]`): how many of them there are, the rest being padding; `None` is all.
        """
        length, nodes = chains.shape[1], len(self)
        counts = torch.full_like(chains[:, :1], length) if counts is None else counts
        steps = torch.arange(length, device=chains.device)
        wanted = torch.cat((self.tokens[:, :1], chains), dim=1).gather(1, self.depths.clamp(max=length))
        fits = (self.tokens == wanted) & (self.depths <= counts)
        shared = (fits[:, None] | ~self.ancestors()).all(-1) & ~self.is_padding()
        matched, last = torch.where(shared, self.depths, -1).max(-1, keepdim=True)  # siblings differ, so it is a path
        new, numbers = matched + steps < counts, (nodes + steps).expand_as(chains)
        parents = torch.where(new, torch.cat((last, numbers[:, :-1]), dim=1), numbers)
        tokens, depths = chains.gather(1, (matched + steps).clamp(max=length - 1)), matched + 1 + steps
        scores = None if self.scores is None else functional.pad(self.scores, (0, length), value=float("-inf"))
        return CandidateTree(
            torch.cat((self.tokens, tokens), dim=1), torch.cat((self.parents, parents), dim=1),
            torch.cat((self.depths, torch.where(new, depths, 0)), dim=1), scores,
        )  # fmt: skip

    def ancestors(self) -> torch.BoolTensor:
        """`[batch, nodes, nodes]`: True where the column is the row's node itself or one of its ancestors."""
        batch, nodes = self.tokens.shape
        device = self.tokens.device
        seen = torch.eye(nodes, dtype=torch.bool, device=device).repeat(batch, 1, 1)
        above, rows = self.parents, torch.arange(batch, device=device)[:, None]
        for _ in range((nodes - 1).bit_length()):  # each time twice as many generations, and never more than nodes
            seen = seen | seen[rows, above]
            above = above[rows, above]
        return seen

    def attention_mask(
        self, shown: torch.BoolTensor, ends: torch.LongTensor, dtype: torch.dtype, window: int | None = None
    ) -> torch.Tensor:
        """
        The float mask of one verification forward, `[batch, 1, nodes, columns]`: 0 where a node may look, the dtype's
        minimum elsewhere. Float, because eager and flex attention add masks and take no bool.

        Args:
            shown (`[batch, columns]`): False on padding.
            ends (`[batch, 1]`): the columns that each sequence has before its root; the nodes' follow.
            window: sliding window in positions; keys this far back or further are hidden.
        """
        columns = torch.arange(shown.shape[1], device=shown.device)
        slots = ends + torch.arange(len(self), device=shown.device)
        visible = (shown & (columns < ends))[:, None].repeat(1, len(self), 1)
        visible.scatter_(2, slots[:, None].expand(-1, len(self), -1), self.ancestors())
        if window is not None:
            places = ends + self.depths  # in the sequence, where a column is in the arena
            keys = columns.repeat(len(shown), 1).scatter_(1, slots, places)
            visible &= places[:, :, None] - keys[:, None] < window
        return additive_mask(visible, dtype)

    def children(self, row: int = 0) -> dict[tuple[int, int], int]:
        """(parent, token) -> node, on the host."""
        tokens, parents = self.tokens[row].tolist(), self.parents[row].tolist()
        return {(parents[node], tokens[node]): node for node in range(1, len(self)) if parents[node] != node}


def additive_mask(visible: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    """`[rows, queries, keys]` bool to `[rows, 1, queries, keys]` float."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


@dataclass
class GrownTrees:
    """
    All nodes below the roots of some trees, in level order, before the best are kept.

    Args:
        tokens, parents, scores (`[trees, grown]`): `parents` counts the root as 0 and the first of these nodes as 1.
        depths (`[grown]`): the same in all trees.
        total: how many nodes a tree keeps.
    """

    tokens: torch.LongTensor
    parents: torch.LongTensor
    depths: torch.LongTensor
    scores: torch.Tensor
    total: int

    def cpu(self) -> "GrownTrees":
        parts = self.tokens, self.parents, self.depths, self.scores
        return GrownTrees(*(part.cpu() for part in parts), self.total)

    def best(self, roots: torch.LongTensor, number: int | None = None, total: int | None = None) -> CandidateTree:
        """
        The trees of the `total` best nodes (EAGLE-2's rerank), with padding where there are not so many.

        Args:
            roots (`[trees, 1]`): their tokens.
            number: only this one of the trees.
        """
        trees = slice(None) if number is None else slice(number, number + 1)
        tokens, parents, scores = self.tokens[trees], self.parents[trees], self.scores[trees]
        kept, counts = best_nodes(scores, self.total if total is None else total)
        numbers = torch.arange(1, kept.shape[1] + 1, device=tokens.device).expand_as(kept)
        renumbered = torch.zeros_like(functional.pad(tokens, (1, 0))).scatter_(1, kept + 1, numbers)
        parents = torch.where(counts, renumbered.gather(1, parents.gather(1, kept)), numbers)
        return CandidateTree(
            torch.cat((roots, tokens.gather(1, kept)), dim=1), functional.pad(parents, (1, 0)),
            functional.pad(self.depths[kept], (1, 0)), functional.pad(scores.gather(1, kept), (1, 0)),
        )  # fmt: skip


def best_nodes(scores: torch.Tensor, total: int) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """
    The indices of the `total` best nodes of each tree in level order, `[trees, total]`, and which of them count: those
    with a score of -inf or NaN do not, and stand at the end.

    `scores` (`[trees, nodes]`) are cumulative log-confidences in level order. A child never scores above its parent
    but can tie with it (a log-probability that rounds to 0); the stable sort takes the parent first, so it is always
    kept.
    """
    nodes = scores.shape[-1]
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    values, order = torch.sort(scores, descending=True, stable=True)
    kept = torch.where(values > float("-inf"), order, order + nodes)[:, :total].sort().values
    return kept % nodes, kept < nodes
