"""What can be captured as a CUDA graph, what a graph freezes, and the capture itself."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.generation import EtaLogitsWarper

from ..modeling_fspad import FSPADDraftModel
from .drafting import STATIC_WARPERS
from .probe import foreign_hooks
from .target import Target
from .tree import TreeShape
from .verification import is_plain

CAPTURABLE_WARPERS = tuple(
    warper for warper in STATIC_WARPERS if warper is not EtaLogitsWarper
)  # which looks at values
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
        stream = torch.cuda.Stream()  # torch's own would be one of whichever device came first
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outputs = step()
        finally:
            torch.cuda.set_stream(before)
    return graph.replay, outputs


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def why_no_graphs(target: Target, draft: FSPADDraftModel, dtype: torch.dtype) -> str | None:
    """
    Why a pair's rounds are not captured; `None` if they are. Cheap: it is asked at each call.

    Args:
        dtype: of the target's features.
    """
    model, device = target.model, target.device
    modules = list(model.modules())
    strangers = sorted({type(m).__module__ for m in modules if not _is_known(m)})
    rules = {
        f"they are on {device.type}": not can_capture(device),
        "the draft is in another dtype or on another device": (draft.dtype, draft.device) != (dtype, device),
        "the target is compiled": not target.use_hook,
        "the target is on several devices": any(p.device != device for p in model.parameters()),
        f"the target has modules of {', '.join(strangers)}": bool(strangers),
        "hooks are on the target": foreign_hooks(model) > 0,
        "a module of the target has a forward of its own": any("forward" in m.__dict__ for m in modules),
        "autocast is on": torch.is_autocast_enabled(device.type),
    }
    return next((reason for reason, holds in rules.items() if holds), None)


def _is_known(module: torch.nn.Module) -> bool:
    """Whether its forward is one that depends on tensors and plain attributes alone."""
    return type(module).__module__.split(".")[0] in ("torch", "transformers")


def pair_key(model: PreTrainedModel, draft: FSPADDraftModel) -> tuple:
    """What a graph freezes of a pair: where its weights lie, and whatever Python decides a forward by."""
    modules = [*model.modules(), *draft.modules()]
    plain = tuple(
        (type(module), id(type(module).forward), *((k, v) for k, v in vars(module).items() if is_plain(v)))
        for module in modules
    )
    configs = repr((model.config.to_dict(), draft.config.to_dict()))
    attention = model.config.get_text_config()._attn_implementation, draft.config._attn_implementation
    switches = (
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    )  # fmt: skip
    return (
        addresses(model, draft),
        plain,
        configs,
        attention,
        switches,
        TreeShape.of(draft.speculation_settings(model.device)),
    )


def addresses(*models: torch.nn.Module) -> tuple[int, ...]:
    """Where the weights lie."""
    return tuple(tensor.data_ptr() for model in models for tensor in (*model.parameters(), *model.buffers()))
