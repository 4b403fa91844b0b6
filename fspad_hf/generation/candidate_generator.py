"""The draft at work: grows a dynamic tree (EAGLE-2, arXiv 2406.16858, section 4) from the target's true features."""

import copy
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    CandidateGenerator,
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
from .tree import CandidateTree, TreeShape, prune
from .twin import twin
from .verification import NoiseQueue

# Functions of the scores alone, so the draft's distribution can be put through them as the target's is.
STATIC_WARPERS = (
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper,
    TypicalLogitsWarper, EpsilonLogitsWarper, EtaLogitsWarper,
)  # fmt: skip
LARGE = 1e30


class FSPADCandidateGenerator(CandidateGenerator):
    """
    Candidates from a [`FSPADDraftModel`], as a tree ([`~FSPADCandidateGenerator.grow`]) or, through the base class's
    contract, as the tree's most confident chain ([`~FSPADCandidateGenerator.get_candidates`]).

    Args:
        draft: the draft; if its dtype or device is not the features', a copy that is.
        target: the call's view of the target.
        logits_processor: the call's processors, of which the static warpers shape coupled drafting.
        noise: the coming draws; `None` drafts uncoupled.
        settings: resolved; by default the draft's.
    """

    requires_model_outputs = True
    model_kwargs_overrides: dict[str, Any] = {"output_hidden_states": True}

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
        self._logit_feature = self._feature = None  # [1, 1, hidden]: o_logit and o_feature of the root

    @torch.no_grad()
    def accept(
        self, features: torch.Tensor, tokens: torch.LongTensor, count: torch.LongTensor | None = None
    ) -> FSPADDraftOutput:
        """
        Takes in true pairs (f_t, token t+1), the last token being the next tree's root.

        The draft's keys and values of accepted tokens are always made from the target's own features here; those a
        tree was grown on are gone.

        Args:
            features (`[1, new, hidden]`), tokens (`[1, new]`).
            count (`[1]`): how many of the pairs there are, the rest being padding; `None` is all.

        Returns:
            The draft's outputs of these pairs.
        """
        if self._network is None:
            self.draft = matched(self.draft, features)
            self._network = twin(self.draft)
        new, start, device = tokens.shape[1], self.cache.length, self.draft.device
        places = torch.arange(new, device=device) + start
        mask = None
        if self.cache.is_fixed or (new > 1 and (start or self.draft.config._attn_implementation != "sdpa")):
            columns = torch.arange(self.cache.width(new), device=device)
            mask = additive_mask(columns <= places[:, None], self.draft.dtype)
        out = self._step(tokens, features, places[None], mask)
        self.cache.length = start + (new if count is None else count)
        last = slice(-1, None) if count is None else count - 1
        self._logit_feature, self._feature = out.logit_features[:, last], out.features[:, last]
        return out

    def grow(self, root: torch.LongTensor, shape: TreeShape) -> CandidateTree:
        """
        Grows a tree of at most `shape.depth` levels below `root` (`[1, 1]`) and keeps its best nodes.

        Level 1 is the root's top k children. Of each level the k best nodes are expanded by one batched draft step,
        k children each; at the end the best of all nodes by cumulative log-confidence are kept.
        """
        if shape.depth < 1:
            return CandidateTree.root(root)
        rows = self.noise.peek(shape.depth) if self.noise is not None else None  # [depth, V]
        return self.grow_padded(root.to(self.draft.device), shape, rows).trimmed()

    @torch.no_grad()
    def grow_padded(self, root: torch.LongTensor, shape: TreeShape, rows: torch.Tensor | None) -> CandidateTree:
        """
        [`~FSPADCandidateGenerator.grow`] without a look at any value, so that a graph can hold it: where there are
        fewer nodes than `shape` wants, the rest is padding.

        Args:
            rows (`[depth, V]`): the noise of the coming draws; `None` drafts uncoupled.
        """
        depth, k, total, _ = shape
        device, start = self.draft.device, self.cache.length
        confidences, tokens = self._children(self._logit_feature, k, rows, 0)  # [1, 1, k]
        frontier_scores, frontier_tokens = confidences[0, 0], tokens[0, 0]
        frontier_features = self._feature.expand(-1, k, -1)
        frontier_nodes = torch.arange(1, k + 1, device=device)
        seen = torch.zeros(k, 0, dtype=torch.bool, device=device)  # which tree rows of the draft's cache each sees
        levels = [(frontier_tokens, torch.zeros_like(frontier_nodes), frontier_scores)]
        grown = k

        for level in range(1, depth):
            seen = torch.cat((seen, torch.eye(k, dtype=torch.bool, device=device)), dim=-1)
            self.cache.length = start + (level - 1) * k  # append after the levels above
            columns = torch.arange(self.cache.width(k), device=device)
            own = torch.arange(level * k, device=device) + start
            mask = (columns < start).repeat(k, 1).index_copy_(1, own, seen)
            positions = torch.zeros(1, k, dtype=torch.long, device=device) + (start + level - 1)
            out = self._step(
                frontier_tokens[None], frontier_features, positions, additive_mask(mask, self.draft.dtype)
            )
            confidences, tokens = self._children(out.logit_features, k, rows, level)  # [1, k, k]
            scores = (frontier_scores[:, None] + confidences[0]).flatten()
            levels.append((tokens.flatten(), frontier_nodes[:, None].expand(-1, k).flatten(), scores))
            best = scores.nan_to_num(nan=float("-inf"), neginf=float("-inf")).topk(k).indices
            parents = best // k
            frontier_scores, frontier_tokens = scores[best], tokens.flatten()[best]
            frontier_features, seen = out.features[:, parents], seen[parents]
            frontier_nodes = 1 + grown + best
            grown += k * k
        self.cache.length = start  # the tree's rows were made from drafted features: drop them

        depths = torch.cat([torch.full_like(part[0], level + 1) for level, part in enumerate(levels)])
        tokens, parents, scores = (torch.cat(parts) for parts in zip(*levels, strict=True))
        return prune(root, tokens, parents, depths, scores, total)

    def get_candidates(self, input_ids: torch.LongTensor, model_outputs=None, is_first_iteration=False, **kwargs):
        """
        The base class's contract, for the host's own chain verification: `input_ids` with the most confident path of a
        tree behind it, and no logits (the candidates are deterministic).

        Args:
            input_ids (`[1, length]`): all tokens so far.
            model_outputs: the last forward's, with `hidden_states`.
            is_first_iteration: nothing has been forwarded yet, so nothing can be drafted.
        """
        if is_first_iteration:
            return input_ids, None
        start = self.cache.length
        new = input_ids.shape[1] - 1 - start
        self.accept(model_outputs.hidden_states[-1][:, :new], input_ids[:, start + 1 :])
        tree = self.grow(input_ids[:, -1:], TreeShape.of(self.settings))
        path, node = [], 0
        first_child = {}
        for child, parent in enumerate(tree.parents[0].tolist()[1:], start=1):
            first_child.setdefault(parent, child)
        while (node := first_child.get(node)) is not None:
            path.append(node)
        chain = tree.tokens[:, path].to(input_ids.device)
        return torch.cat((input_ids, chain), dim=-1), None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int):
        """Nothing to update: the tree's shape is the configuration's."""

    def _step(self, tokens, features, positions, mask):
        device, dtype = self.draft.device, self.draft.dtype
        return self._network(
            inputs_embeds=self.target.embed(tokens).to(device, dtype),
            features=features.to(device, dtype),
            position_ids=positions.to(device),
            attention_mask=mask,
            cache=self.cache,
        )

    def _children(self, logit_features: torch.Tensor, k: int, rows: torch.Tensor | None, depth: int):
        """
        The top k children of each node: log-confidences and tokens, both `[1, nodes, k]`.

        Uncoupled: the log-softmax of the raw draft logits. Coupled: log-softmax(kappa (sharpness log q - log E)) with
        q the draft's warped distribution and E the row of noise that will decide the draw at this depth, so that the
        child which wins is the one the draw would pick if the draft, sharpened, were the target.
        """
        ids = self.draft.draft_vocab_ids
        scores = self.target.draft_logits(logit_features, ids).float().to(self.draft.device)
        if rows is not None:
            # finite, for some warpers refuse what is not, and a draft may be wrong in any way
            flat = self.warpers(None, scores[0].nan_to_num(-LARGE, LARGE, -LARGE)) if self.warpers else scores[0]
            noise = rows[depth].to(scores.device)
            log_noise = (noise if ids is None else noise[..., ids]).clamp(min=torch.finfo(torch.float32).tiny).log()
            scores = (self.settings.coupling_kappa * (self.settings.coupling_sharpness * flat - log_noise))[None]
        values, tokens = scores.log_softmax(-1).topk(k, dim=-1)
        return values, tokens if ids is None else ids[tokens]


def additive_mask(visible: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    """`[queries, keys]` bool to `[1, 1, queries, keys]` float."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]


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
