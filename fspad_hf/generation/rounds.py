"""A round of speculation: grow a tree -> verify it -> walk it -> keep the path.

f_t is the target's feature at position t; a round's root is the last token emitted, which the target has not read yet.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from .cache import ArenaCache
from .continuation import DraftState
from .costs import RoundCosts, Stopwatch
from .drafting import Drafter
from .lookup import PromptLookup
from .target import Target
from .tree import PLAIN, CandidateTree, TreeShape
from .verification import TokenEmitter, walk

FEW = 16  # tokens that a draft reads beside growing a tree, and what it costs is still that of its levels


class Rounds:
    """
    The rounds of one call, step by step as they come.

    Args:
        target, drafter, emitter: of the call; the emitter has emitted the first token.
        cache: the host's, prefilled.
        features (`[1, new, hidden]`): of the prompt, less what the cache held before.
        prompt (`[1, prompt]`): False on padding.
        offset: a token's position id less its column.
        on_round: called before each round's first token with the tree.
    """

    captured = False  # whether its steps are replayed

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        emitter: TokenEmitter,
        cache: DynamicCache,
        features: torch.Tensor,
        prompt: torch.BoolTensor,
        offset: int,
        on_round: Callable[[CandidateTree], None] | None = None,
    ):
        self.target, self.drafter, self.emitter, self.on_round = target, drafter, emitter, on_round
        self.cache, self.prompt, self.offset = cache, prompt, offset
        self.arena = self.make_arena()
        if not prompt.all():
            self.arena.watch_padding()
        shown = prompt[0].cpu().nonzero()[:, 0]
        # (f_t, token t+1) that the draft has not read yet; a plain step leaves it behind
        text, first = emitter.input_ids.cpu(), prompt.shape[1] - features.shape[1]
        new = shown[shown >= first]
        self.unread = [(features[:, (new - first).to(features.device)], text[:, new + 1])]
        self.lookup = PromptLookup(text[0, shown].tolist() + emitter.emitted, emitter.ends)

    def make_arena(self) -> ArenaCache:
        return ArenaCache.from_dynamic(self.cache)

    def go_on(self, read: DraftState):
        """The draft has read a part of the text already."""
        if not self.captured:
            self.drafter.cache, self.unread = read.cache, [*read.unread, *self.unread]

    def close(self):
        """Gives the host's cache what it lacks. Called also when the user's code has raised."""
        self.arena.append_to(self.cache)

    def limit(self, shape: TreeShape, max_length: int) -> TreeShape:
        """`shape`, no deeper than may be here."""
        if self.arena.is_broken:
            return PLAIN
        here = self.emitter.length, self.offset, max_length, self.target.text_config
        return shape._replace(depth=depth_limit(shape.depth, *here), lookup=depth_limit(shape.lookup, *here))

    def run(
        self, shape: TreeShape, chain: Sequence[int] = (), costs: RoundCosts | None = None
    ) -> tuple[CandidateTree, list[int]]:
        """
        Emits a round's tokens.

        Args:
            chain: tokens looked up, no more than the shape wants.
            costs: learns what the round has cost.

        Returns:
            The tree and the path walked (the nodes at which a token was drawn, the root first).
        """
        watch = None if costs is None else Stopwatch(self.target.device)
        self.begin(shape)
        new = 0
        if shape.depth:
            new = sum(tokens.shape[1] for _, tokens in self.unread)
            self.accept()
        tree = self.grow(shape, chain)
        if costs is not None and 0 < new <= FEW:
            costs.add_draft(shape.depth, watch.read())
        elif costs is not None:
            watch.read()
        logits, features, ahead = self.verify(tree)
        if costs is not None:
            costs.add_forward(len(tree), watch.read())
        if self.on_round is not None:
            self.on_round(tree.clone().trimmed())
        path: list[int] = []
        try:
            walk(tree, logits, self.emitter, path, ahead)
        finally:
            self.keep(path, features)
        self.lookup.extend(self.emitter.emitted[-len(path) :])
        return tree, path

    def begin(self, shape: TreeShape):
        """Makes ready for a round with such a tree."""

    def accept(self):
        """The draft reads what it has not read yet."""
        features, tokens = self.all_unread()
        self.unread = []
        self.drafter.accept(features, tokens)

    def all_unread(self) -> tuple[torch.Tensor, torch.LongTensor]:
        """Features (`[1, unread, hidden]`) and tokens (`[1, unread]`, on the host)."""
        if len(self.unread) == 1:
            return self.unread[0]
        features, tokens = zip(*self.unread, strict=True)
        return torch.cat(features, dim=1), torch.cat(tokens, dim=1)

    def grow(self, shape: TreeShape, chain: Sequence[int] = ()) -> CandidateTree:
        """The draft's tree, with the tokens looked up grafted on."""
        tree = self.drafter.grow(self.root(), shape)
        return tree.grafted(torch.tensor(chain, device=tree.tokens.device)).trimmed() if chain else tree

    def root(self) -> torch.LongTensor:
        """The last token emitted, `[1, 1]`."""
        return torch.tensor([self.emitter.emitted[-1:]], device=self.prompt.device)

    def position(self) -> int:
        """The root's position id."""
        return self.arena.length + self.offset

    def verify(self, tree: CandidateTree) -> tuple[torch.Tensor, torch.Tensor, Sequence[tuple[int, int]]]:
        """Logits and features at every node, and what [`walk`] calls `ahead`."""
        prefix = functional.pad(self.prompt, (0, self.arena.length - self.prompt.shape[1]), value=True)
        return *self.target.verify(tree, self.arena, prefix, self.position()), ()

    def keep(self, path: list[int], features: torch.Tensor):
        """Of the rows that the last forward has added keeps those of `path`."""
        self.arena.keep(path)
        self.unread.append((features[:, path], self.last_tokens(len(path))))

    def last_tokens(self, count: int) -> torch.LongTensor:
        """`[1, count]`, on the host."""
        return torch.tensor([self.emitter.emitted[-count:]], device="cpu")


def depth_limit(depth: int, length: int, offset: int, max_length: int | None, text_config) -> int:
    """
    No deeper than tokens can still be emitted (unless `max_length` is `None`), nor past the end of a table of
    positions, and never across the length at which a dynamic or longrope model turns its frequencies.
    """
    if max_length is not None:
        depth = min(depth, max_length - length - 1)
    rope = getattr(text_config, "rope_parameters", None) or {}
    table = getattr(text_config, "max_position_embeddings", None)
    if not rope and table is not None:
        depth = min(depth, table - (length + offset))
    for parameters in [rope, *(p for p in rope.values() if isinstance(p, dict))]:
        kind = parameters.get("rope_type")
        if kind in ("dynamic", "longrope"):
            default = getattr(text_config, "original_max_position_embeddings", None)
            boundary = parameters.get("original_max_position_embeddings") or default
            room = (boundary or text_config.max_position_embeddings) - (length + offset)
            if room >= 0:
                depth = min(depth, room)
            elif kind == "dynamic":
                depth = 0
    return max(depth, 0)
