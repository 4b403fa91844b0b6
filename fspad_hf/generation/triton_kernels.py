"""On a GPU: a product and an attention whose rows do not depend on how many there are, or what the others hold.

Imported where a model on a GPU is held bit-exact, and by nothing else. A *product* has one tile for any number of
rows, and adds up along the whole depth in one program. *Attention* reads each row's own keys by a table of columns, in
the order in which plain decoding has them: a program adds up `SPLIT` keys of one row, and another one the parts, first
to last. No 4-D mask is read and no key is repeated for the heads that share it.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS, DEPTH = 16, 64, 64  # a product's tile
KEYS, SPLIT = 32, 256  # of attention: a step's, and a program's
LEAST = 16  # rows and width of what `tl.dot` takes


@triton.jit
def _product(
    x, weight, bias, out, rows, columns, depth, weight_column, weight_depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # the tiles of rows follow one another: the weight is in cache
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = tl.load(
            x + row[:, None].to(tl.int64) * depth + k[None, :],
            (row < rows)[:, None] & (k < depth)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            weight + column[None, :].to(tl.int64) * weight_column + k[:, None].to(tl.int64) * weight_depth,
            (column < columns)[None, :] & (k < depth)[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(left, right, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + column, column < columns, other=0.0).to(tl.float32)[None, :]
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), (row < rows)[:, None] & (column < columns)[None, :])


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear(x, weight, bias)`: x `[..., in]`, weight `[out, in]` of any strides; sums are fp32."""
    x, (columns, depth) = x.contiguous(), weight.shape
    out = x.new_empty(*x.shape[:-1], columns)
    rows = x.shape[:-1].numel()
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))
    _product[grid](
        x, weight, bias, out, rows, columns, depth, *weight.stride(), ROWS, COLUMNS, DEPTH, bias is not None
    )
    return out


