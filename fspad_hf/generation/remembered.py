"""What is remembered of a user's models from call to call: on our side, so that nothing of it travels with them."""

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch


class Remembered:
    """
    Values by model and key, for as long as the model lives. A value must not hold its model.

    Threads may share it; a value is made by one of them, while the others wait for it.
    """

    def __init__(self):
        self._of: weakref.WeakKeyDictionary[torch.nn.Module, tuple[threading.RLock, dict[Hashable, Any]]]
        self._of, self._lock = weakref.WeakKeyDictionary(), threading.Lock()

    def of(self, model: torch.nn.Module) -> dict[Hashable, Any]:
        """All that is known of a model."""
        return self._entry(model)[1]

    def get(self, model: torch.nn.Module, key: Hashable, make: Callable[[], Any], keep: Callable = bool) -> Any:
        """What is known, or else what `make` returns, which is remembered if `keep` of it is true."""
        lock, known = self._entry(model)
        with lock:
            if key in known:
                return known[key]
            made = make()
            if keep(made):
                known[key] = made
            return made

    def _entry(self, model: torch.nn.Module) -> tuple[threading.RLock, dict[Hashable, Any]]:
        with self._lock:
            return self._of.setdefault(model, (threading.RLock(), {}))
