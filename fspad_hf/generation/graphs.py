"""The steps of a round as CUDA graphs: the very functions that run eagerly elsewhere, recorded once and replayed.

Nothing here knows what a step does. It is a function of tensors that reads and writes two caches and may be run as
often as one likes. A graph freezes shapes, addresses and whatever Python decides, so a step is first rehearsed, then
recorded on inputs of its own, and where that can be done a replay is compared with the step before it is trusted.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import EtaLogitsWarper
from transformers.utils import logging

from ..modeling_fspad import FSPADDraftModel
from .cache import ArenaCache
from .capturing import Rehearsal, capture
from .drafting import STATIC_WARPERS, Drafter
from .exact_mode import is_exact_forward
from .probe import foreign_hooks
from .remembered import Remembered
from .target import Target
from .tree import TreeShape
from .verification import is_plain

logger = logging.get_logger(__name__)

CAPTURABLE_WARPERS = tuple(
    warper for warper in STATIC_WARPERS if warper is not EtaLogitsWarper
)  # which looks at values
SMALLEST_BUCKET = 512  # positions; each bucket is twice the one before
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest value; what rounding explains
HALF_TOLERANCE = 0.1
IDLE_WORKSPACES = 2  # kept for the next call
KINDS = 64  # graphs that a bucket keeps
BREAKS_DRAWS = Version(torch.__version__).release < (2, 13)  # a capture, of other threads' draws on the device


@dataclass
class Graph:
    """A recorded step: what it reads, what replays it, and the tensors that each replay overwrites."""

    inputs: Sequence[torch.Tensor | None]
    replay: Callable[[], None]
    outputs: Any

    def __call__(self, inputs: Sequence[torch.Tensor | None]) -> Any:
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None and mine.data_ptr() != given.data_ptr():
                mine.copy_(given, non_blocking=True)
        self.replay()
        return self.outputs


@dataclass
class Bucket:
    """Caches for texts up to some length, and the graphs that read and write them."""

    arena: ArenaCache
    draft_cache: ArenaCache
    graphs: OrderedDict[tuple, Graph] = field(default_factory=OrderedDict)
    inputs: dict[tuple, torch.Tensor] = field(default_factory=dict)  # shared by graphs of like inputs

    @contextmanager
    def fixed(self) -> Iterator[None]:
        self.arena.is_fixed = self.draft_cache.is_fixed = True
        try:
            yield
        finally:
            self.arena.is_fixed = self.draft_cache.is_fixed = False

    def own(self, name: str, number: int, given: torch.Tensor | None) -> torch.Tensor | None:
        if given is None:
            return None
        key = name, number, given.shape, given.dtype
        if key not in self.inputs:
            self.inputs[key] = torch.empty_like(given, memory_format=torch.contiguous_format)
        return self.inputs[key].copy_(given)


class Graphs:
    """
    The graphs of a pair, which one call at a time uses: from [`~Graphs.begin`] to [`~Graphs.end`].

    Args:
        pool: where they wait between calls.
        key: says for which pair they are good.
        target: of that pair.
    """

    def __init__(self, pool: "GraphPool", key: tuple, target: PreTrainedModel):
        self.pool, self.key, self.owner = pool, key, weakref.ref(target)
        self.buckets: dict[int, Bucket] = {}
        self.head_rows: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.memory = None  # shared by all of them: they never run at the same time
        self._released: torch.cuda.Event | None = None

    def begin(self, target: Target, drafter: Drafter, cache: DynamicCache, in_its_place: bool) -> Bucket:
        """The bucket of a prefilled cache; both caches of it are ready for the rounds."""
        self.device, shape = target.device, TreeShape.of(drafter.settings)
        self.rows = 1 + max(shape.depth, shape.lookup)  # the most pairs that a round leaves behind
        self.spare = max(self.rows + max(shape.depth - 1, 0) * shape.top_k, shape.rows) + 1
        if self.device.type == "cuda":
            self.memory = self.memory or torch.cuda.graph_pool_handle()
            if self._released is not None:
                torch.cuda.current_stream(self.device).wait_event(self._released)
        capacity = self._capacity(cache.get_seq_length())
        if capacity in self.buckets:
            self.bucket = self._emptied(capacity)
            self.bucket.arena.load(cache, in_its_place)
        else:
            arena = ArenaCache.from_dynamic(cache, capacity, self.spare + self.rows, in_its_place)
            config, texts = drafter.draft.config, len(arena.lengths)
            draft_cache = ArenaCache(1, texts, capacity)
            nothing = torch.zeros(
                texts, config.num_key_value_heads, 0, config.head_dim, dtype=drafter.draft.dtype, device=self.device
            )
            draft_cache.layers[0].lazy_initialization(nothing, nothing)
            self.bucket = self.buckets[capacity] = Bucket(arena, draft_cache)
        self._weights = [*target.model.parameters(), *target.model.buffers(), *drafter.draft.parameters()]
        self._addresses = [weight.data_ptr() for weight in self._weights]
        if drafter.draft.draft_vocab_ids is not None:  # the target's head may have changed since the last call
            self._take_head_rows(target, target.take_head_rows(drafter.draft.draft_vocab_ids))
        return self.bucket

    def _take_head_rows(self, target: Target, fresh: tuple[torch.Tensor, torch.Tensor | None] | None) -> None:
        if self.head_rows is None:
            self.head_rows = fresh
        elif fresh is not None:
            for mine, new in zip(self.head_rows, fresh, strict=True):
                if mine is not None:
                    mine.copy_(new)
        target.head_rows = self.head_rows

    def fit(self, length: int) -> Bucket:
        """A bucket with room for a round behind so many positions, and what the one before held."""
        capacity, smaller = self._capacity(length), self.bucket
        if capacity > smaller.arena.capacity:
            if capacity not in self.buckets:
                self.buckets[capacity] = Bucket(smaller.arena.resized(capacity), smaller.draft_cache.resized(capacity))
            self.bucket = self._emptied(capacity)
            self.bucket.arena.copy_from(smaller.arena)
            self.bucket.draft_cache.copy_from(smaller.draft_cache)
        return self.bucket

    def _capacity(self, length: int) -> int:
        """No more than twice of what a round needs."""
        return max(SMALLEST_BUCKET, 1 << (length + self.spare - 1).bit_length())

    def _emptied(self, capacity: int) -> Bucket:
        bucket = self.buckets[capacity]
        bucket.arena.clear(), bucket.draft_cache.clear()
        return bucket

    def end(self) -> None:
        """Another call may have them, on another stream as soon as this one has done with them."""
        self._weights = self._addresses = ()
        if self.device.type == "cuda":
            self._released = torch.cuda.current_stream(self.device).record_event()
        self.pool.put(self)

    def are_current(self) -> bool:
        """Whether the weights are where they were when the call began."""
        return self._addresses == [weight.data_ptr() for weight in self._weights]

    def run(
        self, step: Callable[..., Any], key: tuple, inputs: Sequence[torch.Tensor | None],
        checked: Callable[[Any], torch.Tensor] | None = None,
    ) -> Any:  # fmt: skip
        """
        What `step(*inputs)` returns, by a replay, in tensors that the next one overwrites; `None` if the step is
        refused: then the caller runs it.

        Args:
            key: a name, and whatever else of Python's the step goes by.
            checked: the part of its outputs by which a replay is compared with the step, once.
        """
        signature = key, tuple(None if one is None else (one.shape, one.dtype) for one in inputs)
        graphs = self.bucket.graphs
        if signature not in graphs:
            if (self.key, signature) in self.pool.refused or (BREAKS_DRAWS and _calls > 1):
                return None
            try:
                graphs[signature] = self._made(step, key[0], inputs, checked)
            except (RuntimeError, NotImplementedError) as error:
                reason = (str(error).strip() or "no message").splitlines()[0]
                reason = reason if isinstance(error, Differs) else f"{type(error).__name__}: {reason}"
                self.pool.refused[self.key, signature] = reason
                logger.warning_once(f"A step of {type(self.owner()).__name__} runs without a CUDA graph: {reason}")
                return None
            while len(graphs) > KINDS:
                graphs.popitem(last=False)
        graphs.move_to_end(signature)
        return graphs[signature](inputs)

    def _made(self, step, name: str, inputs, checked) -> Graph:
        expected = None if checked is None else checked(step(*inputs)).clone()
        own = [self.bucket.own(name, number, one) for number, one in enumerate(inputs)]
        with self.bucket.fixed():
            with Rehearsal(self.device):
                step(*own)
            graph = Graph(own, *capture(lambda: step(*own), self.device, self.memory))
        if expected is not None:
            difference = _difference(checked(graph(inputs)), expected)
            if difference is not None:
                raise Differs(f"a replay's logits are off by {difference}")
        return graph


class Differs(RuntimeError):
    """A replay does not compute what the step does."""


class GraphPool:
    """The graphs of a draft that no call uses now, and the steps that cannot be one."""

    def __init__(self):
        self.idle: list[Graphs] = []  # used last stands last
        self.refused: dict[tuple, str] = {}  # (pair, step) -> why
        self.lock = threading.Lock()

    @classmethod
    def of(cls, draft: FSPADDraftModel) -> "GraphPool":
        return _pools.get(draft, "graphs", cls, keep=lambda made: True)

    def take(self, key: tuple, target: PreTrainedModel) -> Graphs:
        """Nobody else has them until they are [`~GraphPool.put`] back."""
        with self.lock:
            self.idle = [one for one in self.idle if one.owner() is not None]
            for one in self.idle:
                if one.owner() is target and one.key == key:
                    self.idle.remove(one)
                    return one
        return Graphs(self, key, target)

    def put(self, graphs: Graphs) -> None:
        with self.lock:
            self.idle = [*self.idle, graphs][-IDLE_WORKSPACES:]


_pools = Remembered()
_calls, _counting = 0, threading.Lock()


def free_graphs(draft: FSPADDraftModel) -> None:
    """
    Frees what a draft's CUDA graphs hold between calls: buffers for both caches, and the graphs. The next call makes
    them anew.
    """
    GraphPool.of(draft).idle.clear()


@contextmanager
def counted_call() -> Iterator[None]:
    """Around each call of this process that speculates."""
    global _calls
    with _counting:
        _calls += 1
    try:
        yield
    finally:
        with _counting:
            _calls -= 1


def graphs_of(target: Target, drafter: Drafter, dtype: torch.dtype, batch: int) -> Graphs | None:
    """
    The graphs of a call, if the settings want them and there can be any.

    Args:
        dtype: of the target's features.
    """
    model, draft = target.model, drafter.draft
    if not drafter.settings.cuda_graphs:
        return None
    reason = why_no_graphs(target, draft, dtype)
    if reason is not None:
        logger.warning_once(f"The rounds of {type(model).__name__} run without CUDA graphs: {reason}")
        return None
    key = batch, TreeShape.of(drafter.settings), *pair_key(model, draft)
    return GraphPool.of(draft).take(key, model)


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def why_no_graphs(target: Target, draft: FSPADDraftModel, dtype: torch.dtype) -> str | None:
    """Why a pair's rounds are not captured; `None` if they are. Cheap: it is asked at each call."""
    model, device = target.model, target.device
    modules = list(model.modules())
    strangers = sorted({type(m).__module__ for m in modules if not _is_known(m)})
    rules = {
        f"they are on {device.type}": not can_capture(device),
        "the draft is in another dtype or on another device": (draft.dtype, draft.device) != (dtype, device),
        "the target verifies chains only": target.chains_only,
        "the target is compiled": not target.use_hook,
        "the target is on several devices": any(p.device != device for p in model.parameters()),
        f"the target has modules of {', '.join(strangers)}": bool(strangers),
        "hooks are on the target": foreign_hooks(model) > 0,
        "a module of the target has a forward of its own": any(
            "forward" in vars(m) and not is_exact_forward(vars(m)["forward"]) for m in modules
        ),
        "autocast is on": torch.is_autocast_enabled(device.type),
    }
    return next((reason for reason, holds in rules.items() if holds), None)


