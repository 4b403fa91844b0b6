"""On a GPU, fp32, eager and captured: tokens and generator state are plain generate's. Skipped where there is none.

The full-precision promise needs full-precision matmuls: TF32 is off, as it is by default.
"""

import gc
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fspad_hf import bit_exact
from fspad_hf.generation.graphs import GraphPool
from fspad_hf.generation.probe import probe

from .. import tiny
from ..conftest import fresh_draft
from .test_exactness import SETTINGS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_architectures(name, same, prompt):
    model, ids = tiny.build(name, "eager").to("cuda"), prompt.to("cuda")
    same(model, ids)
    same(model, ids, do_sample=True, temperature=1.3, top_k=0, top_p=0.95, repetition_penalty=1.1)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, same, prompt):
    min_tau = None if "eos_token_id" in SETTINGS[name] else 2.0
    same(tiny.build("llama").to("cuda"), prompt.to("cuda"), min_tau=min_tau, **SETTINGS[name])


@pytest.mark.parametrize("coupled", [True, False])
def test_real_draft(prompt, coupled):
    model, ids = tiny.build("llama").to("cuda"), prompt.to("cuda")
    draft = fresh_draft(model, coupled_drafting=coupled, tree_depth=4, tree_top_k=5, tree_total_nodes=20)
    for seed in range(6):
        outcomes = []
        for assistant in (None, draft):
            torch.manual_seed(seed)
            out = model.generate(
                ids, assistant_model=assistant, do_sample=True, top_k=0, max_new_tokens=40, eos_token_id=None
            )
            outcomes.append((out.tolist(), torch.cuda.get_rng_state().tolist()))
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [("flex_attention", torch.float32), ("flash_attention_2", torch.bfloat16), ("flash_attention_3", torch.bfloat16)],
)
def test_attention_that_takes_no_mask(attention, dtype, prompt):
    """Chains, or trees where masks are taken after all; in half precision the same tokens up to a near tie."""
    wide = {**tiny.COMMON, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32
    try:
        model = LlamaForCausalLM._from_config(LlamaConfig(**wide), attn_implementation=attention, dtype=dtype)
    except (ImportError, ValueError) as error:
        pytest.skip(f"{attention} cannot be had: {str(error).splitlines()[0]}")
    model, ids = model.to("cuda").eval(), prompt.to("cuda").repeat(2, 1)
    assert probe(model).reason is None
    for batch in (1, 2):
        mask, outs = torch.ones_like(ids[:batch]), []
        mask[1:, :3] = 0
        for assistant in (None, fresh_draft(model)):
            kwargs = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask}
            outs.append(model.generate(ids[:batch], assistant_model=assistant, **kwargs)[:, ids.shape[1] :])
        same = (outs[0] == outs[1]).long().cumprod(1).sum(1).min()
        assert same == 24 if dtype == torch.float32 else same >= 2


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
EXPERTS = ("mixtral", "deepseek_v3", "gpt_oss")
GRAPHS = {"cuda_graphs": True, "tree_depth": 4, "tree_top_k": 3, "tree_total_nodes": 12}


