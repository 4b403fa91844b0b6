"""The rounds of a call as CUDA graphs: the very steps that run eagerly elsewhere, recorded once and replayed.

A round is three replays and one wait for the device:

    draft    the draft reads the accepted tokens and grows its tree
    verify   the target's forward over the tree and, if nothing of the user's has a say in it, the walk
    keep     both caches and the features are left with the path

Everything between them (processors of the user's, criteria, the streamer) sees each token as ever. A graph freezes
shapes, addresses and whatever Python decides; so lengths come as tensors, attention sees whole buffers behind a mask,
and a replay is compared with the eager forward before it is trusted.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from .cache import ArenaCache
from .capturing import CAPTURABLE_WARPERS, Rehearsal, addresses, capture, pair_key, why_no_graphs
from .drafting import Drafter
from .rounds import Rounds
from .target import Target
from .tree import CandidateTree, TreeShape
from .verification import TokenEmitter, settings_of, walk_ahead
from .workspace import Graph, Workspace, WorkspacePool

logger = logging.get_logger(__name__)

SMALLEST_BUCKET = 512  # positions; each bucket is twice the one before
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit; what rounding explains
HALF_TOLERANCE = 0.1


@dataclass
class Plan:
    """
    How a round is captured.

    Args:
        shape: of its tree.
        noise: the draft sees the noise of the coming draws.
        ahead: the walk is captured too.
        frozen: whatever else of the call its graphs hold.
        nodes: what a captured walk visited.
        tree_at: where the tree's tensors are, which a graph has frozen.
    """

    shape: TreeShape
    noise: bool
    ahead: bool
    frozen: tuple = ()
    nodes: list[int] = field(default_factory=list)
    tree_at: int = 0

    @property
    def kind(self) -> tuple:
        """Rounds of one kind share their graphs."""
        return self.shape, self.noise, self.ahead, self.frozen

    @property
    def rows(self) -> int:
        """The most tokens that the round can draw, and rows that it can keep."""
        return 1 + self.shape.levels


class GraphRounds(Rounds):
    """
    [`Rounds`] whose steps are replays. A round that cannot be one runs eagerly, on the same buffers.

    Args:
        pool: where workspaces come from.
        key: of the pair, see [`pair_key`].
    """

    captured = True

    def __init__(self, *args, pool: WorkspacePool, key: tuple, **kwargs):
        self.pool, self.key, self.workspace, self.plan = pool, key, None, None
        super().__init__(*args, **kwargs)
        emitter, model = self.emitters[0], self.target.model
        static = all(type(p) in CAPTURABLE_WARPERS for p in emitter.logits_processor)
        self.can_walk = static and emitter.scores is None and emitter.raw_logits is None
        self.can_draft = all(type(warper) in CAPTURABLE_WARPERS for warper in self.drafter.warpers)
        # code that runs between the tokens, and may change what a graph has frozen
        self.is_watched = not (static and emitter.plain_criteria and emitter.streamer is None)
        self.addresses = addresses(model, self.drafter.draft) if self.is_watched else None
        self.is_cut = False  # the shape wanted is too deep here

    def make_arena(self) -> ArenaCache:
        settings, length = self.drafter.settings, self.cache.get_seq_length()
        capacity = self._bucket(length, TreeShape.of(settings))
        found = self.pool.take(self.key, capacity, self.target.model)
        if found is None:
            found = self._workspace(ArenaCache.from_dynamic(self.cache, capacity))
        else:
            found.arena.load(self.cache)
        self._use(found)
        return found.arena

    @property
    def emitter(self) -> TokenEmitter:
        return self.emitters[0]

    def close(self):
        super().close()
        self.pool.put(self.workspace, self.target.model)

    def limit(self, shape: TreeShape, max_length: int) -> TreeShape:
        """Near `max_length` a tree of the usual shape costs less than the graphs of another would."""
        limited = super().limit(shape, None)
        self.is_cut = limited != shape
        return super().limit(shape, max_length) if self.is_cut else shape

    def begin(self, shape: TreeShape):
        if self._bucket(self.arena.length, shape) > self.workspace.capacity:
            self._enlarge(shape)
        self.plan = None if self.is_cut or not self.can_draft else self._plan(shape)
        self.emitter.settings = None
        if self.plan is not None and self.plan.ahead and self.is_watched:
            self.emitter.settings = settings_of(self.emitter.logits_processor)

    def _plan(self, shape: TreeShape) -> Plan | None:
        if self.is_watched and addresses(self.target.model, self.drafter.draft) != self.addresses:
            return None
        noise, settings = self.emitter.noise, self.drafter.settings
        rows = noise.peek(1 + max(shape.depth, shape.lookup)) if noise is not None else None
        if rows is not None:
            self.workspace.noise[: len(rows)] = rows[:, 0]
        ahead = self.can_walk and (noise is None or rows is not None)
        sampled, warpers = noise is not None, settings_of(self.drafter.warpers)
        frozen = sampled, settings.coupling_kappa, settings.coupling_sharpness, warpers
        plan = Plan(shape, rows is not None and self.drafter.noise is not None, ahead, frozen)
        self.target._head_rows = self.workspace.head_rows
        return None if (self.key, plan.kind) in self.pool.refused else plan

    def accept(self):
        if self.plan is None:
            return super().accept()
        workspace, most = self.workspace, self.workspace.rows
        features, tokens, _ = self.all_unread()
        early = max(tokens.shape[1] - most, 0)
        if early:
            self.drafter.accept(features[:, :early], tokens[:, :early])
        features, tokens = features[:, early:], tokens[:, early:]
        if features.data_ptr() != workspace.features.data_ptr():
            workspace.features[:, : features.shape[1]] = features
        self.unread = [[(features, tokens)]]  # until the graph has read it

    def grow(self, shape: TreeShape, chains: Sequence[Sequence[int]] = ()) -> CandidateTree:
        plan, workspace = self.plan, self.workspace
        if plan is None:
            return super().grow(shape, chains)
        start = self.drafter.cache.length
        tokens = self.unread[0][0][1][0].tolist() if shape.depth else self.emitter.emitted[-1:]
        workspace.write_state(start, self.arena.length, self.position(), tokens, chains[0] if chains else ())
        if not shape.depth and not shape.lookup:
            return workspace.root
        drafted = self._replayed("draft", self._draft, self.drafter.warpers, workspace.head_rows)
        if drafted is None:  # it could not be captured
            if shape.depth:
                super().accept()
            return super().grow(shape, chains)
        if shape.depth:
            self.unread = [[]]
            self.drafter.cache.length = start + len(tokens)
        return drafted.outputs

    def verify(self, tree: CandidateTree):
        plan = self.plan
        if plan is None:
            return super().verify(tree)
        name = "walk" if plan.ahead else "verify"
        known, plan.tree_at = self.workspace.graphs(plan.kind), tree.tokens.data_ptr()
        expected = None if (name, plan.tree_at) in known else super().verify(tree.clone())[0]
        held = self.emitter.logits_processor if plan.ahead else None  # the user's own may hold anything
        verified = self._replayed(name, lambda: self._verify(tree), tree, held)
        if verified is not None and expected is not None:
            difference = _difference(verified.outputs[0], expected)
            if difference is not None:
                known.clear()
                self._refuse(f"a replay's logits are off by {difference}")
        if self.plan is None:
            return super().verify(tree)  # once more: the attempt has overwritten the caches' rows
        logits, features, drawn = verified.outputs
        ahead = ()
        if plan.ahead:
            count, sound, *drawn = drawn.tolist()  # the round's one wait for the device
            plan.nodes = drawn[:count] if sound else []
            ahead = tuple(zip(plan.nodes, drawn[len(drawn) // 2 :], strict=False))
        return logits, features, ahead

    def keep(self, paths: list[list[int]], features: torch.Tensor):
        plan, workspace, path = self.plan, self.workspace, paths[0]
        if plan is None:
            return super().keep(paths, features)
        self._own_unread()  # plain steps before this one
        if path != plan.nodes[: len(path)]:
            workspace.path[: plan.rows] = torch.tensor(path + [0] * (plan.rows - len(path)), device="cpu")
        if self._replayed("keep", lambda: self._keep(features)) is None:
            self.arena.gather(torch.tensor(path, device=workspace.path.device))
            workspace.features[:, : len(path)] = features[:, path]
        self.arena.length += len(path)
        self.unread[0].append((workspace.features[:, : len(path)], self.last_tokens(0, len(path))))

    def _own_unread(self):
        self.unread = [[(self._own(features), tokens) for features, tokens in self.unread[0]]]

    def _own(self, features: torch.Tensor) -> torch.Tensor:
        """A copy of what the next replay would overwrite."""
        return features.clone() if features.data_ptr() == self.workspace.features.data_ptr() else features

    def _draft(self) -> CandidateTree:
        workspace, plan, tree = self.workspace, self.plan, self.workspace.root
        if plan.shape.depth:
            self.drafter.accept(workspace.features, workspace.tokens, workspace.count)
            root = workspace.tokens[:, workspace.count - 1]
            noise = workspace.noise[: plan.shape.depth, None] if plan.noise else None
            tree = self.drafter.grow_padded(root, plan.shape, noise)
        lookup = plan.shape.lookup
        return tree.grafted(workspace.chain[:lookup], workspace.chain_count) if lookup else tree

    def _verify(self, tree: CandidateTree):
        workspace, plan, drawn = self.workspace, self.plan, None
        logits, features = self.target.verify(tree, self.arena, workspace.prefix, workspace.position)
        if plan.ahead:
            rows = workspace.noise if self.emitter.noise is not None else None
            drawn = walk_ahead(tree, logits, self.emitter.logits_processor, rows, plan.rows - 1)
            workspace.path[: plan.rows] = drawn[2 : 2 + plan.rows]
        return logits, features, drawn

    def _keep(self, features: torch.Tensor):
        path = self.workspace.path[: self.plan.rows]
        self.arena.gather(path)
        self.workspace.features[:, : self.plan.rows] = features[:, path]

    def _replayed(self, name: str, step: Callable[[], Any], *keep_alive) -> Graph | None:
        """Replays the graph of `step`, having captured it if there is none; without success the plan is given up."""
        known, key = self.workspace.graphs(self.plan.kind), (name, self.plan.tree_at if name != "draft" else 0)
        if key not in known:
            try:
                self._rehearse(name, step)
                with self._fixed():
                    captured = capture(step, self.target.device, self.workspace.memory)
            except (RuntimeError, NotImplementedError) as error:
                self._refuse(f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")
                return None
            known[key] = Graph(*captured, keep_alive)
        known[key].replay()
        return known[key]

    def _rehearse(self, name: str, step: Callable[[], Any]):
        """Runs the step once; but for "keep", which moves rows, a step may be run as often as one likes."""
        path = self.workspace.path
        before = path.clone()
        if name == "keep":
            path.copy_(torch.arange(len(path), device=path.device))
        with self._fixed(), Rehearsal(self.target.device):
            step()
        path.copy_(before)

    @contextmanager
    def _fixed(self):
        """Lengths are tensors inside."""
        workspace, cache = self.workspace, self.drafter.cache
        lengths = self.arena.length, cache.length
        self.arena.length, cache.length = workspace.length, workspace.draft_length
        try:
            yield
        finally:
            self.arena.length, cache.length = lengths

    def _refuse(self, reason: str):
        self.pool.refused[self.key, self.plan.kind] = reason
        self.plan = None
        logger.warning_once(f"The rounds of {type(self.target.model).__name__} run without CUDA graphs: {reason}")

    def _bucket(self, length: int, shape: TreeShape) -> int:
        """The capacity for a round behind `length` tokens: no more than twice of what it needs."""
        read = 1 + _longest(self.drafter.settings)
        needed = length + max(read + max(shape.depth - 1, 0) * shape.top_k, shape.rows) + 1
        return max(SMALLEST_BUCKET, 1 << (needed - 1).bit_length())

    def _enlarge(self, shape: TreeShape):
        small, capacity = self.workspace, self._bucket(self.arena.length, shape)
        found = self.pool.take(self.key, capacity, self.target.model)
        if found is None:
            found = self._workspace(self.arena.resized(capacity))
        found.arena.copy_from(small.arena)
        found.draft_cache.copy_from(small.draft_cache)
        self._own_unread()
        self._use(found)
        self.arena = found.arena
        self.pool.put(small, self.target.model)

    def _workspace(self, arena: ArenaCache) -> Workspace:
        draft, settings, device = self.drafter.draft, self.drafter.settings, self.target.device
        config = draft.config
        cache = ArenaCache(1, arena.capacity)
        nothing = torch.zeros(1, config.num_key_value_heads, 0, config.head_dim, dtype=draft.dtype, device=device)
        cache.layers[0].lazy_initialization(nothing, nothing)
        vocab_size = self.target.text_config.vocab_size
        return Workspace(
            self.key, arena, cache, _longest(settings), settings.tree_lookup_tokens, config.hidden_size, vocab_size,
            draft.dtype, device,
        )  # fmt: skip

    def _use(self, workspace: Workspace):
        self.workspace, self.drafter.cache = workspace, workspace.draft_cache
        workspace.start(self.prompt)
        ids = self.drafter.draft.draft_vocab_ids
        if ids is not None:  # the target's head may have changed since the last call
            fresh = self.target.take_head_rows(ids)
            if workspace.head_rows is None:
                workspace.head_rows = fresh
            elif fresh is not None:
                for mine, new in zip(workspace.head_rows, fresh, strict=True):
                    if mine is not None:
                        mine.copy_(new)


def make_rounds(
    target: Target,
    drafter: Drafter,
    emitters: Sequence[TokenEmitter],
    cache: DynamicCache,
    features: torch.Tensor,
    *args,
) -> Rounds:
    """The rounds of a call: captured, if the settings want it and they can be."""
    draft = drafter.draft
    if not drafter.settings.cuda_graphs or len(emitters) > 1:
        return Rounds(target, drafter, emitters, cache, features, *args)
    reason = why_no_graphs(target, draft, features.dtype)
    if reason is not None:
        logger.warning_once(f"The rounds of {type(target.model).__name__} run without CUDA graphs: {reason}")
        return Rounds(target, drafter, emitters, cache, features, *args)
    pool, key = WorkspacePool.of(draft), pair_key(target.model, draft)
    return GraphRounds(target, drafter, emitters, cache, features, *args, pool=pool, key=key)


def _longest(settings) -> int:
    """The most nodes below the root that a path can have, and rows of noise beside the first that a round reads."""
    return max(settings.tree_depth, settings.tree_lookup_tokens)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """By how much logits differ, where rounding does not explain it."""
    tolerance = TOLERANCE.get(expected.dtype, HALF_TOLERANCE)
    found, expected = found.float(), expected.float()
    off = torch.where(found == expected, 0.0, found - expected)  # of equal infinities, none
    most = float(torch.where(expected.isinf(), 0.0, expected).abs().max())
    difference = float(off.abs().max())
    if difference <= most * tolerance:
        return None
    return f"{difference:.3g} of {most:.3g}"
