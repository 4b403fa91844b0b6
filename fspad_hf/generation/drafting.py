"""The draft at work: grows dynamic trees (EAGLE-2, arXiv 2406.16858, section 4) from the target's true features."""

import copy
from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ..modeling_fspad import FSPADDraftModel, FSPADDraftOutput
from ..speculation_config import SpeculationConfig
from .cache import ArenaCache
from .remembered import Remembered
from .target import Target
from .tree import CandidateTree, GrownTrees, TreeShape
from .twin import twin
from .verification import NoiseQueue

# Functions of the scores alone, so the draft's distribution can be put through them as the target's is.
STATIC_WARPERS = (
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper,
    TypicalLogitsWarper, EpsilonLogitsWarper, EtaLogitsWarper,
)  # fmt: skip
LARGE = 1e30


class Drafter:
    """
    One call's draft: reads the text ([`~Drafter.accept`]) and grows trees behind it ([`~Drafter.grow`]).

    Args:
        draft: the draft; if its dtype or device is not the features', a copy that is.
        target: the call's view of the target.
        logits_processor: the call's processors, of which the static warpers shape coupled drafting.
        noise: the coming draws; `None` drafts uncoupled.
        settings: resolved; by default the draft's.
    """

    def __init__(
        self,
        draft: FSPADDraftModel,
        target: Target,
        logits_processor: LogitsProcessorList | None = None,
        noise: NoiseQueue | None = None,
        settings: SpeculationConfig | None = None,
    ):
        self.settings = settings or draft.speculation_settings(target.device)
        self.target = target
        self.draft = draft
        self.warpers = LogitsProcessorList(p for p in logits_processor or () if type(p) in STATIC_WARPERS)
        self.noise = noise if self.settings.coupled_drafting else None
        self.cache = ArenaCache(num_layers=1)
        self._network: FSPADDraftModel | None = None  # what runs: the twin of the draft
        self._last: FSPADDraftOutput | None = None  # of the pair read last, whose token is the next tree's root

    @torch.no_grad()
    def accept(
        self, features: torch.Tensor, tokens: torch.LongTensor, counts: list[int] | torch.LongTensor | None = None
    ) -> FSPADDraftOutput:
        """
        Takes in true pairs (f_t, token t+1), the last token of a text being its next tree's root.

        The draft's keys and values of accepted tokens are always made from the target's own features here; those a
        tree was grown on are gone.

        Args:
            features (`[texts, new, hidden]`), tokens (`[texts, new]`).
            counts: how many of the pairs there are of each text, the rest being padding; a tensor `[1]` for a graph,
                of a single text; `None` is all.

        Returns:
            The draft's outputs of these pairs.
        """
        if self._network is None:
            self.draft = matched(self.draft, features)
            self._network = twin(self.draft)
        texts, new = tokens.shape
        if texts > 1 and len(self.cache.lengths) != texts:
            self.cache.lengths = [0] * texts
        start, device, batched = self.cache.length, self.draft.device, len(self.cache.lengths) > 1
        lengths = torch.tensor(self.cache.lengths, device=device)[:, None] if batched else start
        steps = torch.arange(new, device=device)
        places, mask = (steps + lengths).expand(texts, -1), None
        causal = self.draft.config._attn_implementation == "sdpa"  # from the beginning on, without a mask
        if self.cache.is_fixed or (start and (new > 1 or batched)) or (new > 1 and not causal):
            columns = torch.arange(self.cache.width(new), device=device)
            visible = columns <= steps[:, None] + start
            if batched:  # between what a text has and its new pairs there may be columns of longer texts
                visible = visible & ((columns < lengths) | (columns >= start))[:, None]
            mask = additive_mask(visible, self.draft.dtype)
        out = self._step(tokens, features, places, mask)
        if isinstance(counts, torch.Tensor):
            self.cache.length, last = start + counts, counts - 1
            self._last = FSPADDraftOutput(out.logit_features[:, last], out.features[:, last])
            return out
        counts = counts or [new] * texts
        self.cache.keep([list(range(count)) for count in counts])
        each, last = slice(None), new - 1
        if batched:
            each, last = torch.arange(texts, device=device), torch.tensor(counts, device=device) - 1
        read = FSPADDraftOutput(out.logit_features[each, last][:, None], out.features[each, last][:, None])
        if self._last is not None and not all(counts):  # of a text that waits, what was read before
            new = torch.tensor(counts, device=device)[:, None, None] > 0
            read = FSPADDraftOutput(
                torch.where(new, read.logit_features, self._last.logit_features),
                torch.where(new, read.features, self._last.features),
            )
        self._last = read
        return out

    def select(self, texts: list[int]) -> None:
        """Goes on with these of the texts."""
        self.cache.select(texts)
        if self._last is not None:
            self._last = FSPADDraftOutput(self._last.logit_features[texts], self._last.features[texts])

    def grow(self, roots: torch.LongTensor, shape: TreeShape, sequences: Sequence[int] = (0,)) -> CandidateTree:
        """
        Grows trees of at most `shape.depth` levels below `roots` (`[texts, 1]`) and keeps their best nodes.

        Level 1 is a root's top k children. Of each level the k best nodes are expanded by one batched draft step, k
        children each; at the end the best of all nodes by cumulative log-confidence are kept.

        Args:
            sequences: the numbers of the texts in the batch, by which their noise is found.
        """
        if shape.depth < 1:
            return CandidateTree.root(roots)
        noise = self.noise.peek(shape.depth, sequences) if self.noise is not None else None
        return self.grow_padded(roots.to(self.draft.device), shape, noise).trimmed()

    def grow_padded(self, roots: torch.LongTensor, shape: TreeShape, noise: torch.Tensor | None) -> CandidateTree:
        """
        [`~Drafter.grow`] without a look at any value, so that a graph can hold it: where there are fewer nodes than
        `shape` wants, the rest is padding.

        Args:
            noise (`[depth, texts, V]`): of the coming draws; `None` drafts uncoupled.
        """
        if len(self.cache.lengths) > 1:
            lengths = torch.tensor(self.cache.lengths, device=self.draft.device)[:, None]
        else:
            lengths = torch.zeros(1, 1, dtype=torch.long, device=self.draft.device) + self.cache.length
        return self.grow_at(self._last, lengths - 1, shape, noise).best(roots)

    @torch.no_grad()
    def grow_at(
        self, read: FSPADDraftOutput, at: torch.LongTensor, shape: TreeShape, noise: torch.Tensor | None
    ) -> GrownTrees:
        """
        All nodes of the trees whose roots are the tokens of the pairs `at`, side by side: a tree's nodes see the text
        up to its root, and of the nodes their own ancestors.

        Args:
            read: the draft's outputs of these pairs, `[texts, trees, hidden]`.
            at (`[texts, trees]`): where these pairs are in the texts that were accepted.
            shape: of every tree; its depth is 1 or more.
            noise (`[depth, texts * trees, V]`): of each tree's coming draws; `None` drafts uncoupled.
        """
        depth, k, total, _ = shape
        device, start, (texts, trees) = self.draft.device, self.cache.length, at.shape
        each = torch.arange(texts * trees, device=device)[:, None]
        scores, tokens = self._children(read.logit_features.flatten(0, 1)[:, None], k, noise, 0)
        scores, tokens = scores[:, 0], tokens[:, 0]  # [texts * trees, k], as all of the frontier
        features = read.features.flatten(0, 1)[:, None].expand(-1, k, -1)
        nodes = torch.arange(1, k + 1, device=device).expand(texts * trees, k)
        own, itself = (torch.eye(size, dtype=torch.bool, device=device) for size in (trees, k))
        seen = itself.new_zeros(texts * trees, k, 0, k)  # which nodes of the levels above each of them sees
        levels, grown = [(tokens, torch.zeros_like(nodes), scores)], k

        for level in range(1, depth):
            seen = torch.cat((seen, itself[:, None].expand(texts * trees, k, 1, k)), dim=2)
            self.cache.length = start + (level - 1) * trees * k  # append after the levels above
            columns = torch.arange(self.cache.width(trees * k), device=device)
            of_nodes = torch.arange(level * trees * k, device=device) + start
            text = (columns <= at[..., None]).repeat_interleave(k, dim=1)  # [texts, trees * k, columns]
            among = seen.view(texts, trees, k, level, 1, k) & own[:, None, None, :, None]
            mask = text.index_copy_(2, of_nodes, among.view(texts, trees * k, -1))
            out = self._step(
                tokens.view(texts, -1), features.reshape(texts, trees * k, -1),
                (at + level).repeat_interleave(k, dim=1), additive_mask(mask, self.draft.dtype),
            )  # fmt: skip
            confidences, children = self._children(out.logit_features.view(texts * trees, k, -1), k, noise, level)
            below = (scores[..., None] + confidences).flatten(1)
            levels.append((children.flatten(1), nodes.repeat_interleave(k, dim=1), below))
            best = below.nan_to_num(nan=float("-inf"), neginf=float("-inf")).topk(k).indices
            parents = best // k
            scores, tokens, nodes = below.gather(1, best), children.flatten(1).gather(1, best), 1 + grown + best
            features, seen = out.features.view(texts * trees, k, -1)[each, parents], seen[each, parents]
            grown += k * k
        self.cache.length = start  # the trees' rows were made from drafted features: drop them

        depths = torch.cat([torch.full_like(part[0][0], level + 1) for level, part in enumerate(levels)])
        tokens, parents, scores = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        return GrownTrees(tokens, parents, depths, scores, total)

    def _step(self, tokens, features, positions, mask):
        device, dtype = self.draft.device, self.draft.dtype
        return self._network(
            inputs_embeds=self.target.embed(tokens).to(device, dtype),
            features=features.to(device, dtype),
            position_ids=positions.to(device),
            attention_mask=mask,
            cache=self.cache,
        )

    def _children(self, logit_features: torch.Tensor, k: int, noise: torch.Tensor | None, depth: int):
        """
        The top k children of each node of a level (`[trees, nodes, hidden]`): log-confidences and tokens, both
        `[trees, nodes, k]`. Uncoupled, by the log-softmax of the raw draft logits; else see [`coupled_scores`].
        """
        ids, settings = self.draft.draft_vocab_ids, self.settings
        scores = self.target.draft_logits(logit_features, ids).float().to(self.draft.device)
        if noise is not None:
            # finite, for some warpers refuse what is not, and a draft may be wrong in any way
            flat = scores.nan_to_num(-LARGE, LARGE, -LARGE).flatten(0, 1)
            flat = self.warpers(None, flat) if self.warpers else flat
            drawn = noise[depth].to(scores.device)[:, None]
            drawn = drawn if ids is None else drawn[..., ids]
            scores = coupled_scores(flat.view_as(scores), drawn, settings.coupling_sharpness, settings.coupling_kappa)
        values, tokens = scores.log_softmax(-1).topk(k, dim=-1)
        return values, tokens if ids is None else ids[tokens]


