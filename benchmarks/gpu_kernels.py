"""A job of gpu.py: the kernels of `bit_exact` beside the libraries'."""

import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from fspad_hf.evaluation.shapes import shape_config

ROWS = (1, 16, 60)
SHAPES, CONTEXTS = ("smollm2-135m", "llama-3-8b"), (512, 4096)


def kernels(options, figures) -> None:
    """
    A product and an attention of each shape in bf16: microseconds beside cuBLAS and sdpa (with its 4-D mask), and
    whether a row has the bits that it has alone.
    """
    from fspad_hf.generation.triton_kernels import path_table, product, tree_attention

    dtype, repeats = (torch.float16, 1) if options.rehearse else (torch.bfloat16, 50)
    rows = []
    for name in SHAPES:
        config = shape_config(name)
        heads, key_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        width = hidden // heads
        sizes = ((hidden, hidden), (config.intermediate_size, hidden), (hidden, config.intermediate_size))
        sizes = ((48, 64),) if options.rehearse else (*sizes, (config.vocab_size, hidden))
        for out, depth in sizes:
            weight = torch.randn(out, depth, device=options.device, dtype=dtype)
            x = torch.randn(ROWS[-1], depth, device=options.device, dtype=dtype)
            alone = product(x[-1:], weight, None)[0]
            for count in ROWS:
                some = x[-count:].contiguous()
                found = {
                    "what": f"{name}, product {out} x {depth}", "rows": count,
                    "ours_us": microseconds(lambda x=some, w=weight: product(x, w, None), repeats),
                    "library_us": microseconds(lambda x=some, w=weight: linear(x, w), repeats),
                    "same_bits": torch.equal(product(some, weight, None)[-1], alone),
                    "library_same_bits": torch.equal(linear(some, weight)[-1], linear(x[-1:], weight)[0]),
                }  # fmt: skip
                rows.append(found)
                figures.save(rows=rows)
        for context in (40,) if options.rehearse else CONTEXTS:
            shape = (1, key_heads, context + ROWS[-1], width)
            key, value = (torch.randn(shape, device=options.device, dtype=dtype) for _ in range(2))
            for count in (1, 4) if options.rehearse else ROWS:
                columns = context + count
                k, v = key[:, :, :columns], value[:, :, :columns]
                query = torch.randn(1, heads, count, width, device=options.device, dtype=dtype)
                visible = scattered(count, columns, options.device)
                mask, table, scale = visible[:, None], path_table(visible), width**-0.5

                def theirs(q=query, k=k, v=v, mask=mask, group=heads // key_heads, scale=scale):
                    k, v = (x.repeat_interleave(group, 1) for x in (k, v))  # as transformers does
                    return scaled_dot_product_attention(q, k, v, mask, scale=scale)

                seen = visible[0, -1].nonzero()[:, 0]
                alone = tree_attention(query[:, :, -1:], k[:, :, seen], v[:, :, seen], None, scale)
                together = tree_attention(query, k, v, table, scale)
                torch.testing.assert_close(together, theirs().transpose(1, 2), atol=0.03, rtol=0.03)
                found = {
                    "what": f"{name}, attention over {context} tokens", "rows": count,
                    "ours_us": microseconds(
                        lambda q=query, k=k, v=v, t=table, s=scale: tree_attention(q, k, v, t, s), repeats
                    ),
                    "table_us": microseconds(lambda seen=visible: path_table(seen), repeats),
                    "library_us": microseconds(theirs, repeats),
                    "same_bits": torch.equal(alone[:, 0], together[:, -1]),
                }  # fmt: skip
                rows.append(found)
                figures.save(rows=rows)
    same = sum(row["same_bits"] for row in rows)
    figures.save(headline=f"{same} of {len(rows)} rows have the bits that they have alone")
    if same < len(rows) and not options.rehearse:  # the interpreter's products are numpy's
        raise SystemExit("a kernel's rows depend on each other")


def scattered(rows: int, columns: int, device: torch.device) -> torch.BoolTensor:
    """`[1, rows, columns]`: a tree behind a prefix, in which each node's parent is one about half as far."""
    visible = torch.zeros(rows, columns, dtype=torch.bool)
    visible[:, : columns - rows] = True
    for row in range(rows):
        at = row
        while True:
            visible[row, columns - rows + at] = True
            if at == 0:
                break
            at = (at - 1) // 2
    return visible[None].to(device)


def microseconds(call: Callable, repeats: int) -> float:
    """The best of three means, the device synchronised around each."""
    best = float("inf")
    for _ in range(3 if repeats > 1 else 1):
        call()
        wait()
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        best = min(best, 1e6 * (time.perf_counter() - began) / repeats)
    return round(best, 1)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
