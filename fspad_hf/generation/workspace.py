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
from .tree import TreeShape

IDLE_WORKSPACES = 2  # kept for the next call
SHAPES = 12  # tree shapes of which a workspace keeps the graphs


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
        width: h, of the features.
        vocab_size: V.
    """

    def __init__(
        self, key: tuple, arena: ArenaCache, draft_cache: ArenaCache, depth: int, width: int, vocab_size: int,
        dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        self.key, self.arena, self.draft_cache, self.depth = key, arena, draft_cache, depth
        self.capacity = arena.capacity
        rows = depth + 1
        self.prefix = torch.ones(1, self.capacity, dtype=torch.bool, device=device)
        self.state = torch.zeros(4 + rows, dtype=torch.long, device=device)
        self.draft_length, self.length, self.position, self.count = (self.state[i : i + 1] for i in range(4))
        self.tokens = self.state[None, 4:]  # [1, rows]: what the draft has not read, the root last
        self.host_state = torch.zeros_like(self.state, device="cpu", pin_memory=device.type == "cuda")
        self.features = torch.zeros(1, rows, width, dtype=dtype, device=device)  # those of `tokens`
        self.path = torch.zeros(rows, dtype=torch.long, device=device)
        self.noise = torch.ones(rows, vocab_size, device=device)
        self.head_rows: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._graphs: OrderedDict[TreeShape, dict] = OrderedDict()

    def write_state(self, draft_length: int, length: int, position: int, tokens: Sequence[int]):
        """Tells the graphs where they are; `tokens` are those that the draft has not read, the root last."""
        told = [draft_length, length, position, len(tokens), *tokens]
        self.host_state[: len(told)] = torch.tensor(told)
        self.state.copy_(self.host_state, non_blocking=True)

    def graphs(self, shape: TreeShape) -> dict:
        """The graphs of one shape of tree; those of the shapes used longest ago are freed."""
        found = self._graphs.setdefault(shape, {})
        self._graphs.move_to_end(shape)
        while len(self._graphs) > SHAPES:
            self._graphs.popitem(last=False)
        return found

    def start(self, prompt: torch.BoolTensor):
        """For a new text."""
        self.features.zero_()
        self.prefix.fill_(True)
        self.prefix[:, : prompt.shape[1]] = prompt


class WorkspacePool:
    """
    The workspaces of a draft that no call uses now. It lives on the draft and goes with it; copies and pickles of the
    draft have an empty one.
    """

    def __init__(self):
        self.idle: list[tuple[weakref.ref, Workspace]] = []  # the target, which may be gone; used last stands last
        self.refused: dict[tuple, str] = {}  # key: why it cannot be captured
        self.lock = threading.Lock()

    def __deepcopy__(self, memo) -> "WorkspacePool":
        return WorkspacePool()

    def __reduce__(self):
        return WorkspacePool, ()

    @classmethod
    def of(cls, draft: FSPADDraftModel) -> "WorkspacePool":
        return draft.__dict__.setdefault("_fspad_graphs", cls())

    def take(self, key: tuple, capacity: int) -> Workspace | None:
        """Nobody else has it until it is [`~WorkspacePool.put`] back; `None` if there is none of that size."""
        with self.lock:
            self.idle = [(target, one) for target, one in self.idle if target() is not None]
            found = next((pair for pair in self.idle if pair[1].key == key and pair[1].capacity == capacity), None)
            if found is None:
                return None
            self.idle.remove(found)
            return found[1]

    def put(self, workspace: Workspace, target: PreTrainedModel):
        with self.lock:
            self.idle = [*self.idle, (weakref.ref(target), workspace)][-IDLE_WORKSPACES:]