def coupled_scores(scores: torch.Tensor, noise: torch.Tensor, sharpness: float, kappa: float) -> torch.Tensor:
    """
    kappa (sharpness log q - log E), with q the draft's warped distribution and E the Exp(1) row of noise that will
    decide the draw: the token which wins is the one the draw would pick if the draft, sharpened, were the target.

    Args:
        scores (`[..., V]`): log q, up to a constant.
        noise (`[..., V]`): E.
    """
    return kappa * (sharpness * scores - noise.clamp(min=torch.finfo(noise.dtype).tiny).log())


def additive_mask(visible: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    """`[queries, keys]` or `[rows, queries, keys]` bool to `[rows, 1, queries, keys]` float."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).view(-1, 1, *mask.shape[-2:])


_copies = Remembered()


def matched(draft: FSPADDraftModel, like: torch.Tensor) -> FSPADDraftModel:
    """The draft in the dtype and on the device of `like`: itself, or a copy that is kept until its weights change."""
    if draft.dtype == like.dtype and draft.device == like.device:
        return draft
    weights = [*draft.parameters(), *draft.buffers()]
    version = tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights)
    known = _copies.of(draft)
    if known.get((like.dtype, like.device), (None, None))[0] != version:
        made = copy.deepcopy(draft).to(device=like.device, dtype=like.dtype)
        known[like.dtype, like.device] = version, made
    return known[like.dtype, like.device][1]