@pytest.mark.parametrize(
    "settings", [{}, SAMPLED, {**SAMPLED, "repetition_penalty": 1.2}], ids=["greedy", "T", "penalty"]
)
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_graphs(name, settings, teach, prompt):
    """Across a bucket; nothing may be refused but what says so here: transformers multiplies fp32 experts one by one,
    and asks the device how many rows each has."""
    model, ids = tiny.build(name, "eager" if name in ("gemma2", "gpt_oss") else "sdpa").to("cuda"), prompt.to("cuda")
    draft = fresh_draft(model, **GRAPHS)
    arguments = {"max_new_tokens": 60, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    torch.manual_seed(3)
    plain = model.generate(ids, **arguments, **settings)
    state = torch.cuda.get_rng_state()
    teach(plain.sequences[0].tolist(), 0.9, model.config.get_text_config().vocab_size, "cuda")
    for _ in range(2):  # the second call captures nothing
        torch.manual_seed(3)
        fast = model.generate(ids, assistant_model=draft, **arguments, **settings)
        assert fast.sequences.tolist() == plain.sequences.tolist() and fast.speculation.tau > 2
        assert torch.equal(torch.cuda.get_rng_state(), state)
    refused = set(GraphPool.of(draft).refused.values())
    assert not refused or (name in EXPERTS and all("Cannot copy between CPU and CUDA" in said for said in refused))


@pytest.mark.parametrize(
    "overrides",
    [{}, {"draft_vocab_size": 40}, {"coupled_drafting": False}, {"tree": "auto"}, {"tree_lookup_tokens": 8}],
    ids=str,
)
def test_graphs_of_a_real_draft(prompt, overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("FSPAD_HF_CACHE", str(tmp_path))
    model, ids = tiny.build("llama").to("cuda"), prompt.to("cuda")
    draft = fresh_draft(model, **GRAPHS, **overrides)
    for seed in range(4):
        for settings in ({}, SAMPLED):
            outcomes = []
            for assistant in (None, draft):
                torch.manual_seed(seed)
                out = model.generate(ids, assistant_model=assistant, max_new_tokens=50, eos_token_id=None, **settings)
                outcomes.append((out.tolist(), torch.cuda.get_rng_state().tolist()))
            assert outcomes[0] == outcomes[1]
    assert not GraphPool.of(draft).refused


def test_a_captured_round_waits_once(prompt):
    model, ids = tiny.build("llama").to("cuda"), prompt.to("cuda")
    draft = fresh_draft(model, **GRAPHS)

    def run():
        return model.generate(
            ids, assistant_model=draft, max_new_tokens=60, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, **SAMPLED,
        )  # fmt: skip

    run()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            rounds = run().speculation.rounds
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(one.message) for one in seen)
    assert rounds > 30 and waits <= rounds + 25  # those of the prefill, the first token and the end


@pytest.mark.parametrize("graphs", [False, True])
def test_memory_does_not_grow_and_goes_with_the_draft(graphs):
    model = tiny.build("llama").to("cuda")
    before = _held()
    draft = fresh_draft(model, **{**GRAPHS, "cuda_graphs": graphs})
    marks = []
    for call in range(200):
        ids = torch.randint(3, 64, (1, 4 + call % 100), device="cuda")
        model.generate(ids, assistant_model=draft, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
        if call % 100 == 99:
            gc.collect()
            marks.append(torch.cuda.memory_allocated())
    assert marks[1] <= marks[0]
    del draft, ids
    assert _held() <= before + (1 << 20)  # what the probe keeps


def _held() -> int:
    """Bytes; without the scratch memory that cuBLAS keeps for each stream it was used on."""
    gc.collect(), torch.cuda.synchronize(), torch._C._cuda_clearCublasWorkspaces(), torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kernels_have_the_bits_of_single_rows(dtype):
    from fspad_hf.generation.triton_kernels import path_table, product, tree_attention

    torch.manual_seed(0)
    draw = {"device": "cuda", "dtype": dtype}
    for out, depth in ((576, 576), (192, 576), (4096, 4096), (33, 70)):
        x, weight, bias = torch.randn(60, depth, **draw), torch.randn(out, depth, **draw), torch.randn(out, **draw)
        together = product(x, weight, bias)
        expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(together.double(), expected, atol=0.02 * depth**0.5, rtol=0.02)
        for row in (0, 15, 16, 59):
            assert torch.equal(product(x[row : row + 1], weight, bias)[0], together[row])
    for heads, key_heads, width, context in ((9, 3, 64, 500), (32, 8, 128, 4096), (4, 1, 256, 70), (6, 2, 80, 300)):
        columns = context + 60
        visible = torch.rand(1, 60, columns, device="cuda") < 0.9
        visible[:, :, -1] = True
        q, k, v = (
            torch.randn(1, n, c, width, **draw) for n, c in ((heads, 60), (key_heads, columns), (key_heads, columns))
        )
        together = tree_attention(q, k, v, path_table(visible), width**-0.5)
        big = [x.double().repeat_interleave(heads // key_heads, 1) for x in (k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(q.double(), *big, visible[:, None])
        torch.testing.assert_close(together.double(), expected.transpose(1, 2), atol=0.02, rtol=0.02)
        for row in (0, 31, 59):
            seen = visible[0, row].nonzero()[:, 0]
            alone = tree_attention(q[:, :, row : row + 1], k[:, :, seen], v[:, :, seen], None, width**-0.5)
            assert torch.equal(alone[0, 0], together[0, row])


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_bit_exact(name, graphs, prompt):
    """Half precision, the draft's own guesses: tokens, logits and the generator's state are plain decoding's."""
    model, ids = tiny.build(name, dtype=torch.bfloat16).to("cuda"), prompt.to("cuda")
    draft = fresh_draft(model, cuda_graphs=graphs, tree_depth=4, tree_top_k=5, tree_total_nodes=20)
    with bit_exact(model):
        for mode in ({}, {"do_sample": True, "top_k": 0}):
            runs = []
            for assistant in (None, draft):
                torch.manual_seed(0)
                wanted = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 80}
                out = model.generate(ids, assistant_model=assistant, eos_token_id=None, **wanted, **mode)
                runs.append((out.sequences.tolist(), torch.stack(out.logits), torch.cuda.get_rng_state().tolist()))
            (tokens, logits, state), (our_tokens, our_logits, our_state) = runs
            assert our_tokens == tokens and our_state == state and torch.equal(our_logits, logits)
    assert not GraphPool.of(draft).refused
