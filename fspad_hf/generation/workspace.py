"""What graphs read and write, and where it waits between calls."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling_fspad import FSPADDraftModel
from .cache import ArenaCache
from .tree import CandidateTree

IDLE_WORKSPACES = 2  # kept for the next call
KINDS = 32  # of rounds of which a workspace keeps the graphs


@dataclass
class Graph:
    """A captured step: what replays it, the tensors that each replay overwrites, and what it reads beside them."""

    replay: Callable[[], None]
    outputs: Any
    keep_alive: tuple = ()


class Workspace:
    """
    What graphs read and write: static buffers for texts up to `capacity` positions, and the graphs themselves.

    Args:
        key: says for which pair it is good.
        arena, draft_cache: of the target and of the draft.
        depth: of the deepest tree.
        lookup: the most tokens that are looked up.
        width: h, of the features.
        vocab_size: V.
    """

    def __init__(
        self, key: tuple, arena: ArenaCache, draft_cache: ArenaCache, depth: int, lookup: int, width: int,
        vocab_size: int, dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        self.key, self.arena, self.draft_cache = key, arena, draft_cache
        self.capacity = arena.capacity
        self.rows = rows = depth + 1
        self.prefix = torch.ones(1, self.capacity, dtype=torch.bool, device=device)
        sizes = (1, 1, 1, 1, 1, lookup, rows)
        self.state = torch.zeros(sum(sizes), dtype=torch.long, device=device)
        parts = self.state.split(sizes)
        self.draft_length, self.length, self.position, self.count, self.chain_count, self.chain, tokens = parts
        self.tokens = tokens[None]  # [1, rows]: what the draft has not read, the root last
        self.features = torch.zeros(1, rows, width, dtype=dtype, device=device)  # those of `tokens`
        self.path = torch.zeros(rows, dtype=torch.long, device=device)
        self.noise = torch.ones(rows, vocab_size, dtype=torch.float32, device=device)
        self.root = CandidateTree.root(self.tokens[:, :1])  # of a plain step
        self.memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # of all the graphs
        self._released: torch.cuda.Event | None = None
        self.head_rows: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._graphs: OrderedDict[tuple, dict] = OrderedDict()

    def write_state(
        self, draft_length: int, length: int, position: int, tokens: Sequence[int], chain: Sequence[int] = ()
    ):
        """
        Tells the graphs where they are.

        Args:
            tokens: those that the draft has not read, the root last.
            chain: those looked up.
        """
        unused = [0] * (len(self.chain) - len(chain))
        told = [draft_length, length, position, len(tokens), len(chain), *chain, *unused, *tokens]
        self.host_state[: len(told)] = torch.tensor(told, device="cpu")
        self.state.copy_(self.host_state, non_blocking=True)

    def graphs(self, kind: tuple) -> dict:
        """The graphs of one kind of round; those of the kinds used longest ago are freed."""
        found = self._graphs.setdefault(kind, {})
        self._graphs.move_to_end(kind)
        while len(self._graphs) > KINDS:
            self._graphs.popitem(last=False)
        return found

    def start(self, prompt: torch.BoolTensor):
        """For a new text."""
        # fresh, since a copy from the one before may still be under way
        self.host_state = torch.zeros_like(self.state, device="cpu", pin_memory=self.state.device.type == "cuda")
        self.features.zero_()
        self.prefix.fill_(True)
        self.prefix[:, : prompt.shape[1]] = prompt

    def release(self):
        """Another stream may have it as soon as this one has done with it."""
        if self.state.device.type == "cuda":
            self._released = torch.cuda.current_stream(self.state.device).record_event()

    def acquire(self):
        """Empties it for a new text."""
        if self._released is not None:
            torch.cuda.current_stream(self.state.device).wait_event(self._released)
        self.arena.clear()
        self.draft_cache.clear()


class WorkspacePool:
    """
    The workspaces of a draft that no call uses now. It lives on the draft and goes with it; copies and pickles of the
    draft have an empty one.
    """

    def __init__(self):
        self.idle: list[tuple[weakref.ref, Workspace]] = []  # the target, which may be gone; used last stands last
        self.refused: dict[tuple, str] = {}  # (pair, kind of round): why it cannot be captured
        self.lock = threading.Lock()

    def __deepcopy__(self, memo) -> "WorkspacePool":
        return WorkspacePool()

    def __reduce__(self):
        return WorkspacePool, ()

    @classmethod
    def of(cls, draft: FSPADDraftModel) -> "WorkspacePool":
        return draft.__dict__.setdefault("_fspad_graphs", cls())

    def take(self, key: tuple, capacity: int, target: PreTrainedModel) -> Workspace | None:
        """Nobody else has it until it is [`~WorkspacePool.put`] back; `None` if there is none of that size."""
        with self.lock:
            self.idle = [(owner, one) for owner, one in self.idle if owner() is not None]
            for pair in self.idle:
                owner, one = pair
                if owner() is target and one.key == key and one.capacity == capacity:
                    self.idle.remove(pair)
                    one.acquire()
                    return one
        return None

    def put(self, workspace: Workspace, target: PreTrainedModel):
        workspace.release()
        with self.lock:
            self.idle = [*self.idle, (weakref.ref(target), workspace)][-IDLE_WORKSPACES:]
