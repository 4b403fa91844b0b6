"""A draft tree as plain tensors; knows no model.

Shapes carry a batch dimension throughout. Node 0 is the root, the last token emitted; nodes stand in level order, so a
parent always comes before its children.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class TreeShape(NamedTuple):
    """
    How a tree is grown.

    Args:
        depth: levels below the root; with 0 there is nothing but the root, which is plain decoding.
        top_k: children of a node, and nodes expanded at each level.
        total_nodes: nodes kept, the root not counted.
    """

    depth: int
    top_k: int
    total_nodes: int

    @classmethod
    def of(cls, config) -> "TreeShape":
        """The shape that an [`FSPADConfig`] names."""
        return cls(config.tree_depth, config.tree_top_k, config.tree_total_nodes)


@dataclass
class CandidateTree:
    """
    Args:
        tokens (`[batch, nodes]`): token ids.
        parents (`[batch, nodes]`): index of each node's parent; the root's is 0.
        depths (`[batch, nodes]`): distance from the root.
        scores (`[batch, nodes]`): cumulative log-confidences, the root's 0; `None` for trees that no draft grew.
    """

    tokens: torch.LongTensor
    parents: torch.LongTensor
    depths: torch.LongTensor
    scores: torch.Tensor | None = None

    @classmethod
    def root(cls, tokens: torch.LongTensor) -> "CandidateTree":
        """A tree of nothing but its root; `tokens` is `[batch, 1]`."""
        return cls(tokens, torch.zeros_like(tokens), torch.zeros_like(tokens))

    def __len__(self) -> int:
        return self.tokens.shape[1]

    def to(self, device: torch.device) -> "CandidateTree":
        scores = None if self.scores is None else self.scores.to(device)
        return CandidateTree(self.tokens.to(device), self.parents.to(device), self.depths.to(device), scores)

    def ancestors(self) -> torch.BoolTensor:
        """`[batch, nodes, nodes]`: True where the column is the row's node itself or one of its ancestors."""
        batch, nodes = self.tokens.shape
        identity = torch.eye(nodes, dtype=torch.bool, device=self.tokens.device)
        seen = identity.repeat(batch, 1, 1)
        at, rows = self.parents, torch.arange(batch, device=self.tokens.device)[:, None]
        for _ in range(int(self.depths.max()) if nodes else 0):
            seen = seen | identity[at]
            at = self.parents[rows, at]
        return seen

    def attention_mask(self, prefix: torch.BoolTensor, dtype: torch.dtype, window: int | None = None) -> torch.Tensor:
        """
        The float mask of one verification forward, `[batch, 1, nodes, length + nodes]`: 0 where a node may look, the
        dtype's minimum elsewhere. Float, because eager and flex attention add masks and take no bool.

        Args:
            prefix (`[batch, length]`): False on padding.
            window: sliding window in positions; keys this far back or further are hidden.
        """
        nodes, length = len(self), prefix.shape[1]
        visible = torch.cat((prefix[:, None].expand(-1, nodes, -1), self.ancestors()), dim=-1)
        if window is not None:
            columns = torch.arange(length, device=prefix.device).expand_as(prefix)
            keys = torch.cat((columns, length + self.depths), dim=-1)  # as positions in the sequence, not slots
            visible = visible & ((length + self.depths)[:, :, None] - keys[:, None] < window)
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

    def children(self, row: int = 0) -> dict[tuple[int, int], int]:
        """(parent, token) -> node, on the host."""
        tokens, parents = self.tokens[row].tolist(), self.parents[row].tolist()
        return {(parents[node], tokens[node]): node for node in range(1, len(self))}


def best_nodes(scores: torch.Tensor, total: int) -> torch.LongTensor:
    """
    The indices of the `total` best nodes, in level order, `[kept]`; fewer where scores are -inf or NaN.

    `scores` (`[nodes]`) are cumulative log-confidences in level order. A child never scores above its parent but can
    tie with it (a log-probability that rounds to 0); the stable sort takes the parent first, so it is always kept.
    """
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    values, order = torch.sort(scores, descending=True, stable=True)
    return order[:total][values[:total] > float("-inf")].sort().values


def prune(
    root: torch.LongTensor, tokens: torch.LongTensor, parents: torch.LongTensor, depths: torch.LongTensor,
    scores: torch.Tensor, total: int,
) -> CandidateTree:  # fmt: skip
    """
    The tree of the `total` best of all nodes grown (EAGLE-2's rerank).

    Args:
        root (`[1, 1]`): the root's token.
        tokens, parents, depths, scores (`[grown]`): the nodes below the root in level order; `parents` counts the root
            as 0 and the first of these nodes as 1.
    """
    kept = best_nodes(scores, total)
    renumbered = torch.zeros(len(tokens) + 1, dtype=torch.long, device=tokens.device)
    renumbered[kept + 1] = torch.arange(1, len(kept) + 1, device=tokens.device)
    zero = torch.zeros(1, dtype=torch.long, device=tokens.device)
    return CandidateTree(
        torch.cat((root[0], tokens[kept]))[None],
        torch.cat((zero, renumbered[parents[kept]]))[None],
        torch.cat((zero, depths[kept]))[None],
        torch.cat((scores.new_zeros(1), scores[kept]))[None],
    )
