"""A device that is none: tensors that say `nowhere:0` and hold their values on the host. It runs what is for GPUs.

Run as a program, for PyTorch knows such a device for the rest of a process:

    python -m tests.no_device

prints a JSON object a line: a model and a mode, whether the tokens on the device are those of the host, tau, how often
values were read from the device in a round and how many tokens it had, and what went wrong. As on a GPU, an operation
must not mix tensors of the device with the host's, numbers (tensors without a dimension) and indices apart.
"""

import json

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fspad_hf.generation.drafting import Drafter
from fspad_hf.generation.rounds import Rounds

from . import tiny
from .conftest import Oracle, fresh_draft

NAME = "nowhere"
READS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::is_nonzero",
    "aten::_unique2", "aten::repeat_interleave",
}  # fmt: skip
COPIES = {"aten::_to_copy", "aten::copy_"}
MODES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 0, "top_p": 0.95},
}


class There(torch.Tensor):
    """A tensor of the device; `values` are on the host."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=f"{NAME}:0", requires_grad=False,
        )  # fmt: skip
        made.values_here = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside the device's mode")


class Device(TorchDispatchMode):
    """Runs operations of the device by the host's, and counts what waits for values: `reads`."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        there = [one for one in given if isinstance(one, There)]
        asked = kwargs.get("device")
        goes = asked is not None and torch.device(asked).type == NAME
        if asked is not None and goes:
            kwargs["device"] = torch.device("cpu")
        if not there and not goes:
            return func(*args, **kwargs)
        indexing = name in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
        here = [one for one in given if not isinstance(one, There) and one.dim()]
        if indexing:  # a kernel takes indices from the host, too
            here = [one for one in here if all(one is not index for index in args[1])]
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            self.reads += bool(masks)
        if there and here and name not in COPIES:
            raise RuntimeError(f"{name} mixes tensors of the device with the host's, {[tuple(x.shape) for x in here]}")
        if name == "aten::_fused_sdp_choice":
            return 0  # the one made of other operations
        leaves = there and asked is not None and not goes  # a copy to the host
        self.reads += name in READS or bool(leaves) or (name == "aten::copy_" and not isinstance(args[0], There))
        inner = {}

        def host(value):
            if not isinstance(value, There):
                return value
            inner[id(value.values_here)] = value
            # a GPU counts integers, too
            return value.values_here.float() if name == "aten::histc" else value.values_here

        result = func(*tree_map(host, args), **tree_map(host, kwargs))
        if leaves or (name == "aten::copy_" and not isinstance(args[0], There)):
            return result

        def back(value):
            if not isinstance(value, torch.Tensor):
                return value
            known = inner.get(id(value))  # an operation in place gives what it was given
            return There(value) if known is None else known

        return tree_map(back, result)


class Made(TorchFunctionMode):
    """Tensors made of Python's numbers, which PyTorch puts on a device behind a mode's back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor and isinstance(args[0], There):
            func, kwargs, args = torch.tensor, {"dtype": args[0].dtype, "device": NAME, **kwargs}, args[1:]
        if func is torch.Tensor.__getitem__ and isinstance(args[0], There):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = args[0], tuple(torch.tensor(one).to(NAME) if isinstance(one, list) else one for one in index)
        if func is torch.Tensor.tolist and isinstance(args[0], There):
            return args[0].cpu().tolist()
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == NAME:
            return func(*args, **{**kwargs, "device": "cpu"}).to(NAME)
        return func(*args, **kwargs)


def run(name: str, mode: str) -> dict:
    """One model's tokens on the host and on the device, with the oracle's trees and with a draft's own."""
    model, ids = tiny.build(name, "eager").requires_grad_(False), torch.tensor([[1, 17, 5, 40, 9, 33, 21, 8]])
    draft = fresh_draft(model, tree_depth=3, tree_top_k=3, tree_total_nodes=8).requires_grad_(False)
    text = model.config.get_text_config()
    kwargs = {
        "max_new_tokens": 14, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True, **MODES[mode]
    }  # fmt: skip
    torch.manual_seed(3)
    plain = model.generate(ids, **kwargs)
    oracle, grow = Oracle(plain.sequences[0].tolist(), 0.9, text.vocab_size), Drafter.grow
    found, rounds, round_of = {"name": name, "mode": mode}, [], Rounds.run
    with Made(), Device() as device:

        def counted(self, *args):
            before = device.reads
            tree, path = round_of(self, *args)
            rounds.append((device.reads - before, len(path)))
            return tree, path

        model.to(NAME), draft.to(NAME)
        for label in ("oracle", "draft") if name == "llama" else ("oracle",):
            if label == "oracle":
                Drafter.grow = lambda self, read, ends, root, shape, _=None: oracle.grow(
                    int(ends) + 1, root, shape.depth
                )
            else:
                Drafter.grow, Rounds.run = grow, counted
            torch.manual_seed(3)
            fast = model.generate(ids.to(NAME), assistant_model=draft, **kwargs)
            same = fast.sequences.cpu().tolist() == plain.sequences.tolist()
            found[label] = {"same": same, "tau": fast.speculation and fast.speculation.tau}
    Rounds.run = round_of
    return {**found, "device": str(fast.sequences.device), "rounds": rounds}


class Module(getattr(backend_registration, "_DummyBackendModule", object)):  # not before torch 2.10
    """What `torch.nowhere` is: it draws from the host's generator."""

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)


def main():
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    for name in tiny.CONFIGS:
        for mode in MODES:
            try:
                found = run(name, mode)
            except Exception as error:
                found = {"name": name, "mode": mode, "error": f"{type(error).__name__}: {error}"}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
