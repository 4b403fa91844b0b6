"""On a CPU: linear layers over the few rows of a tree, by whichever product is quickest there.

`linear(x, W)` is made for one row or for many. For a few rows a CPU's libraries first bring W into blocks, at every
call, which can cost more than the product. Other ways to the same product read W once, as it lies. Which is quickest
depends on the machine, on the weight and on the number of rows, so the first products of each kind take turns and are
timed; nothing is computed twice, and no copy of a weight is kept.
"""

import threading
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear

MOST = 64  # rows; more are `linear`'s own field
TRIALS = 4  # of each product, the first of which warms up; the quickest counts


def transposed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`(W @ x.T).T`; a single row is multiplied twice over, for two rows cost less than a matrix by a vector."""
    rows = x.flatten(0, -2)
    doubled = rows.expand(2, -1) if len(rows) == 1 else rows
    out = (weight @ doubled.T).T[: len(rows)].contiguous()
    return (out if bias is None else out + bias).unflatten(0, x.shape[:-1])


def direct(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """By oneDNN, where `linear` would choose another library."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Products:
    """What this machine has shown so far: (weight's shape, rows, threads) -> the quickest product."""

    def __init__(self):
        self.kinds = (linear, transposed, *((direct,) if torch.backends.mkldnn.is_available() else ()))
        self.chosen: dict[tuple, Callable] = {}
        self._seconds: dict[tuple, list[list[float]]] = {}
        self._lock = threading.Lock()

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`linear(x, weight, bias)`."""
        rows = x.shape[:-1].numel()
        if not 1 <= rows <= MOST:
            return linear(x, weight, bias)
        key = weight.shape, rows, torch.get_num_threads()
        product = self.chosen.get(key)
        return self._try(key, x, weight, bias) if product is None else product(x, weight, bias)

    def _try(self, key: tuple, x, weight, bias) -> torch.Tensor:
        with self._lock:
            seconds = self._seconds.setdefault(key, [[] for _ in self.kinds])
        turn = min(range(len(self.kinds)), key=lambda kind: len(seconds[kind]))
        began = time.perf_counter()
        out = self.kinds[turn](x, weight, bias)
        seconds[turn].append(time.perf_counter() - began)
        if all(len(trials) >= TRIALS for trials in seconds):
            self.chosen[key] = self.kinds[min(range(len(self.kinds)), key=lambda kind: min(seconds[kind][1:]))]
        return out


few_rows_product = Products()


class FewRowsLinear(nn.Linear):
    """A `Linear` of a [`twin`], never of the user's model."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype != self.weight.dtype or torch.is_grad_enabled():
            return super().forward(input)
        return few_rows_product(input, self.weight, self.bias)


def has_choice(weight: torch.Tensor) -> bool:
    """
    Whether there is more than one way to multiply with it: a plain float32 weight on a CPU. In half precision `linear`
    is as quick as any, and another product would round otherwise.
    """
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.layout == torch.strided and weight.is_contiguous()
    here = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and here and not torch.is_autocast_enabled("cpu")
