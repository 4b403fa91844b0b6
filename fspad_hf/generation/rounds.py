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

LEAD = 32  # tokens that a sampled sequence may be ahead of another: the noise of all of them is held
FEW = 16  # tokens that a draft reads beside growing a tree, and what it costs is still that of its levels


class Rounds:
    """
    The rounds of one call, step by step as they come. Tensors have a row for each sequence that has not ended.

    Args:
        target, drafter: of the call.
        emitters: one a sequence; each has emitted its first token.
        cache: the host's, prefilled.
        features (`[batch, new, hidden]`): of the prompt, less what the cache held before.
        prompt (`[batch, prompt]`): False on padding.
        offsets: of each sequence, a token's position id less its column.
        on_round: called before each round's first token with the tree; of a single sequence.
        cache_is_wanted: the host's cache is to hold everything in the end.
    """

    captured = False  # whether its steps are replayed

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        emitters: Sequence[TokenEmitter],
        cache: DynamicCache,
        features: torch.Tensor,
        prompt: torch.BoolTensor,
        offsets: Sequence[int],
        on_round: Callable[[CandidateTree], None] | None = None,
        cache_is_wanted: bool = True,
    ):
        self.target, self.drafter, self.emitters, self.on_round = target, drafter, list(emitters), on_round
        self.cache, self.prompt, self.offsets, self.cache_is_wanted = cache, prompt, list(offsets), cache_is_wanted
        self.is_whole = True  # no sequence has been dropped
        self.arena = self.make_arena()
        self.arena.lengths = [cache.get_seq_length()] * len(prompt)
        if not prompt.all():
            self.arena.watch_padding()
        # (f_t, token t+1) that the draft has not read yet; a plain step leaves it behind
        self.unread: list[list[tuple[torch.Tensor, torch.LongTensor]]] = []
        self.lookups: list[PromptLookup] = []
        first = prompt.shape[1] - features.shape[1]
        for row, emitter in enumerate(self.emitters):
            shown, text = prompt[row].cpu().nonzero()[:, 0], emitter.input_ids.cpu()
            new = shown[shown >= first]
            self.unread.append([(features[row : row + 1, (new - first).to(features.device)], text[:, new + 1])])
            self.lookups.append(PromptLookup(text[0, shown].tolist() + emitter.emitted, emitter.ends))
        self.drop_ended()

    def make_arena(self) -> ArenaCache:
        return ArenaCache.from_dynamic(self.cache)

    def go_on(self, read: DraftState):
        """The draft has read a part of the text already; of a single sequence."""
        if not self.captured:
            self.drafter.cache, self.unread = read.cache, [[*read.unread, *self.unread[0]]]

    def close(self):
        """Gives the host's cache what it lacks. Called also when the user's code has raised."""
        if self.is_whole and len(set(self.arena.lengths)) == 1:
            self.arena.append_to(self.cache)

    def limit(self, shape: TreeShape, max_length: int) -> TreeShape:
        """`shape`, no deeper than may be here for any sequence."""
        if self.arena.is_broken:
            return PLAIN
        depth, lookup = shape.depth, shape.lookup
        for emitter, offset in zip(self.emitters, self.offsets, strict=True):
            if not emitter.finished:
                here = emitter.length, offset, max_length, self.target.text_config
                depth, lookup = depth_limit(depth, *here), depth_limit(lookup, *here)
        return shape._replace(depth=depth, lookup=lookup)

    def run(
        self, shape: TreeShape, chains: Sequence[Sequence[int]] = (), costs: RoundCosts | None = None
    ) -> tuple[CandidateTree, list[list[int]]]:
        """
        Emits a round's tokens.

        Args:
            chains: of each sequence the tokens looked up, no more than the shape wants.
            costs: learns what the round has cost.

        Returns:
            The trees, and of each the path walked (the nodes at which a token was drawn, the root first).
        """
        watch = None if costs is None else Stopwatch(self.target.device)
        self.begin(shape)
        new = 0
        if shape.depth:
            new = max(sum(tokens.shape[1] for _, tokens in unread) for unread in self.unread)
            self.accept()
        tree = self.grow(shape, chains)
        if costs is not None and 0 < new <= FEW:
            costs.add_draft(shape.depth, watch.read())
        elif costs is not None:
            watch.read()
        logits, features, ahead = self.verify(tree)
        if costs is not None:
            costs.add_forward(len(tree), watch.read())
        if self.on_round is not None:
            self.on_round(tree.clone().trimmed())
        paths: list[list[int]] = [[] for _ in self.emitters]
        last = min(len(emitter.emitted) for emitter in self.emitters if not emitter.finished)
        try:
            for row, emitter in enumerate(self.emitters):
                waits = emitter.noise is not None and len(emitter.emitted) > last + LEAD
                if not emitter.finished and not waits:
                    walk(tree.of(row), logits[row : row + 1], emitter, paths[row], ahead)
        finally:
            self.keep(paths, features)
        for lookup, emitter, path in zip(self.lookups, self.emitters, paths, strict=True):
            lookup.extend(emitter.emitted[len(emitter.emitted) - len(path) :])
        self.drop_ended()
        return tree, paths

    def drop_ended(self):
        """Goes on with the sequences that have not ended; unless all that was computed is to be given back."""
        if self.cache_is_wanted:
            return
        left = [row for row, emitter in enumerate(self.emitters) if not emitter.finished]
        if not left or len(left) == len(self.emitters):
            return
        self.is_whole = False
        self.arena.select(left)
        if self.drafter.cache.length:
            self.drafter.select(left)
        self.prompt = self.prompt[left]
        for name in ("emitters", "offsets", "unread", "lookups"):
            kept = getattr(self, name)
            setattr(self, name, [kept[row] for row in left])

    def settle(self, padding: int):
        """In a batch, lets the cache hold what plain decoding leaves there: behind a sequence's end, padding."""
        lacking = [max(emitter.length for emitter in self.emitters) - emitter.length for emitter in self.emitters]
        if not any(lacking):
            return
        trees = []
        for emitter, lacks in zip(self.emitters, lacking, strict=True):
            chain = self.roots().new_tensor([emitter.emitted[-1:] + [padding] * max(lacks - 1, 0)])
            numbers = torch.arange(chain.shape[1], device=chain.device)[None]
            trees.append(CandidateTree(chain, (numbers - 1).clamp(min=0), numbers))
        self.verify(CandidateTree.stacked(trees))
        self.arena.keep([list(range(lacks)) for lacks in lacking])

    def begin(self, shape: TreeShape):
        """Makes ready for a round with such a tree."""

    def accept(self):
        """The draft reads what it has not read yet."""
        features, tokens, counts = self.all_unread()
        self.unread = [[] for _ in self.unread]
        self.drafter.accept(features, tokens, counts)

    def all_unread(self) -> tuple[torch.Tensor, torch.LongTensor, list[int]]:
        """Features (`[batch, most, hidden]`), tokens (`[batch, most]`, on the host), and the number of each."""
        texts = [
            unread[0] if len(unread) == 1 else [torch.cat(parts, dim=1) for parts in zip(*unread, strict=True)]
            for unread in self.unread
        ]
        if len(texts) == 1:
            return *texts[0], [texts[0][1].shape[1]]
        counts = [tokens.shape[1] for _, tokens in texts]
        padded = [
            (functional.pad(f, (0, 0, 0, max(counts) - count)), functional.pad(t, (0, max(counts) - count)))
            for (f, t), count in zip(texts, counts, strict=True)
        ]
        features, tokens = (torch.cat(parts) for parts in zip(*padded, strict=True))
        return features, tokens, counts

    def grow(self, shape: TreeShape, chains: Sequence[Sequence[int]] = ()) -> CandidateTree:
        """The draft's trees, with the tokens looked up grafted on."""
        sequences = [emitter.sequence for emitter in self.emitters]
        tree = self.drafter.grow(self.roots(), shape, sequences)
        if not any(chains):
            return tree
        trees = []
        for row, chain in enumerate(chains):
            one = tree.of(row)
            trees.append(one.grafted(torch.tensor(chain, device=one.tokens.device)).trimmed() if chain else one)
        return CandidateTree.stacked(trees)

    def roots(self) -> torch.LongTensor:
        """The last tokens emitted, `[batch, 1]`."""
        return torch.tensor([emitter.emitted[-1:] for emitter in self.emitters], device=self.prompt.device)

    def position(self) -> int | torch.LongTensor:
        """The root's position id; of a batch `[batch, 1]`."""
        positions = [have + offset for have, offset in zip(self.arena.lengths, self.offsets, strict=True)]
        return positions[0] if len(positions) == 1 else torch.tensor(positions, device=self.target.device)[:, None]

    def verify(self, tree: CandidateTree) -> tuple[torch.Tensor, torch.Tensor, Sequence[tuple[int, int]]]:
        """Logits and features at every node, and what [`walk`] calls `ahead`."""
        prefix = functional.pad(self.prompt, (0, self.arena.length - self.prompt.shape[1]), value=True)
        if len(self.arena.lengths) > 1:
            lengths = torch.tensor(self.arena.lengths, device=prefix.device)[:, None]
            prefix = prefix & (torch.arange(prefix.shape[1], device=prefix.device) < lengths)
        return *self.target.verify(tree, self.arena, prefix, self.position()), ()

    def keep(self, paths: list[list[int]], features: torch.Tensor):
        """Of the rows that the last forward has added keeps those of the paths."""
        self.arena.keep(paths)
        for row, path in enumerate(paths):
            self.unread[row].append((features[row : row + 1, path], self.last_tokens(row, len(path))))

    def last_tokens(self, row: int, count: int) -> torch.LongTensor:
        """`[1, count]`, on the host."""
        emitted = self.emitters[row].emitted
        return torch.tensor([emitted[len(emitted) - count :]], dtype=torch.long, device="cpu")


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
