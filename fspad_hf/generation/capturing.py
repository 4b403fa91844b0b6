"""A CUDA graph of any function of tensors: its rehearsal, and the capture itself."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::lift_fresh",
    "aten::is_nonzero", "aten::_unique2", "aten::repeat_interleave",
}  # fmt: skip
ONE_CAPTURE = threading.Lock()  # a process captures one graph at a time


class Rehearsal(TorchDispatchMode):
    """
    Runs a step as ever, but refuses what a capture would break on: waiting for `device`, and copies between it and the
    host. A capture that breaks leaves CUDA's streams and generators in disorder; so it is rehearsed.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        here = [one for one in given if one.device == self.device]
        scalar = name == "aten::lift_fresh" and given[0].dim() == 0  # a number that is handed to a kernel
        by_mask = name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if here and ((name in WAITING and not scalar) or by_mask):
            raise RuntimeError(f"{name} waits for the device")
        result = func(*args, **(kwargs or {}))
        touched = [*given, *(one for one in tree_leaves(result) if isinstance(one, torch.Tensor))]
        if any(one.device == self.device for one in touched) and any(
            one.device != self.device and one.dim() for one in touched
        ):
            raise RuntimeError(f"{name} copies between host and device")
        return result


def capture(step: Callable[[], Any], device: torch.device, pool=None) -> tuple[Callable[[], None], Any]:
    """
    Records `step`, which must have been rehearsed, as a CUDA graph.

    Args:
        pool: of memory, shared with graphs that never run at the same time; of its own by default.

    Returns:
        What replays it, and the outputs that each replay writes.
    """
    with ONE_CAPTURE, torch.cuda.device(device):
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=_side_stream(device), capture_error_mode="thread_local"):
                outputs = step()
        finally:
            torch.cuda.set_stream(before)
    return graph.replay, outputs


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures, so that they share memory; torch's own is of whichever device came first."""
    return torch.cuda.Stream(device)
