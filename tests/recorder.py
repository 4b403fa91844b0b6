"""A stand-in for CUDA graphs on any device: records the operations of a step and replays them, and nothing else.

As with a real graph Python does not run again, shapes and addresses are frozen, and whatever would make the host wait
for the device, or move a value from it, is refused. Recording itself changes nothing.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::lift_fresh",
    "aten::is_nonzero", "aten::_unique2", "aten::repeat_interleave",
}  # fmt: skip


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = func._schema
        by_mask = schema.name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        scalar = schema.name == "aten::lift_fresh" and args[0].dim() == 0  # a number that is handed to a kernel
        if (schema.name in WAITING and not scalar) or by_mask:
            raise RuntimeError(f"operation not permitted when stream is capturing: {schema.name}")
        for argument, value in zip(schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                storage = value.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.operations:
            returned = func._schema.returns
            if any(one.alias_info is not None and not one.alias_info.is_write for one in returned):
                continue  # a view: it is where it was
            made = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, new in zip(tree_leaves(result), tree_leaves(made), strict=True):
                    if isinstance(old, torch.Tensor):
                        assert old.shape == new.shape
                        old.copy_(new)


def record(step, device):
    """As `fspad_hf.generation.graphs.capture`."""
    recorder = Recorder()
    with recorder:
        outputs = step()
    for storage, before in recorder.before.values():
        storage.copy_(before)
    return recorder.replay, outputs
