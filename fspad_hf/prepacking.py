"""
Prepacked weights: a second copy of a model's linear weights on a CPU, in the blocks that its matrix units read.

    from fspad_hf.prepacking import prepack, unpack

    prepack(target)   # every forward of a few rows is quicker, plain decoding's and speculation's alike
    unpack(target)

In bfloat16 `linear` blocks a weight anew at each call, which costs as much as the product. The copy takes the memory
of the weights once more, and does not follow them: after a change (training, merging an adapter) pack again.
"""

import torch
from torch import nn

ROWS = 8  # the blocks are chosen for about so many


class PackedLinear(nn.Linear):
    """A `Linear` whose product runs on `packed`; copies and pickles of it have only its weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        packed = self.__dict__.get("packed")
        if packed is None or input.dtype != self.weight.dtype or torch.is_grad_enabled():
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, packed, self.bias, "none", [], "")

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "packed"}


def prepack(model: nn.Module) -> int:
    """
    Packs the weights of the model's linear layers, or packs them anew.

    Returns:
        How many there are. Weights that are not on the CPU, are quantised or in a dtype that this CPU has no blocks
        for are left as they are.
    """
    made = 0
    for module in model.modules():
        if type(module) in (nn.Linear, PackedLinear) and _can_pack(module.weight):
            module.__dict__["packed"] = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), ROWS)
            module.__class__ = PackedLinear
            made += 1
    return made


def unpack(model: nn.Module) -> None:
    """Drops the copies: the model is what it was before [`prepack`]."""
    for module in model.modules():
        if type(module) is PackedLinear:
            module.__dict__.pop("packed", None)
            module.__class__ = nn.Linear


def _can_pack(weight: torch.Tensor) -> bool:
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.layout == torch.strided and weight.is_contiguous()
    if not plain or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    halves = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or halves