@triton.jit
def _attend(
    query, key, value, table, counts, parts, largest, totals, scaling, softcap, rows, columns, splits, width,
    value_width, q_batch, q_head, q_row, k_batch, k_head, k_column, v_batch, v_head, v_column,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, HAS_TABLE: tl.constexpr,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Of one row and the heads that share a key head: softmax's parts over one split of the row's keys."""
    row, which, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = which // KEY_HEADS, which % KEY_HEADS
    line = batch * rows + row
    count = tl.load(counts + line) if HAS_TABLE else columns - rows + row + 1
    if split * SPLIT < count:
        g, d, e = tl.arange(0, GROUP_TILE), tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
        q = tl.load(
            query + batch.to(tl.int64) * q_batch + (head * GROUP + g)[:, None] * q_head + row * q_row + d[None, :],
            (g < GROUP)[:, None] & (d < width)[None, :], other=0.0,
        )  # fmt: skip
        keys_of = key + batch.to(tl.int64) * k_batch + head.to(tl.int64) * k_head
        values_of = value + batch.to(tl.int64) * v_batch + head.to(tl.int64) * v_head
        most = tl.full((GROUP_TILE,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP_TILE,), tl.float32)
        made = tl.zeros((GROUP_TILE, VALUE_WIDTH), tl.float32)
        for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, count), KEYS):
            at = start + tl.arange(0, KEYS)
            shown = at < count
            column = tl.load(table + line.to(tl.int64) * columns + at, shown, other=0) if HAS_TABLE else at
            column = column.to(tl.int64)
            k = tl.load(
                keys_of + column[None, :] * k_column + d[:, None], shown[None, :] & (d < width)[:, None], other=0.0
            )
            scores = tl.dot(q, k, input_precision="ieee") * scaling
            if HAS_CAP:
                scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
            scores = tl.where(shown[None, :], scores, float("-inf"))
            higher = tl.maximum(most, tl.max(scores, 1))
            p, before = tl.exp(scores - higher[:, None]), tl.exp(most - higher)
            v = tl.load(
                values_of + column[:, None] * v_column + e[None, :],
                shown[:, None] & (e < value_width)[None, :], other=0.0,
            )  # fmt: skip
            total = total * before + tl.sum(p, 1)
            made = made * before[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            most = higher
        place = ((line * KEY_HEADS + head) * GROUP + g).to(tl.int64) * splits + split
        tl.store(largest + place, most, g < GROUP)
        tl.store(totals + place, total, g < GROUP)
        tl.store(
            parts + place[:, None] * value_width + e[None, :], made, (g < GROUP)[:, None] & (e < value_width)[None, :]
        )


@triton.jit
def _join(
    parts, largest, totals, counts, sinks, out, rows, columns, splits, value_width,
    HEADS: tl.constexpr, VALUE_WIDTH: tl.constexpr, SPLIT: tl.constexpr, HAS_TABLE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Of one row and head: the parts of its splits, one after the other."""
    line, head = tl.program_id(0), tl.program_id(1)
    count = tl.load(counts + line) if HAS_TABLE else columns - rows + line % rows + 1
    e = tl.arange(0, VALUE_WIDTH)
    most = tl.load(sinks + head).to(tl.float32) if HAS_SINKS else float("-inf")
    total = 1.0 if HAS_SINKS else 0.0
    made = tl.zeros((VALUE_WIDTH,), tl.float32)
    place = (line * HEADS + head).to(tl.int64) * splits
    for split in range(0, tl.cdiv(count, SPLIT)):
        theirs = tl.load(largest + place + split)
        higher = tl.maximum(most, theirs)
        before, now = tl.exp(most - higher), tl.exp(theirs - higher)
        part = tl.load(parts + (place + split) * value_width + e, e < value_width, other=0.0)
        made = made * before + part * now
        total = total * before + tl.load(totals + place + split) * now
        most = higher
    made = tl.where(total > 0, made / total, 0.0)  # a row that sees nothing is padding
    row_out = out + (line * HEADS + head).to(tl.int64) * value_width
    tl.store(row_out + e, made.to(out.dtype.element_ty), e < value_width)


def path_table(visible: torch.BoolTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns that each row sees `[..., rows, columns]`, in order and then the others, and how many it sees."""
    return (~visible).to(torch.int8).argsort(dim=-1, stable=True).int(), visible.sum(-1, dtype=torch.int32)


def tree_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor] | None,
    scaling: float, softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """
    Attention of each row over its own keys.

    Args:
        query (`[batch, heads, rows, width]`), key, value (`[batch, key heads, columns, width]`): of any strides but in
            the last dimension.
        table: what [`path_table`] gives of `[batch, rows, columns]`; `None` if the rows are the last and see all
            before them.
        softcap: of the scores, as Gemma 2 has it.
        sinks (`[heads]`): a score more in each softmax, as gpt-oss has it.

    Returns:
        `[batch, rows, heads, width of value]`.
    """
    (batch, heads, rows, width), (_, key_heads, columns, value_width) = query.shape, value.shape
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    splits, group = triton.cdiv(columns, SPLIT), heads // key_heads
    places, counts = table if table is not None else (None, None)
    largest, totals = (query.new_empty(batch, rows, heads, splits, dtype=torch.float32) for _ in range(2))
    parts = query.new_empty(batch, rows, heads, splits, value_width, dtype=torch.float32)
    tiles = [max(triton.next_power_of_2(size), LEAST) for size in (group, width, value_width)]
    _attend[(rows, batch * key_heads, splits)](
        query, key, value, places, counts, parts, largest, totals, scaling, softcap or 1.0, rows, columns, splits,
        width, value_width, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        key_heads, group, *tiles, KEYS, SPLIT, table is not None, softcap is not None,
    )  # fmt: skip
    out = query.new_empty(batch, rows, heads, value_width)
    _join[(batch * rows, heads)](
        parts, largest, totals, counts, sinks, out, rows, columns, splits, value_width,
        heads, tiles[2], SPLIT, table is not None, sinks is not None,
    )  # fmt: skip
    return out
