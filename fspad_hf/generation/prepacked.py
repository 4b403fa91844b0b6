"""On a CPU: linear layers whose weights also lie in the layout that a forward over a few rows wants.

A plain decoding step multiplies each weight with one row, and reads it as it lies. For the few rows of a tree oneDNN
first brings the weight into blocks, at every call, which can cost more than the product. Keeping the blocked copy
takes the weight's memory once more.
"""

from typing import NamedTuple

import torch
from torch import nn

FEW = 2  # rows in float32: a plain step is what it is in plain decoding
ROWS = 8  # the layout is chosen for about so many
SAMPLED = 64  # values of a weight by which a change is noticed


class PackedWeight(NamedTuple):
    weight: torch.Tensor  # [out, in], as the module has it; held, so that its id stays its own
    version: int  # of the weight when it was packed
    sample: torch.Tensor  # of its values then; what is written through `.data`, as PEFT merges, counts no version
    packed: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> "PackedWeight":
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        return cls(weight, weight._version, _sample(weight).clone(), packed)

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether `weight` is what it was when it was packed."""
        return self.weight is weight and self.version == weight._version and torch.equal(self.sample, _sample(weight))


class PackedWeights(dict):
    """id(weight) -> [`PackedWeight`] of one model. It lives on the model and is no part of its copies and pickles."""

    def __deepcopy__(self, memo) -> "PackedWeights":
        return PackedWeights()

    def __reduce__(self):
        return PackedWeights, ()


class PackedLinear(nn.Linear):
    """A `Linear` whose product runs on `packed`, a packed copy of its weight."""

    packed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype != self.weight.dtype or torch.is_grad_enabled():
            return super().forward(input)
        return product(input, self.weight, self.packed, self.bias)


def product(rows: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear`, on the packed weight unless there are so few rows that the plain one is as quick as it can be read."""
    if rows.dtype == torch.float32 and rows.shape[:-1].numel() <= FEW:
        return nn.functional.linear(rows, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


def packed_weights(model: nn.Module) -> PackedWeights:
    """
    The weights of the model's linear layers, packed.

    Weights that lie elsewhere than on the CPU, that are quantised or that this build of PyTorch cannot pack are not
    among them. The copies are kept on the model, and made anew where a weight has changed.
    """
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return PackedWeights()
    known = model.__dict__.get("_fspad_prepacked", {})
    weights = PackedWeights()
    for module in model.modules():
        if type(module) is nn.Linear and can_pack(module.weight):
            weight = module.weight
            found = known.get(id(weight))
            if found is None or not found.is_of(weight):
                found = PackedWeight.of(weight)
            weights[id(weight)] = found
    model.__dict__["_fspad_prepacked"] = weights
    return weights


def _sample(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().view(-1)
    return flat[:: max(len(flat) // SAMPLED, 1)]


def can_pack(weight: torch.Tensor) -> bool:
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.device.type != "cpu" or weight.is_inference():
        return False
    if weight.layout != torch.strided or not weight.is_contiguous():
        return False
    halves = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or halves
