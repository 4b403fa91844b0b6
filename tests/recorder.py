"""A stand-in for CUDA graphs on any device: records the operations of a step and replays them, and nothing else.

As with a real graph Python does not run again, shapes and addresses are frozen, and what the step has not made itself
is not kept alive: a replay that reads a tensor which is gone raises. Recording itself changes nothing.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fspad_hf.generation.capturing import WAITING


class Outside:
    """A tensor that was there before the step, held as a graph holds it: not at all."""

    def __init__(self, tensor: torch.Tensor):
        self.what = f"{tuple(tensor.shape)}, {tensor.dtype}"
        self.storage = tensor.untyped_storage()._weak_ref()
        self.view = tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()

    def __del__(self):
        torch.UntypedStorage._free_weak_ref(self.storage)

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage)
        if storage is None:
            raise AssertionError(f"a replay reads a tensor that is gone: {self.what}")
        dtype, *place = self.view
        return torch.empty(0, dtype=dtype).set_(storage, *place)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, func._schema
        if torch.is_inference_mode_enabled():  # where composite operations come whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if schema.name in WAITING and not (schema.name == "aten::lift_fresh" and args[0].dim() == 0):
            raise RuntimeError(f"operation not permitted when stream is capturing: {schema.name}")
        for argument, value in zip(schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                storage = value.untyped_storage()
                self.before.setdefault(storage._cdata, (storage, storage.clone()))
        result = func(*args, **kwargs)
        held = tree_map(self._held, (args, kwargs))
        given = {_place(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        self.made |= {_place(one) for one in tree_leaves(result) if isinstance(one, torch.Tensor)} - given
        if schema.name == "aten::lift_fresh":  # a number, which a kernel is launched with
            self.made.add(_place(result))
        views = any(one.alias_info is not None for one in schema.returns)
        self.operations.append((func, held, None if views else result))
        return result

    def _held(self, value):
        if isinstance(value, torch.Tensor) and _place(value) not in self.made:
            return Outside(value)
        return value

    @torch.no_grad()
    def replay(self):
        for func, held, result in self.operations:
            returned = func._schema.returns
            if any(one.alias_info is not None and not one.alias_info.is_write for one in returned):
                continue  # a view: it is where it was
            args, kwargs = tree_map(lambda value: value.tensor() if isinstance(value, Outside) else value, held)
            made = func(*args, **kwargs)
            if result is not None:
                for old, new in zip(tree_leaves(result), tree_leaves(made), strict=True):
                    if isinstance(old, torch.Tensor):
                        assert old.shape == new.shape
                        old.copy_(new)


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def record(step):
    """As `fspad_hf.generation.capturing.capture`."""
    recorder = Recorder()
    with recorder:
        outputs = step()
    for storage, before in recorder.before.values():
        storage.copy_(before)
    recorder.before.clear()
    return recorder.replay, outputs