def _is_known(module: torch.nn.Module) -> bool:
    """Whether its forward is one that depends on tensors and plain attributes alone."""
    return type(module).__module__.split(".")[0] in ("torch", "transformers")


def pair_key(model: PreTrainedModel, draft: FSPADDraftModel) -> tuple:
    """What a graph freezes of a pair: where its weights lie, and whatever Python decides a forward by."""
    plain = tuple(
        (type(module), id(type(module).forward), *((k, v) for k, v in vars(module).items() if is_plain(v)))
        for module in (*model.modules(), *draft.modules())
    )
    addresses = tuple(
        tensor.data_ptr() for one in (model, draft) for tensor in (*one.parameters(), *one.buffers())
    )  # fmt: skip
    configs = repr((model.config.to_dict(), draft.config.to_dict()))
    attention = model.config.get_text_config()._attn_implementation, draft.config._attn_implementation
    cuda = torch.backends.cuda
    switches = (
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
    )  # fmt: skip
    return addresses, plain, configs, attention, switches


def _difference(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """By how much values differ, where rounding does not explain it."""
    tolerance = TOLERANCE.get(expected.dtype, HALF_TOLERANCE)
    found, expected = found.float(), expected.float()
    off = torch.where(found == expected, 0.0, found - expected)  # of equal infinities, none
    most = float(torch.where(expected.isinf(), 0.0, expected).abs().max())
    difference = float(off.abs().max())
    return None if difference <= most * tolerance else f"{difference:.3g} of {most:.3g}"
