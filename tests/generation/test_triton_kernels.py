"""The GPU's kernels in Triton's interpreter: values, and each row's bits whatever stands beside it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

from fspad_hf import bit_exact
from fspad_hf.generation import exact_mode, triton_kernels
from fspad_hf.generation.graphs import GraphPool
from fspad_hf.generation.triton_kernels import path_table, product, tree_attention

from .. import tiny
from ..conftest import fresh_draft
from .test_bit_exact import OUTPUTS, assert_same_bits

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda.py has them compiled")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True, scope="module")
def exact_products():
    """The interpreter's product is numpy's, which has other bits for other places of a row, and no bf16."""
    from triton.runtime import interpreter

    def numbers(data):
        return (data.astype(np.uint32) << 16).view(np.float32) if data.dtype == np.uint16 else data

    def dot(self, a, b, total, *_):
        made = np.matmul(*(numbers(x.data).astype(np.float64) for x in (a, b))) + total.data
        return interpreter.TensorHandle(made.astype(total.data.dtype), total.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("depth", "columns"), [(70, 100), (64, 64), (33, 5)])
def test_a_product_is_a_linear_layer(dtype, depth, columns):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((60, depth), (columns, depth), (columns,)))
    for count in (1, 16, 17, 60):
        for b in (bias, None):
            made, expected = product(x[:count], weight, b), nn.functional.linear(x[:count], weight, b)
            torch.testing.assert_close(made, expected, atol=10 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(product(x, weight.T.contiguous().T, bias), product(x, weight, bias))  # GPT-2's lie so


def test_a_product_s_rows_keep_their_bits():
    torch.manual_seed(0)
    x, weight = torch.randn(60, 70).half(), torch.randn(40, 70).half()
    together = product(x, weight, None)
    for row in (0, 15, 16, 59):
        assert torch.equal(product(x[row : row + 1], weight, None)[0], together[row])
        assert torch.equal(product(x[: row + 1], weight, None)[row], together[row])


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_attention_is_a_softmax_over_the_mask(data):
    """Heads in groups, windows, caps, sinks, padding; a row has the bits it has alone, its keys one after another."""
    draw = data.draw
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    batch, rows, key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 2)), 3
    width, value_width = draw(st.sampled_from([(8, 8), (24, 24), (64, 32), (128, 128), (256, 256)]))
    columns = rows + draw(st.sampled_from([1, 30, 31, 32, 100, 255, 256, 300]))
    cap, has_sinks = draw(st.sampled_from([None, 3.0])), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 99)))
    visible = torch.rand(batch, rows, columns) < draw(st.sampled_from([0.2, 0.8, 1.0]))
    visible[:, :, -1] = True
    shapes = (key_heads * group, rows, width), (key_heads, columns, width), (key_heads, columns, value_width)
    q, k, v = (torch.randn(batch, *shape).to(dtype) for shape in shapes)
    sinks = torch.randn(key_heads * group) if has_sinks else None
    made = tree_attention(q, k, v, path_table(visible), 0.3, cap, sinks)

    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = q.float() @ keys.transpose(-1, -2) * 0.3
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    if has_sinks:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(batch, -1, rows, 1)), dim=-1)
    expected = (scores.softmax(-1)[..., :columns] @ values).transpose(1, 2)
    torch.testing.assert_close(made.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    b, row = batch - 1, rows - 1
    seen = visible[b, row].nonzero()[:, 0]
    alone = tree_attention(q[b:, :, row:], k[b:, :, seen], v[b:, :, seen], None, 0.3, cap, sinks)
    assert torch.equal(alone[0, 0], made[b, row])


def test_sixty_rows_have_the_bits_of_one():
    """Those of a tree, behind a prefix that ends within a step of keys."""
    torch.manual_seed(0)
    rows, columns = 60, 105
    visible = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    visible[:, columns - rows :] &= torch.rand(rows, rows) < 0.4
    visible[:, columns - rows :] |= torch.eye(rows, dtype=torch.bool)
    q, k, v = (torch.randn(1, n, c, 64).bfloat16() for n, c in ((3, rows), (1, columns), (1, columns)))
    together = tree_attention(q, k, v, path_table(visible[None]), 0.125)
    for row in range(0, rows, 7):
        seen = visible[row].nonzero()[:, 0]
        alone = tree_attention(q[:, :, row : row + 1], k[:, :, seen], v[:, :, seen], None, 0.125)
        assert torch.equal(alone[0, 0], together[0, row])


def test_a_row_that_sees_nothing_is_zero():
    visible = torch.zeros(1, 2, 40, dtype=torch.bool)
    visible[0, 1, :3] = True
    q, k, v = torch.randn(1, 2, 2, 16), torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
    made = tree_attention(q, k, v, path_table(visible), 0.25)
    assert not made[0, 0].any() and made[0, 1].all()


@pytest.fixture
def on_kernels(monkeypatch):
    """As on a GPU, but in the interpreter; a graph sees each kernel as one operation."""
    calls = {"product": 0, "tree_attention": 0}

    @torch.library.custom_op("fspad_test::product", mutates_args=())
    def seen_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls["product"] += 1
        return product(x, weight, bias)

    @torch.library.custom_op("fspad_test::attention", mutates_args=())
    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: torch.Tensor | None, counts: torch.Tensor | None,
        scaling: float, cap: float | None, sinks: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        calls["tree_attention"] += 1
        return tree_attention(q, k, v, None if places is None else (places, counts), scaling, cap, sinks)

    monkeypatch.setattr(exact_mode, "uses_kernels", lambda device: True)
    monkeypatch.setattr(exact_mode, "COMPARED", 1)
    monkeypatch.setattr(exact_mode, "TRIED_NODES", (8,))
    monkeypatch.setattr(triton_kernels, "product", seen_product)
    monkeypatch.setattr(
        triton_kernels, "tree_attention",
        lambda q, k, v, table, scaling, cap=None, sinks=None: attention(
            q, k, v, *(table or (None, None)), scaling, cap, sinks
        ),
    )  # fmt: skip
    return calls


SHORT, LONGER = {**OUTPUTS, "max_new_tokens": 9}, {**OUTPUTS, "max_new_tokens": 24}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_the_mode_on_kernels(name, on_kernels, same, prompt):
    model = tiny.build(name, dtype=torch.bfloat16)
    with bit_exact(model):
        assert_same_bits(*same(model, prompt, accuracies=(0.8,), **SHORT))
        assert all(on_kernels.values())


def test_in_graphs(on_kernels, captured, teach, prompt):
    """Nothing waits for the device, and the replayed rounds have plain decoding's bits."""
    model = tiny.build("llama", dtype=torch.float16)
    draft = fresh_draft(model, cuda_graphs=True, tree_depth=3, tree_top_k=3, tree_total_nodes=8)
    with bit_exact(model):
        plain = model.generate(prompt, **LONGER, return_dict_in_generate=True)
        teach(plain.sequences[0].tolist(), 0.9, 64)
        fast = model.generate(prompt, **LONGER, return_dict_in_generate=True, assistant_model=draft)
    assert captured and not GraphPool.of(draft).refused and fast.speculation.tau > 2
    assert fast.sequences.tolist() == plain.sequences.tolist()
    for ours, theirs in zip(fast.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)


def test_a_norm_sees_whole_rows_of_16():
    seen = []
    norm = nn.LayerNorm(8)
    x = torch.randn(2, 3, 5, 8)
    made = exact_mode._norm(lambda rows: seen.append(rows.shape) or norm(rows), x)
    assert torch.equal(made, norm(x)) and seen == [(32, 8)]
    assert exact_mode._is_norm(norm) and not exact_mode._is_norm(nn.Linear(3, 3))
