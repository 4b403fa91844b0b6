"""Other implementations of a few functions, for one thread and as long as a context lasts."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch.overrides import TorchFunctionMode

StandIn = Callable[[Callable, tuple, dict], object]  # called with the function, its args and its kwargs


class StandIns(TorchFunctionMode):
    """
    Within it, and in its thread alone, some functions of torch run otherwise.

    Args:
        functions: the stand-in of each.
    """

    def __init__(self, functions: dict[Callable, StandIn]):
        super().__init__()
        self.functions = functions

    def begin(self):
        """Called whenever the context is entered."""

    def __enter__(self):
        self.begin()
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        stand_in = self.functions.get(func)
        return func(*args, **(kwargs or {})) if stand_in is None else stand_in(func, args, kwargs or {})


class Together(StandIns):
    """Several as one: each call of a function then passes through Python once."""

    def __init__(self, *parts: StandIns):
        super().__init__({function: stand_in for part in parts for function, stand_in in part.functions.items()})
        self.parts = parts

    def begin(self):
        for part in self.parts:
            part.begin()


def together(*contexts: AbstractContextManager) -> AbstractContextManager:
    """One context for all of those that are [`StandIns`]."""
    parts = [context for context in contexts if isinstance(context, StandIns)]
    return Together(*parts) if len(parts) > 1 else parts[0] if parts else nullcontext()
