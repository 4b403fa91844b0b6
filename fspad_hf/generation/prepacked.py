"""On a CPU: linear layers whose weights also lie in the layout that a forward over a few rows wants.

A plain decoding step multiplies each weight with one row, and reads it as it lies. For the few rows of a tree oneDNN
first brings the weight into blocks, at every call, which can cost more than the product. Keeping the blocked copy
takes the weight's memory once more.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import nn

from .stand_ins import StandIns

ROWS = 8  # the layout is chosen for about so many


class PackedWeight(NamedTuple):
    weight: torch.Tensor  # [out, in], as the module has it; held, so that its id stays its own
    version: int  # of the weight when it was packed
    packed: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> "PackedWeight":
        return cls(weight, weight._version, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS))


class PackedWeights(dict):
    """id(weight) -> [`PackedWeight`] of one model. It lives on the model and is no part of its copies and pickles."""

    def __deepcopy__(self, memo) -> "PackedWeights":
        return PackedWeights()

    def __reduce__(self):
        return PackedWeights, ()


class PrepackedLinears(StandIns):
    """Within it `linear` of a packed weight runs on the packed copy."""

    def __init__(self, weights: dict[int, PackedWeight]):
        super().__init__({nn.functional.linear: self._linear})
        self.weights = weights

    def add(self, weight: torch.Tensor):
        """Packs one weight more, for as long as this context is used."""
        if _can_pack(weight):
            self.weights[id(weight)] = PackedWeight.of(weight)

    def _linear(self, func, args, kwargs):
        found = self.weights.get(id(args[1])) if len(args) >= 2 else None
        if found is None or args[0].dtype != found.weight.dtype or torch.is_grad_enabled():
            return func(*args, **kwargs)
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return torch.ops.mkldnn._linear_pointwise(args[0], found.packed, bias, "none", [], "")


def prepacked(model: nn.Module) -> AbstractContextManager:
    """
    A context, to be entered as often as wanted, in which the model's linear layers run on packed weights.

    Weights that lie elsewhere than on the CPU, that are quantised or that this build of PyTorch cannot pack stay as
    they are. The copies are kept on the model, and made anew where a weight has changed.
    """
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return nullcontext()
    known = model.__dict__.get("_fspad_prepacked", {})
    weights = PackedWeights()
    for module in model.modules():
        if type(module) is nn.Linear and _can_pack(module.weight):
            weight = module.weight
            found = known.get(id(weight))
            if found is None or found.version != weight._version or found.weight is not weight:
                found = PackedWeight.of(weight)
            weights[id(weight)] = found
    model.__dict__["_fspad_prepacked"] = weights
    return PrepackedLinears(dict(weights)) if weights else nullcontext()


def _can_pack(weight: torch.Tensor) -> bool:
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.device.type != "cpu" or weight.is_inference():
        return False
    if weight.layout != torch.strided or not weight.is_contiguous():
        return False
    halves = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or halves
