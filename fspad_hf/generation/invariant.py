"""Products and attention whose rows do not depend on how many rows there are, or what the others hold.

A library picks another kernel for one row than for sixty, and adds up in another order: the same row then comes out a
bit different. Two rules keep the bits on a CPU. *Linear layers* see their rows padded to a number of rows, or cut into
blocks of one size, for which the machine has shown that it makes no difference. *Attention* goes along each row's own
keys in the order that plain decoding has them, in blocks of `BLOCK` keys, and adds up the blocks' parts in that order:
what a tree lies behind, all rows share; of the tree each row gathers its own path.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, pad

from .few_rows import direct, transposed

BLOCK = 32  # keys
BATCHED_ROWS = 4  # the products in attention are padded to a multiple, and to more than
BATCHED_SIZE = 4096  # multiplications: in half precision fewer go to another library
MOST = 128  # rows of a sequence; longer forwards are prompts, which plain and speculative decoding read alike
COUNTS = (1, 2, 3, 5, 8, 13, 31, 60, 127)  # rows that a product is tried with
COMPARED = 50_000  # numbers, at least
SMALL = 2.0**-9  # what does not cancel in a trial's products


@dataclass(frozen=True)
class Rule:
    """
    How a linear layer sees its rows.

    Args:
        product: (x `[rows, in]`, weight, bias) -> `[rows, out]`.
        multiple: rows are padded to a multiple of it.
        block: rows are multiplied so many at a time, at most.
    """

    product: Callable
    multiple: int = 1
    block: int = MOST

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        count, lacking = x.shape[:-1].numel(), -x.shape[:-1].numel() % self.multiple
        if not lacking and count <= self.block:
            return self.product(x, weight, bias)
        rows = pad(x.reshape(count, -1), (0, 0, 0, lacking))
        made = [self.product(part, weight, bias) for part in rows.split(self.block)]
        out = made[0] if len(made) == 1 else torch.cat(made)
        return out[:count].view(*x.shape[:-1], -1)


# The quickest first, as measured with AVX2 and with AVX-512. Their order is fixed: another process has the same bits.
RULES = (
    Rule(linear), Rule(direct, 2), Rule(linear, 4), Rule(transposed, 8, 8), Rule(linear, 8, 8), Rule(linear, 1, 1)
)  # fmt: skip


class Rules:
    """What this machine has shown so far: (shape, dtype, layout, bias, threads) -> the first rule that holds."""

    def __init__(self):
        self.found: dict[tuple, Rule | None] = {}
        self._lock = threading.Lock()

    def of(self, weight: torch.Tensor, has_bias: bool) -> Rule | None:
        """For a weight `[out, in]` (or its like on `meta`); `None` if no rule holds."""
        key = tuple(weight.shape), weight.dtype, weight.is_contiguous(), has_bias, torch.get_num_threads()
        with self._lock, torch.random.fork_rng(devices=[]), torch.no_grad():
            if key not in self.found:
                torch.manual_seed(0)
                self.found[key] = _first_rule(*key[:4])
            return self.found[key]


def _first_rule(shape: tuple[int, int], dtype: torch.dtype, contiguous: bool, has_bias: bool) -> Rule | None:
    weight = _cancelling(shape[1], shape[0], sign=-1).to(dtype)
    weight = weight if contiguous else weight.T.contiguous().T
    bias = SMALL * torch.randn(shape[0]).to(dtype) if has_bias else None
    for rule in RULES:
        with contextlib.suppress(RuntimeError):  # a product that this dtype or layout does not have
            if holds(lambda x, rule=rule: rule(x, weight, bias), shape[1], dtype):
                return rule
    return None


def holds(product: Callable, width: int, dtype: torch.dtype, counts: Sequence[int] = COUNTS) -> bool:
    """
    Whether a row of `product` (`[rows, width]` in) has the same bits wherever it stands among so many rows. The rows
    are such that most of a product cancels: where another order of adding up makes a difference, it shows in half
    precision, too.
    """
    compared = 0
    while compared < COMPARED:
        row = _cancelling(width, 1).to(dtype)
        alone = product(row)[0]
        for count in counts:
            for place in {0, count // 2, count - 1}:
                x = _cancelling(width, count).to(dtype)
                x[place] = row[0]
                if not torch.equal(product(x)[place], alone):
                    return False
                compared += len(alone)
    return True


def _cancelling(width: int, rows: int, sign: int = 1) -> torch.Tensor:
    """`[rows, width]`: in the product of two of these, one of sign -1, all but a few small terms cancel."""
    half = max((width - 4) // 2, 0)
    part, rest = torch.randn(rows, half), SMALL * torch.randn(rows, width - 2 * half)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(width))
    return torch.cat((part, sign * part, rest), dim=1)[:, order]


@dataclass
class Paths:
    """
    Where the keys of a sequence's rows lie.

    Args:
        first, blocks: from this column on so many blocks of keys are the beginning of every row's.
        columns (`[rows, keys]`): of the keys after them; what is `hidden` is no key. `None`: they follow at once,
            in a sequence of one row.
        hidden (`[rows, keys]`).
    """

    first: int
    blocks: int
    columns: torch.LongTensor | None
    hidden: torch.BoolTensor


def paths_of(visible: torch.BoolTensor) -> Paths:
    """Of the columns that each row of a sequence sees, `[rows, columns]`."""
    counts, width = visible.sum(-1), visible.shape[1]
    everyones = visible.all(0)
    differing = (everyones != visible.any(0)).nonzero()
    common = everyones[: int(differing[0]) if len(differing) else width].nonzero()[:, 0]
    first = int(common[0]) if len(common) else 0
    together = len(common) and int(common[-1]) - first + 1 == len(common)  # else a gap: each row gathers all
    blocks = len(common) // BLOCK if together else 0
    left = (counts - blocks * BLOCK).clamp(min=0)
    keys = -(-int(left.max()) // BLOCK) * BLOCK
    hidden = torch.arange(keys, device=visible.device) >= left[:, None]
    if len(visible) == 1 and together:
        return Paths(first, blocks, None, hidden)
    ranks = visible.cumsum(-1) - 1 - blocks * BLOCK
    row, column = ((ranks >= 0) & visible).nonzero(as_tuple=True)
    columns = torch.zeros(len(visible), keys, dtype=torch.long, device=visible.device)
    columns[row, ranks[row, column]] = column
    return Paths(first, blocks, columns, hidden)


def path_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, paths: Paths, scaling: float,
    softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """
    Attention of a sequence's rows over their own keys.

    Args:
        query (`[heads, rows, width]`), key, value (`[key heads, columns, width]`).
        softcap: of the scores, as Gemma 2 has it.
        sinks (`[heads]`): a score more in each softmax, as gpt-oss has it.

    Returns:
        `[rows, heads, width of value]`.
    """
    (_, rows, width), key_heads = query.shape, len(key)
    query = (query * scaling).view(key_heads, -1, rows, width).transpose(1, 2).contiguous()
    group = query.shape[2]  # of [key heads, rows, group, width]
    scores = [
        _scores(query.reshape(len(keys), -1, width), keys).view(key_heads, rows, group, -1)
        for keys in _parts(key, paths)
    ]
    scores = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    if softcap is not None:
        scores = torch.tanh(scores.float() / softcap) * softcap
    own = paths.hidden.shape[1]
    scores[..., scores.shape[-1] - own :].masked_fill_(paths.hidden[:, None], float("-inf"))
    if sinks is not None:  # before the keys, where their number is of no account
        sink = sinks.float().view(key_heads, 1, group, 1).expand(-1, rows, -1, -1)
        scores = torch.cat((sink, scores), dim=-1)
    p = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    p = p if sinks is None else p[..., 1:]
    made, start = [], 0
    for values in _parts(value, paths):
        end = start + values.shape[1] * BLOCK
        part = p[..., start:end].reshape(len(values), -1, end - start)
        made.append(_blocks_of(part, values).view(values.shape[1], key_heads, rows, group, -1))
        start = end
    out = _summed((made[0] if len(made) == 1 else torch.cat(made)).float())
    return out.transpose(0, 1).flatten(1, 2).to(query.dtype)


def _summed(blocks: torch.Tensor) -> torch.Tensor:
    """Over the first dimension in pairs, then pairs of pairs: an order in which blocks of zeros change nothing."""
    while len(blocks) > 1:
        blocks, second = blocks[0::2], blocks[1::2]
        blocks[: len(second)] += second
    return blocks[0]


def _parts(keys: torch.Tensor, paths: Paths) -> list[torch.Tensor]:
    """
    The keys or values that all rows share, and each row's own: `[key heads (times rows), blocks, BLOCK, width]`. Only
    parts that hold any; a single row's are one.
    """
    shared, own = paths.blocks * BLOCK, paths.hidden.shape[1]
    if paths.columns is None:
        keys = keys[:, paths.first :]
        return [pad(keys, (0, 0, 0, shared + own - keys.shape[1])).view(len(keys), -1, BLOCK, keys.shape[-1])]
    parts = []
    if shared:
        parts.append(keys[:, paths.first : paths.first + shared].unflatten(1, (-1, BLOCK)))
    if own:
        parts.append(keys[:, paths.columns].view(-1, own // BLOCK, BLOCK, keys.shape[-1]))
    return parts


def _scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Query `[n, rows, width]`, keys `[n, blocks, BLOCK, width]`: `[n, rows, blocks * BLOCK]`."""
    (n, rows, width), blocks = query.shape, keys.shape[1]
    query = _padded(query, width)[:, None].expand(-1, blocks, -1, -1)
    scores = torch.bmm(query.reshape(n * blocks, -1, width), keys.reshape(-1, BLOCK, width).transpose(1, 2))
    return scores.view(n, blocks, -1, BLOCK)[:, :, :rows].transpose(1, 2).reshape(n, rows, -1)


def _blocks_of(p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """P `[n, rows, blocks * BLOCK]` times each block of values, `[blocks, n, rows, width]`."""
    (n, rows, _), (_, blocks, _, width) = p.shape, values.shape
    p = p.view(n, rows, blocks, BLOCK).transpose(1, 2)
    p = _padded(p, width).reshape(n * blocks, -1, BLOCK)
    return torch.bmm(p, values.reshape(-1, BLOCK, width)).view(n, blocks, -1, width)[:, :, :rows].transpose(0, 1)


def _padded(x: torch.Tensor, width: int) -> torch.Tensor:
    """Rows, the last dimension but one, to a multiple that a product with `BLOCK` keys so wide does not depend on."""
    multiple = BATCHED_ROWS * (BATCHED_SIZE // (BATCHED_ROWS * BLOCK * width) + 1)
    return pad(x, (0, 0, 0, -x.shape[-2] % multiple))
