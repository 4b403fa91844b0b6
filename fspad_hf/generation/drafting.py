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
from ..runtime import labelled
from ..speculation_config import SpeculationConfig
from .cache import ArenaCache
from .remembered import Remembered
from .target import Target
from .tree import CandidateTree, GrownTrees, TreeShape, additive_mask
from .twin import twin

# Functions of the scores alone, so the draft's distribution can be put through them as the target's is.
STATIC_WARPERS = (
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper,
    TypicalLogitsWarper, EpsilonLogitsWarper, EtaLogitsWarper,
)  # fmt: skip
LARGE = 1e30


class Drafter:
    """
    One call's draft: reads the text ([`~Drafter.read`]) and grows trees behind it ([`~Drafter.grow`]).

    Args:
        draft: the draft; if its dtype or device is not the features', a copy that is.
        target: the call's view of the target.
        logits_processor: the call's processors, of which the static warpers shape coupled drafting.
        settings: resolved; by default the draft's.
        texts: how many.
    """

    def __init__(
        self,
        draft: FSPADDraftModel,
        target: Target,
        logits_processor: LogitsProcessorList | None = None,
        settings: SpeculationConfig | None = None,
        texts: int = 1,
    ):
        self.settings = settings or draft.speculation_settings(target.device)
        self.target = target
        self.draft = draft
        self.warpers = LogitsProcessorList(p for p in logits_processor or () if type(p) in STATIC_WARPERS)
        self.cache = ArenaCache(num_layers=1, sequences=texts)
        self._network: FSPADDraftModel | None = None  # what runs: the twin of the draft

    def accept(
        self, features: torch.Tensor, tokens: torch.LongTensor, counts: Sequence[int] | None = None
    ) -> FSPADDraftOutput:
        """[`~Drafter.read`] behind all that was read before; of each text only the first `counts` pairs, or all."""
        out = self.read(features, tokens, self.cache.behind(self.target.device))
        self.cache.advance(counts or [tokens.shape[1]] * len(tokens))
        return out

    @labelled("read")
    @torch.no_grad()
    def read(self, features: torch.Tensor, tokens: torch.LongTensor, lengths: torch.LongTensor) -> FSPADDraftOutput:
        """
        Reads true pairs (f_t, token t+1). The draft's keys and values of accepted tokens are always made from the
        target's own features here; those a tree was grown on are gone.

        Args:
            features (`[texts, new, hidden]`), tokens (`[texts, new]`).
            lengths (`[texts, 1]`): how many pairs of each text were read before.

        Returns:
            The draft's outputs of these pairs.
        """
        if self._network is None:
            self.draft = matched(self.draft, features)
            alike = self.target.is_tensor_parallel  # in all processes; a twin times its products
            self._network = self.draft if alike else twin(self.draft)
        (texts, new), cache, lengths = tokens.shape, self.cache, lengths.to(self.draft.device)
        places, before = lengths + torch.arange(new, device=self.draft.device), cache.longest
        cache.place(lengths, before + new)
        causal, mask = self.draft.config._attn_implementation == "sdpa", None  # from the beginning on, without a mask
        if cache.is_fixed or (before and (new > 1 or texts > 1)) or (new > 1 and not causal):
            columns = torch.arange(cache.width(), device=self.draft.device)
            mask = additive_mask(columns <= places[..., None], self.draft.dtype)
        return self._step(tokens, features, places, mask)

    def grow(
        self, read: FSPADDraftOutput, ends: torch.LongTensor, roots: torch.LongTensor, shape: TreeShape,
        noise: torch.Tensor | None = None,
    ) -> CandidateTree:  # fmt: skip
        """
        Grows a tree behind each text and keeps its best nodes, with padding where there are fewer than `shape` wants.

        Level 1 is a root's top k children. Of each level the k best nodes are expanded by one batched draft step, k
        children each; at the end the best of all nodes by cumulative log-confidence are kept.

        Args:
            read: the draft's outputs of the last pair of each text, `[texts, 1, hidden]`.
            ends (`[texts, 1]`): the pairs that each text has.
            roots (`[texts, 1]`): the last tokens.
            noise (`[depth, texts, V]`): of the coming draws; `None` drafts uncoupled.
        """
        return self.grow_at(read, ends - 1, shape, noise, ends).best(roots)

    @torch.no_grad()
    def grow_at(
        self, read: FSPADDraftOutput, at: torch.LongTensor, shape: TreeShape, noise: torch.Tensor | None,
        ends: torch.LongTensor | None = None,
    ) -> GrownTrees:  # fmt: skip
        """
        All nodes of the trees whose roots are the tokens of the pairs `at`, side by side: a tree's nodes see the text
        up to its root, and of the nodes their own ancestors. Waits for no value, so that a graph can hold it.

        Args:
            read: the draft's outputs of these pairs, `[texts, trees, hidden]`.
            at (`[texts, trees]`): where these pairs are in the texts that were read.
            shape: of every tree; its depth is 1 or more.
            noise (`[depth, texts * trees, V]`): of each tree's coming draws; `None` drafts uncoupled.
            ends (`[texts, 1]`): the pairs that each text has; `None` is as many as the cache holds.
        """
        depth, k, total, _ = shape
        device, kv_length, (texts, trees) = self.draft.device, self.cache.kv_length, at.shape
        ends = self.cache.behind(device) if ends is None else ends
        each = torch.arange(texts * trees, device=device)[:, None]
        scores, tokens = self._children(read.logit_features.flatten(0, 1)[:, None], k, noise, 0)
        scores, tokens = scores[:, 0], tokens[:, 0]  # [texts * trees, k], as all of the frontier
        features = read.features.flatten(0, 1)[:, None].expand(-1, k, -1)
        nodes = torch.arange(1, k + 1, device=device).expand(texts * trees, k)
        own, itself = (torch.eye(size, dtype=torch.bool, device=device) for size in (trees, k))
        seen = itself.new_zeros(texts * trees, k, 0, k)  # which nodes of the levels above each of them sees
        levels, grown, rows = [(tokens, torch.zeros_like(nodes), scores)], k, trees * k

        for level in range(1, depth):
            seen = torch.cat((seen, itself[:, None].expand(texts * trees, k, 1, k)), dim=2)
            self.cache.place(ends + (level - 1) * rows, kv_length + level * rows)  # behind the levels above
            columns = torch.arange(self.cache.width(), device=device)
            of_nodes = ends + torch.arange(level * rows, device=device)
            text = (columns <= at[..., None]).repeat_interleave(k, dim=1)  # [texts, trees * k, columns]
            among = seen.view(texts, trees, k, level, 1, k) & own[:, None, None, :, None]
            mask = text.scatter_(2, of_nodes[:, None].expand(-1, rows, -1), among.reshape(texts, rows, -1))
            places, mask = (at + level).repeat_interleave(k, dim=1), additive_mask(mask, self.draft.dtype)
            out = self._step(tokens.view(texts, -1), features.reshape(texts, rows, -1), places, mask)
            confidences, children = self._children(out.logit_features.view(texts * trees, k, -1), k, noise, level)
            below = (scores[..., None] + confidences).flatten(1)
            levels.append((children.flatten(1), nodes.repeat_interleave(k, dim=1), below))
            best = below.nan_to_num(nan=float("-inf"), neginf=float("-inf")).topk(k).indices
            parents = best // k
            scores, tokens, nodes = below.gather(1, best), children.flatten(1).gather(1, best), 1 + grown + best
            features, seen = out.features.view(texts * trees, k, -1)[each, parents], seen[each, parents]
            grown += k * k
        self.cache.kv_length = kv_length  # the trees' rows were made from drafted features and do not count

        depths = torch.cat([torch.full_like(part[0][0], level + 1) for level, part in enumerate(levels)])
        tokens, parents, scores = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        return GrownTrees(tokens, parents, depths, scores, total)

    @labelled("network")
    def _step(self, tokens, features, positions, mask):
        device, dtype = self.draft.device, self.draft.dtype
        return self._network(
            inputs_embeds=self.target.embed(tokens).to(device, dtype),
            features=features.to(device, dtype),
            position_ids=positions.to(device),
            attention_mask=mask,
            cache=self.cache,
        )

    @labelled("head")
    def _children(self, logit_features: torch.Tensor, k: int, noise: torch.Tensor | None, depth: int):
        """
        The top k children of each node of a level (`[trees, nodes, hidden]`): log-confidences and tokens, both
        `[trees, nodes, k]`. Uncoupled, by the log-softmax of the raw draft logits; else see [`coupled_scores`].
        """
        ids = self.draft.draft_vocab_ids
        scores = self.target.draft_logits(logit_features, ids).float().to(self.draft.device)
        if noise is not None:
            # finite, for some warpers refuse what is not, and a draft may be wrong in any way
            flat = scores.nan_to_num(-LARGE, LARGE, -LARGE).flatten(0, 1)
            flat = self.warpers(None, flat) if self.warpers else flat
            drawn = noise[depth].to(scores.device)[:, None]
            drawn = drawn if ids is None else drawn[..., ids]
            scores = coupled_scores(flat.view_as(scores), drawn)
        values, tokens = scores.log_softmax(-1).topk(k, dim=-1)
        return values, tokens if ids is None else ids[tokens]


def coupled_scores(scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """
    log q - log E, with q the draft's warped distribution and E the Exp(1) row of noise that will decide the draw: the
    token which wins is the one the draw would pick if the draft were the target.

    Args:
        scores (`[..., V]`): log q, up to a constant.
        noise (`[..., V]`): E.
    """
    return scores - noise.clamp(min=torch.finfo(noise.dtype).tiny).log()


def latest(
    out: FSPADDraftOutput, counts: torch.LongTensor, before: FSPADDraftOutput | None = None
) -> FSPADDraftOutput:
    """
    The outputs of each text's last pair, `[texts, 1, hidden]`.

    Args:
        counts (`[texts, 1]`): how many of the pairs there are of each text; where there are none, it is `before`'s.
    """

    def last(parts: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
        at = (counts - 1).clamp(min=0)[..., None].expand(-1, -1, parts.shape[-1])
        return parts.gather(1, at) if old is None else torch.where(counts[..., None] > 0, parts.gather(1, at), old)

    old = (None, None) if before is None else (before.logit_features, before.features)
    return FSPADDraftOutput(last(out.logit_features, old[0]), last(out.features, old[1]))


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
