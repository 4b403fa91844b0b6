"""Trees at many places of a text that is known, grown side by side: on a GPU as fast as one of them."""

from dataclasses import dataclass

import torch

from ..generation.candidate_generator import FSPADCandidateGenerator, additive_mask
from ..generation.tree import CandidateTree, TreeShape, prune
from ..modeling_fspad import FSPADDraftOutput

TREES_AT_ONCE = 64
LOGITS_AT_ONCE = 1 << 26


@dataclass
class GrownTrees:
    """
    The nodes of many trees in level order, on the CPU, before the best are kept.

    Args:
        tokens, parents, scores (`[trees, grown]`), depths (`[grown]`): as [`prune`] takes them.
        total: how many nodes a tree keeps.
    """

    tokens: torch.LongTensor
    parents: torch.LongTensor
    depths: torch.LongTensor
    scores: torch.Tensor
    total: int

    def tree(self, number: int, root: int, total: int | None = None) -> CandidateTree:
        """One of the trees, below the token `root`; with `total`, its so many best nodes."""
        tokens, parents, scores = (part[number] for part in (self.tokens, self.parents, self.scores))
        total = self.total if total is None else total
        if not len(tokens) or not total:
            return CandidateTree.root(torch.tensor([[root]]))
        return prune(torch.tensor([[root]]), tokens, parents, self.depths, scores, total).trimmed()


class ManyTrees(FSPADCandidateGenerator):
    """The draft over a known text: all of it is accepted at once, and each tree is shown what is before its root."""

    @property
    def at_once(self) -> int:
        """How many trees to grow at a time."""
        config = self.draft.config
        width = self.settings.tree_top_k * (config.draft_vocab_size or config.vocab_size)
        return min(max(LOGITS_AT_ONCE // width, 1), TREES_AT_ONCE)

    @torch.no_grad()
    def grow_at(
        self, read: FSPADDraftOutput, places: range, shape: TreeShape, noise: torch.Tensor | None
    ) -> GrownTrees:
        """
        [`~FSPADCandidateGenerator.grow`] below the last token of each of the pairs `places`.

        The trees' nodes are queries of one row; a mask keeps each tree to its own nodes and to the pairs up to its
        root's.

        Args:
            read: what [`~FSPADCandidateGenerator.accept`] returned of the text.
            noise (`[rows, V]`): row i + d decides the token at depth d + 1 of tree i; `None` drafts uncoupled.
        """
        (depth, k, total, _), trees, device = shape, len(places), self.draft.device
        here, start = slice(places.start, places.stop), self.cache.length
        at = torch.arange(places.start, places.stop, device=device)
        if depth < 1:
            none = torch.zeros(trees, 0, dtype=torch.long)
            return GrownTrees(none, none, none[0], none.float(), total)
        confidences, tokens = self._children(read.logit_features[:, here], k, _rows(noise, 0, trees, 1), 0)
        scores, tokens = confidences[0], tokens[0]  # [trees, k]
        features = read.features[0, here, None].expand(-1, k, -1)  # [trees, k, hidden]
        nodes = torch.arange(1, k + 1, device=device).expand(trees, k)
        past = (torch.arange(start, device=device) <= at[:, None])[:, None].expand(-1, k, -1)  # [trees, k, start]
        own = torch.eye(trees, dtype=torch.bool, device=device)[:, None, None, :, None]
        seen = torch.zeros(trees, k, 0, k, dtype=torch.bool, device=device)  # [trees, k, levels, k]
        levels, grown = [(tokens, torch.zeros_like(nodes), scores)], k
        for level in range(1, depth):
            itself = torch.eye(k, dtype=torch.bool, device=device)[:, None].expand(trees, k, 1, k)
            seen = torch.cat((seen, itself), dim=2)
            mask = torch.cat((past, (seen[:, :, :, None] & own).flatten(2)), dim=-1).flatten(0, 1)
            self.cache.length = start + (level - 1) * trees * k
            positions = (at + level)[:, None].expand(-1, k).flatten()[None]
            mask = additive_mask(mask, self.draft.dtype)
            out = self._step(tokens.flatten()[None], features.flatten(0, 1)[None], positions, mask)
            confidences, tokens = self._children(out.logit_features, k, _rows(noise, level, trees, k), level)
            grown_scores, tokens = (
                (scores[..., None] + confidences.view(trees, k, k)).flatten(1),
                tokens.view(trees, -1),
            )
            levels.append((tokens, nodes.repeat_interleave(k, dim=1), grown_scores))
            best = grown_scores.nan_to_num(nan=float("-inf"), neginf=float("-inf")).topk(k).indices  # [trees, k]
            parents, each = best // k, torch.arange(trees, device=device)[:, None]
            scores, tokens, nodes = grown_scores.gather(1, best), tokens.gather(1, best), 1 + grown + best
            features, seen = out.features.view(trees, k, -1)[each, parents], seen[each, parents]
            grown += k * k
        self.cache.length = start
        depths = torch.cat([torch.full_like(part[0][0], level + 1) for level, part in enumerate(levels)]).cpu()
        tokens, parents, scores = (torch.cat(parts, dim=1).cpu() for parts in zip(*levels, strict=True))
        return GrownTrees(tokens, parents, depths, scores, total)


def _rows(noise: torch.Tensor | None, depth: int, trees: int, nodes: int) -> dict[int, torch.Tensor] | None:
    """The row of each node of one depth, `[trees * nodes, V]`, by that depth."""
    if noise is None:
        return None
    return {depth: noise[depth : depth + trees].repeat_interleave(nodes, dim=0)}
