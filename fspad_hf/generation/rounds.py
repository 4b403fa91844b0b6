"""A round of speculation: grow a tree -> verify it -> walk it -> keep the path.

f_t is the target's feature at position t; a round's root is the last token emitted, which the target has not read yet.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from ..modeling_fspad import FSPADDraftOutput
from ..runtime import labelled
from .cache import GROWTH
from .continuation import DraftState
from .costs import RoundCosts, Stopwatch
from .drafting import STATIC_WARPERS, Drafter, latest
from .graphs import CAPTURABLE_WARPERS, Graphs
from .lookup import PromptLookup
from .noise import NoiseQueue
from .stateful import cache_of_rounds
from .target import Target, depth_limit
from .tree import PLAIN, CandidateTree, TreeShape
from .verification import TokenEmitter, emit_drawn, settings_of, walk_ahead, walk_and_emit

LEAD = 32  # tokens that a sequence may be ahead of another, where their noise is held or criteria see them together
FEW = 16  # tokens that a draft reads beside growing a tree, and what it costs is still that of its levels


class Rounds:
    """
    The rounds of one call. Tensors have a row for each sequence that has not ended.

    The steps of a round, [`~Rounds.draft`] and [`~Rounds.verify`], are functions of tensors. They run as they come, or
    as CUDA graphs, for which shapes are fixed: there is padding in what the draft has not read, and attention sees
    whole buffers.

    Args:
        target, drafter: of the call.
        emitters: one a sequence; each has emitted its first token.
        noise: of a call that samples.
        cache: the host's, prefilled.
        features (`[batch, new, hidden]`): of the prompt, less what the cache held before.
        prompt (`[batch, prompt]`): False on padding.
        offsets: of each sequence, a token's position ids less its column.
        on_round: called before each round's first token with the tree; of a single sequence.
        cache_is_wanted: the host's cache is to hold everything in the end; else it is emptied.
        graphs: of the call, if there are any.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        emitters: Sequence[TokenEmitter],
        noise: NoiseQueue | None,
        cache: DynamicCache,
        features: torch.Tensor,
        prompt: torch.BoolTensor,
        offsets: Sequence[Sequence[int]],
        on_round: Callable[[CandidateTree], None] | None = None,
        cache_is_wanted: bool = True,
        graphs: Graphs | None = None,
    ):
        self.target, self.drafter, self.emitters, self.noise = target, drafter, list(emitters), noise
        self.on_round, self.cache, self.cache_is_wanted, self.graphs = on_round, cache, cache_is_wanted, graphs
        self.offsets, self.shown, self.is_cut = list(offsets), prompt.to(target.device), False
        self.shifts = [0] * len(prompt)  # by which a sequence begins later than it did, see `align`
        if graphs is None:
            self.arena = cache_of_rounds(cache, prompt.shape[1], in_its_place=not cache_is_wanted)
        else:
            bucket = graphs.begin(target, drafter, cache, not cache_is_wanted)
            self.arena, drafter.cache = bucket.arena, bucket.draft_cache
        if not prompt.all():
            self.arena.watch_padding()
        # (f_t, token t+1) that the draft has not read yet; a plain step leaves it behind
        self.pending: list[list[tuple[torch.Tensor, torch.LongTensor]]] = []
        self.lookups: list[PromptLookup] = []
        # the first columns, of which there are embeddings alone
        self.without_ids = prompt.shape[1] + 1 - self.emitters[0].length
        first = max(prompt.shape[1] - features.shape[1], self.without_ids - 1)
        for row, emitter in enumerate(self.emitters):
            shown, text = prompt[row].cpu().nonzero()[:, 0], emitter.input_ids.cpu()
            new, known = shown[shown >= first], shown[shown >= self.without_ids]
            read = features[row : row + 1, (new - prompt.shape[1]).to(features.device)]
            self.pending.append([(read, text[:, new + 1 - self.without_ids])])
            words = text[0, known - self.without_ids].tolist() + emitter.emitted
            self.lookups.append(PromptLookup(words, emitter.ends))
        self.read = FSPADDraftOutput(*[features.new_zeros(len(prompt), 1, features.shape[-1])] * 2)
        processors = self.emitters[0].logits_processor
        watched = [e.streamer for e in self.emitters if e.streamer is not None or not e.plain_criteria]
        extras = [e for e in self.emitters if (e.scores, e.raw_logits) != (None, None)]
        here = prompt.device == target.device
        self.can_walk_ahead = here and not extras and all(type(p) in CAPTURABLE_WARPERS for p in processors)
        self.is_watched = bool(watched) or not all(type(p) in STATIC_WARPERS for p in processors)
        self.drop_ended()

    def go_on(self, read: DraftState) -> None:
        """The draft has read a part of the text already; of a single sequence."""
        if self.graphs is None:
            self.drafter.cache, self.pending = read.cache, [[*read.pending, *self.pending[0]]]

    def close(self) -> None:
        """Gives the host's cache what it lacks. Called also when the user's code has raised."""
        if self.cache_is_wanted and len(set(self.arena.lengths)) == 1:
            self.arena.append_to(self.cache)
        if self.graphs is not None:
            self.graphs.end()

    def limit(self, shape: TreeShape, max_length: int) -> TreeShape:
        """`shape`, no deeper than may be here for any sequence."""
        if self.arena.needs_plain_step:
            return PLAIN
        limited = self._limited(shape, max_length)
        if self.graphs is not None:  # near `max_length` a tree of the usual shape costs less than new graphs would
            self.is_cut = self._limited(shape, None) != shape
            return limited if self.is_cut else shape
        return limited

    def _limited(self, shape: TreeShape, max_length: int | None) -> TreeShape:
        depth, lookup = shape.depth, shape.lookup
        for emitter, offset in zip(self.emitters, self.offsets, strict=True):
            if not emitter.finished:
                length = None if max_length is None else max_length + self.without_ids
                here = emitter.length + self.without_ids, max(offset), length, self.target.text_config
                depth, lookup = depth_limit(depth, *here), depth_limit(lookup, *here)
        return shape._replace(depth=depth, lookup=lookup)

    @labelled("round")
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
        inputs = self.prepare(shape, chains)
        tree = CandidateTree.chain(inputs.numbers[:, :1])
        if inputs.levels:
            tree = self.draft(inputs)
        if costs is not None:
            seconds = watch.read()
            if shape.depth and 0 < max(inputs.counts) <= FEW:
                costs.add_draft(shape.depth, seconds)
        logits, features, walked = self.verify(inputs, tree)
        if costs is not None:
            costs.add_forward(self.arena.reread_rows + len(tree), watch.read())
        if self.on_round is not None:
            self.on_round(tree.clone().trimmed())
        paths: list[list[int]] = [[] for _ in self.emitters]
        try:
            self.emit(inputs, tree, logits, walked, paths)
        finally:
            self.keep(paths, features)
        self.drop_ended()
        self.align()
        return tree, paths

    def prepare(self, shape: TreeShape, chains: Sequence[Sequence[int]] = ()) -> "RoundInputs":
        """What the host says to a round's steps."""
        captured, device, levels = self.can_replay(shape), self.target.device, max(shape.depth, shape.lookup)
        self.make_room(shape)
        features, tokens = self.to_read(captured) if shape.depth else (None, [[] for _ in self.emitters])
        ahead = self.can_walk_ahead and (captured or device.type != "cpu")
        coupled = self.noise is not None and self.drafter.settings.coupled_drafting and shape.depth > 0
        coming, noise = 1 + levels if ahead else shape.depth if coupled else 0, None
        if self.noise is not None and coming:
            noise = self.noise.peek(coming, [emitter.sequence for emitter in self.emitters])
        ahead = ahead and (self.noise is None) == (noise is None)
        read = 0 if features is None else features.shape[1]
        looked_up = shape.lookup if captured else max(map(len, chains), default=0)
        rows, firsts = [], self.arena.firsts()
        for row, emitter in enumerate(self.emitters):
            emitter.settings = settings_of(emitter.logits_processor) if ahead and self.is_watched else None
            length, new, chain = self.arena.lengths[row], tokens[row], list(chains[row]) if chains else []
            here = emitter.emitted[-1], self.drafter.cache.lengths[row], len(new), len(chain), length
            padding = [0] * (read - len(new)), [0] * (looked_up - len(chain))
            positions = [length - self.shifts[row] + offset for offset in self.offsets[row]]
            rows.append([*here, *positions, *firsts[row], *new, *padding[0], *chain, *padding[1]])
        numbers = torch.tensor(rows, device="cpu", pin_memory=device.type == "cuda").to(device, non_blocking=True)
        sizes = 1, 1, 1, 1, 1, len(self.offsets[0]), len(firsts[0]), read, looked_up
        counts = [len(new) for new in tokens]
        return RoundInputs(
            shape, levels, captured, ahead, numbers, sizes, counts, features, noise, coupled and noise is not None
        )

    def can_replay(self, shape: TreeShape) -> bool:
        """Whether a round's steps may be graphs."""
        if self.graphs is None or self.is_cut:
            return False
        static = all(type(warper) in CAPTURABLE_WARPERS for warper in self.drafter.warpers)
        return static and not (self.is_watched and not self.graphs.are_current())

    def make_room(self, shape: TreeShape) -> None:
        """For a round with such trees."""
        self.arena.make_room()
        if self.graphs is not None:
            bucket = self.graphs.fit(self.arena.longest)
            self.arena, self.drafter.cache = bucket.arena, bucket.draft_cache
        missing = max(self.arena.capacity, self.arena.longest + shape.rows) - self.shown.shape[1]
        if missing > 0:
            more = missing if self.arena.capacity else missing + GROWTH  # for graphs, as wide as the buffers
            self.shown = functional.pad(self.shown, (0, more), value=True)

    def to_read(self, captured: bool) -> tuple[torch.Tensor, list[list[int]]]:
        """The pairs that the draft has not read: features (`[batch, most, hidden]`) and the tokens of each text."""
        features, tokens, counts = self.all_pending()
        most = self.graphs.rows if captured else max(counts)
        if max(counts) > most:  # all but the last pair of each are read at once
            self.drafter.accept(features, tokens, [max(count - 1, 0) for count in counts])
            last = torch.tensor(counts, device=features.device)[:, None, None].sub(1).clamp(min=0)
            features = features.gather(1, last.expand(-1, 1, features.shape[-1]))
            tokens = [row[count - 1 : count] for row, count in zip(tokens.tolist(), counts, strict=True)]
        else:
            tokens = [row[:count] for row, count in zip(tokens.tolist(), counts, strict=True)]
        return functional.pad(features, (0, 0, 0, most - features.shape[1])), tokens

    def all_pending(self) -> tuple[torch.Tensor, torch.LongTensor, list[int]]:
        """Features (`[batch, most, hidden]`), tokens (`[batch, most]`, on the host), and the number of each."""
        texts = [
            pending[0] if len(pending) == 1 else [torch.cat(parts, dim=1) for parts in zip(*pending, strict=True)]
            for pending in self.pending
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

    @labelled("draft")
    def draft(self, inputs: "RoundInputs") -> CandidateTree:
        """The draft reads what it has not read and grows its trees; the tokens looked up are grafted on."""

        def step(numbers, features, noise, *before):
            root, pairs, new, looked_up, _, _, _, tokens, chain = numbers.split(inputs.sizes, dim=1)
            read, tree = FSPADDraftOutput(*before), CandidateTree.chain(root)
            if inputs.shape.depth:
                read = latest(self.drafter.read(features, tokens, pairs), new, read)
                tree = self.drafter.grow(read, pairs + new, root, inputs.shape, noise)
            return tree.grafted(chain, looked_up) if chain.shape[1] else tree, read

        noise = inputs.noise[: inputs.shape.depth] if inputs.coupled else None
        key = "draft", inputs.shape, inputs.sizes, settings_of(self.drafter.warpers)
        tensors = inputs.numbers, inputs.features, noise, self.read.logit_features, self.read.features
        tree, self.read = self.done(inputs, step, key, tensors)
        if inputs.shape.depth:
            self.drafter.cache.advance(inputs.counts)
            self.pending = [[] for _ in self.pending]
        return tree if inputs.captured else tree.trimmed()

    @labelled("verify")
    def verify(
        self, inputs: "RoundInputs", tree: CandidateTree
    ) -> tuple[torch.Tensor, torch.Tensor, torch.LongTensor | None]:
        """Logits and features at every node, and, where nothing of the user's has a say in it, the walk."""

        def step(numbers, shown, noise, *parts):
            _, _, _, _, length, positions, firsts, *_ = numbers.split(inputs.sizes, dim=1)
            tree, arena = CandidateTree(*parts), self.arena
            arena.place(length, arena.longest + len(tree), firsts)
            logits, features = self.target.verify(tree, arena, shown, positions)
            walked = None
            if inputs.ahead:
                walked = walk_ahead(tree, logits, self.emitters[0].logits_processor, noise, inputs.levels)
            return logits, features, walked

        warpers = settings_of(self.emitters[0].logits_processor) if inputs.ahead else ()
        key = "verify", inputs.levels, inputs.sizes, inputs.ahead, warpers
        noise = inputs.noise if inputs.ahead else None
        tensors = inputs.numbers, self.shown, noise, tree.tokens, tree.parents, tree.depths
        return self.done(inputs, step, key, tensors, checked=lambda outputs: outputs[0])

    def done(self, inputs: "RoundInputs", step, key: tuple, tensors: tuple, checked: Callable | None = None):
        """What a step returns, by a graph if that is possible."""
        replayed = self.graphs.run(step, key, tensors, checked) if inputs.captured else None
        return step(*tensors) if replayed is None else replayed

    @labelled("emit")
    def emit(
        self, inputs: "RoundInputs", tree: CandidateTree, logits: torch.Tensor, walked: torch.LongTensor | None,
        paths: list[list[int]],
    ) -> None:  # fmt: skip
        """Emits tokens along the trees; fills `paths` with the nodes they were drawn at."""
        last = min(len(emitter.emitted) for emitter in self.emitters if not emitter.finished)
        nodes: list[int | None] = []
        for emitter in self.emitters:
            waits = (self.noise is not None or emitter.ends_with_batch) and len(emitter.emitted) > last + LEAD
            nodes.append(None if emitter.finished or waits else 0)
        if walked is not None:  # the round's one wait for the device
            for row, (count, *drawn) in enumerate(walked.tolist()):
                if nodes[row] == 0 and count:
                    pairs = list(zip(drawn, drawn[len(drawn) // 2 :], strict=False))[:count]
                    nodes[row] = emit_drawn(tree, row, pairs, self.emitters[row], paths[row])
        if any(node is not None for node in nodes):
            walk_and_emit(tree, logits, self.emitters, paths, inputs.levels, nodes)

    @labelled("keep")
    def keep(self, paths: list[list[int]], features: torch.Tensor) -> None:
        """Of the rows that the last forward has added keeps those of the paths."""
        self.arena.keep(paths)
        for row, path in enumerate(paths):
            emitter = self.emitters[row]
            tokens = emitter.emitted[len(emitter.emitted) - len(path) :]
            self.pending[row].append((features[row : row + 1, path], torch.tensor([tokens], device="cpu").long()))
            self.lookups[row].extend(tokens)

    def drop_ended(self) -> None:
        """Goes on with the sequences that have not ended; unless all that was computed is to be given back."""
        left = [row for row, emitter in enumerate(self.emitters) if not emitter.finished]
        if self.cache_is_wanted or self.graphs is not None or not left or len(left) == len(self.emitters):
            return
        self.arena.select(left)
        self.drafter.cache.select(left)
        self.shown = self.shown[left]
        self.read = FSPADDraftOutput(self.read.logit_features[left], self.read.features[left])
        for name in ("emitters", "offsets", "shifts", "pending", "lookups"):
            kept = getattr(self, name)
            setattr(self, name, [kept[row] for row in left])

    def align(self) -> None:
        """Where no mask can tell them apart, the rows of a forward have the same columns in all sequences."""
        if self.target.chains_only and any(moved := self.arena.align()):
            self.shifts = [shift + more for shift, more in zip(self.shifts, moved, strict=True)]
            moved = torch.tensor(moved, device=self.shown.device)[:, None]
            columns = torch.arange(self.shown.shape[1], device=moved.device) - moved
            self.shown = self.shown.gather(1, columns.clamp(min=0)) & (columns >= 0)

    def settle(self, padding: int) -> None:
        """Lets the cache hold what plain decoding leaves there: in a batch padding, behind a sequence's end."""
        self.arena.forget_pending()
        most = 64 if self.graphs is None else self.graphs.spare - 1
        lengths = [emitter.length + self.without_ids for emitter in self.emitters]
        # of a sequence that was cut it has too much
        read = [min(n - by, m - 1) for n, by, m in zip(self.arena.lengths, self.shifts, lengths, strict=True)]
        self.arena.lengths = [n + by for n, by in zip(read, self.shifts, strict=True)]
        self.align()
        while min(read) < max(lengths) - 1:
            inputs, trees = self.prepare(PLAIN), []
            lacking = [min(max(lengths) - 1 - length, most) for length in read]
            for emitter, length, lacks in zip(self.emitters, read, lacking, strict=True):
                text = emitter.input_ids[0, length - self.without_ids :][: max(lacks, 1)].tolist()
                chain = inputs.numbers.new_tensor([text + [padding] * (max(lacks, 1) - len(text))])
                trees.append(CandidateTree.chain(chain))
            self.verify(replace(inputs, captured=False, ahead=False), CandidateTree.stacked(trees))
            self.arena.keep([list(range(lacks)) for lacks in lacking])
            read = [length + lacks for length, lacks in zip(read, lacking, strict=True)]
            self.align()
        self.arena.unalign(self.shifts)


@dataclass(frozen=True)
class RoundInputs:
    """
    What a round's steps are given.

    Args:
        shape: of the trees.
        levels: below the roots.
        captured: the steps may be graphs.
        ahead: the walk is made on the device.
        numbers (`[batch, ...]`): the root's token, the pairs that the draft has read, how many it reads now, how many
            tokens were looked up, the target's length, the root's position ids, the first columns of sliding layers,
            the tokens to read, those looked up; as wide as `sizes` say.
        counts: of each sequence the pairs that the draft reads now.
        features (`[batch, new, hidden]`): of these pairs.
        noise (`[draws, batch, V]`): of the coming draws.
        coupled: the draft sees it.
    """

    shape: TreeShape
    levels: int
    captured: bool
    ahead: bool
    numbers: torch.LongTensor
    sizes: tuple[int, ...]
    counts: list[int]
    features: torch.Tensor | None
    noise: torch.Tensor | None
    coupled: bool
