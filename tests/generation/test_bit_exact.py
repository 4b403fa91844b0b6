"""Inside `bit_exact` speculation has plain decoding's bits: tokens, scores, logits, cache; in half precision too."""

import contextlib
import copy
import functools
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fspad_hf import bit_exact
from fspad_hf.generation import exact_mode as module
from fspad_hf.generation import invariant
from fspad_hf.generation.exact_mode import differing
from fspad_hf.generation.invariant import RULES, Paths, Rule, holds, path_attention, paths_of
from fspad_hf.generation.probe import probe
from fspad_hf.generation.stateful import cache_of_rounds
from fspad_hf.generation.tree import CandidateTree
from fspad_hf.host import CACHE

from .. import tiny
from ..conftest import fresh_draft

EAGER_ONLY = {"gemma2"}  # its attention has a softcap
NAMES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2", "gpt_neox", "opt",
         "cohere2", *tiny.OTHERS)  # fmt: skip


@pytest.fixture(autouse=True)
def few_trials(monkeypatch):
    """The check at entry is the product's; here every test is one."""
    monkeypatch.setattr(module, "COMPARED", 20_000)


def build(name, dtype=torch.float32):
    return tiny.build(name, "eager" if name in EAGER_ONLY else "sdpa").to(dtype)


def assert_same_bits(plain, fast):
    for name in ("scores", "logits"):
        for ours, theirs in zip(getattr(fast, name) or (), getattr(plain, name) or (), strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(fast[CACHE].layers, plain[CACHE].layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


OUTPUTS = {"output_scores": True, "output_logits": True, "max_new_tokens": 40}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_plain_decoding(name, dtype, same, prompt):
    model = build(name, dtype)
    with bit_exact(model):
        assert_same_bits(*same(model, prompt, **OUTPUTS))
        sampled = {"do_sample": True, "top_k": 0, "temperature": 1.1, "repetition_penalty": 1.05}
        assert_same_bits(*same(model, prompt, min_tau=1.8, **sampled, **OUTPUTS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_batches_and_padding(dtype, same):
    model = build("llama", dtype)
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    with bit_exact(model):
        for mode in ({}, {"do_sample": True, "top_k": 0}):
            plain, fast = same(model, ids, attention_mask=mask, min_tau=1.8, **mode)
            for ours, theirs in zip(fast[CACHE].layers, plain[CACHE].layers, strict=True):
                for row, padding in enumerate((4, 0, 1)):  # whose rows are nobody's
                    assert torch.equal(ours.keys[row, :, padding:], theirs.keys[row, :, padding:])


def test_blocks_of_keys_and_windows_are_crossed(same):
    """From 20 tokens to 140: what all rows share grows by blocks of 32, and a window of 6 moves on."""
    for name in ("llama", "mistral"):
        model = build(name, torch.bfloat16)
        with bit_exact(model):
            ids = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(1))
            assert_same_bits(*same(model, ids, accuracies=(0.8,), **(OUTPUTS | {"max_new_tokens": 120})))


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_every_node_of_any_tree_has_the_logits_of_one_row(data):
    """Behind prompts that end anywhere in a block of keys and, of one model, beyond a window of 6."""
    draw = data.draw
    model, prompt = held_model(draw(st.sampled_from(["llama", "mistral"]))), draw(st.integers(1, 140))
    parents = [0] + [draw(st.integers(0, node - 1)) for node in range(1, draw(st.integers(1, 40)))]
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    ids = torch.randint(3, 64, (1, prompt + len(parents)), generator=torch.Generator().manual_seed(len(parents)))
    with bit_exact(model), torch.no_grad():
        view = probe(model).view(model)
        tree = CandidateTree(ids[:, prompt:], torch.tensor([parents]), torch.tensor([depths]))
        arena = cache_of_rounds(module._prefilled(model, view, ids[:, :prompt]), prompt)
        root = arena.behind(ids.device)
        arena.place(root, prompt + len(parents))
        with view.listening():
            logits, _ = view.verify(tree, arena, torch.ones(1, prompt + len(parents), dtype=torch.bool), root)
        path = [draw(st.integers(0, len(parents) - 1))]
        while path[0]:
            path.insert(0, parents[path[0]])
        cache = module._prefilled(model, view, ids[:, :prompt])
        for node in path:
            alone = model(input_ids=ids[:, prompt + node, None], use_cache=True, **{CACHE: cache}).logits
            assert torch.equal(alone[0, 0], logits[0, node])


@functools.cache
def held_model(name):
    return build(name, torch.bfloat16)


def test_a_stale_row_in_the_cache_shows(same, prompt, monkeypatch):
    """The comparison can fail: a kept row that is another node's, and one that was rounded."""
    from fspad_hf.generation.cache import ArenaCache

    model, keep = build("llama", torch.bfloat16), ArenaCache.keep

    def rounded(self, paths):
        keep(self, paths)
        for layer in self.layers:
            layer.keys[:, :, self.longest - 1] *= 1.01

    with bit_exact(model):
        monkeypatch.setattr(ArenaCache, "keep", rounded)
        with pytest.raises(AssertionError):
            assert_same_bits(*same(model, prompt, accuracies=(0.95,), **OUTPUTS))


def test_it_ends_and_leaves_nothing(prompt):
    model = build("gpt2")
    before, config = model.generate(prompt, max_new_tokens=9), copy.deepcopy(model.config.to_dict())
    kept = {name: dict(vars(m)) for name, m in model.named_modules()}
    with bit_exact(model) as same, bit_exact(model):
        assert same is model
        assert any("forward" in vars(m) for m in model.modules())
    with pytest.raises(RuntimeError, match="mine"), bit_exact(model):
        raise RuntimeError("mine")
    for name, m in model.named_modules():
        assert vars(m).keys() == kept[name].keys()
    assert model.config.to_dict() == config and model.config._attn_implementation == "sdpa"
    assert not any(b"fspad" in pickle.dumps(m) for m in (model.config, model.state_dict()))
    assert model.generate(prompt, max_new_tokens=9).tolist() == before.tolist()


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_entering_draws_nothing(name):
    model = build(name)
    state = torch.get_rng_state()
    with contextlib.suppress(ValueError), bit_exact(model):  # falcon's linear layers are its own, its alibi is refused
        pass
    assert torch.equal(torch.get_rng_state(), state)


def test_more_rows_than_it_holds_for_are_refused(prompt, llama):
    model = build("llama")
    draft = fresh_draft(model, tree_depth=6, tree_top_k=10, tree_total_nodes=150, tree_lookup_tokens=20)
    with bit_exact(model):
        refused = pytest.raises(ValueError, match=r"Trees of up to 171 rows.*holds for 128.*tree_total_nodes")
        with refused:
            model.generate(prompt, assistant_model=draft, max_new_tokens=4)
    assert model.generate(prompt, assistant_model=draft, max_new_tokens=4).shape == (1, 15)


def test_what_sees_images_is_left_alone(monkeypatch):
    """It runs within a prompt, alike with a draft and without."""
    from .. import tiny_vision

    for name in tiny_vision.CONFIGS:
        model = tiny_vision.build(name)
        inside = {id(m) for m in (*model.get_decoder().modules(), model.get_output_embeddings())}
        assert {id(m) for _, m in module._parts(model)} == inside
        assert any(id(m) not in inside and isinstance(m, nn.Linear) for m in model.modules())


def test_one_model_alone_is_touched_and_the_last_thread_ends_it(prompt):
    model, other = build("llama"), build("llama")
    entered, leave = threading.Event(), threading.Event()

    def stay():
        with bit_exact(model):
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=stay)
    with bit_exact(model):
        thread.start()
        entered.wait(20)
        assert not any("forward" in vars(m) for m in other.modules())
        assert other.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation.startswith("fspad_bit_exact")
    leave.set()
    thread.join()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_what_does_not_hold_is_refused_and_left_alone(name):
    model = build(name)
    refused = pytest.raises(ValueError, match=r"cannot be held bit-exact here, because the logits of a path's")
    with refused, bit_exact(model):
        pytest.fail("was entered")
    assert not any("forward" in vars(m) for m in model.modules()) and model.config._attn_implementation == "sdpa"


def test_other_attention_is_refused():
    model = build("llama")
    model.config._attn_implementation_internal = "flex_attention"
    refused = pytest.raises(ValueError, match="'flex_attention' of LlamaConfig: bit_exact replaces 'sdpa' or 'eager'")
    with refused, bit_exact(model):
        pytest.fail("was entered")


def test_the_check_sees_a_layer_that_counts_its_rows(monkeypatch):
    model = build("llama")
    with bit_exact(model):
        assert differing(model) is None
        norm = model.model.norm
        monkeypatch.setattr(norm, "forward", lambda x, plain=norm.forward: plain(x) * (1 + 1e-7 * (x.shape[1] > 4)))
        assert "among 8 rows differ from those of one row" in differing(model)


def test_adapters_and_offloaded_weights(same, prompt, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    adapted = build("llama", torch.bfloat16)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(adapted, config).eval()
    with bit_exact(adapted.base_model.model):
        assert_same_bits(*same(adapted.base_model.model, prompt, accuracies=(0.9,), **OUTPUTS))
    build("llama").save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    away = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places | {"model.layers.1": "disk", "lm_head": "cpu"}, offload_folder=tmp_path / "away"
    ).eval()
    with bit_exact(away):
        assert_same_bits(*same(away, prompt, accuracies=(0.9,), **OUTPUTS))


# the parts


def test_a_rule_that_depends_on_the_rows_is_found_out():
    weight = invariant._cancelling(40, 30, sign=-1)

    def by_count(x, weight, bias):
        order = torch.arange(40) if len(x) % 2 else torch.arange(39, -1, -1)
        return sum(x[:, k, None] * weight[:, k] for k in order.tolist())

    for dtype in (torch.float32, torch.bfloat16):
        assert not holds(lambda x, d=dtype: by_count(x, weight.to(d), None), 40, dtype)
        assert holds(lambda x, d=dtype: Rule(by_count, 8, 8)(x, weight.to(d), None), 40, dtype, (1, 3, 9))


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_every_rule_is_a_linear_layer(rule):
    layer = nn.Linear(24, 10)
    for shape in ((1, 24), (13, 24), (2, 5, 24), (3, 100, 24)):
        x = torch.randn(shape)
        torch.testing.assert_close(rule(x, layer.weight, layer.bias), layer(x), atol=1e-5, rtol=1e-5)


def test_a_product_sees_no_more_rows_than_it_was_tried_with():
    seen, layer = [], nn.Linear(24, 10)
    rule = Rule(lambda x, *rest: seen.append(len(x)) or nn.functional.linear(x, *rest), 4)
    x = torch.randn(3, 101, 24)
    torch.testing.assert_close(rule(x, layer.weight, layer.bias), layer(x))
    assert seen == [128, 128, 48]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_few_numbers_have_the_bits_of_many(dtype, width):
    """One narrow head and few keys: a library may send a product so small elsewhere."""
    torch.manual_seed(0)
    for _ in range(20):
        q, k = (invariant._cancelling(width, n, sign).to(dtype)[None] for n, sign in ((40, 1), (60, -1)))
        v = torch.randn(1, 60, width).to(dtype)
        visible = torch.ones(40, 60, dtype=torch.bool).tril(20)
        together = path_attention(q, k, v, paths_of(visible), 1024.0)
        alone = path_attention(q[:, :1], k[:, :21], v[:, :21], paths_of(visible[:1, :21]), 1024.0)
        assert torch.equal(together[:1], alone)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rows_see_their_own_keys_in_order(data):
    """Against a plain softmax over the mask; and each row has the bits it has alone."""
    draw = data.draw
    padding, prefix, rows = draw(st.integers(0, 5)), draw(st.integers(1, 140)), draw(st.integers(1, 12))
    groups, window = draw(st.sampled_from([1, 3])), draw(st.sampled_from([None, 7, 40]))
    dtype, width = draw(st.sampled_from([torch.float32, torch.bfloat16])), draw(st.sampled_from([8, 16, 24, 64]))
    heads = draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 99)))
    columns = padding + prefix + rows
    parents = [-1] + [draw(st.integers(0, r - 1)) for r in range(1, rows)]
    visible, depth = torch.zeros(rows, columns, dtype=torch.bool), [0] * rows
    for row in range(rows):
        depth[row] = 0 if row == 0 else depth[parents[row]] + 1
        visible[row, padding : padding + prefix] = True
        at = row
        while at >= 0:
            visible[row, padding + prefix + at] = True
            at = parents[at]
        if window is not None:  # the last so many of the path
            seen = visible[row].nonzero()[:, 0]
            visible[row, seen[:-window]] = False
    q, k, v = (
        torch.randn(n, c, width).to(dtype) for n, c in ((heads * groups, rows), (heads, columns), (heads, columns))
    )
    out = path_attention(q, k, v, paths_of(visible), 0.25)
    mask = torch.zeros(rows, columns).masked_fill(~visible, float("-inf"))
    big = [x.float().repeat_interleave(groups, 0) for x in (k, v)]
    expected = nn.functional.scaled_dot_product_attention(q.float()[None], *(x[None] for x in big), mask, scale=0.25)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out.float(), expected[0].transpose(0, 1), atol=tolerance, rtol=tolerance)
    for row in range(rows):
        seen = visible[row].nonzero()[:, 0]
        own = paths_of(torch.ones(1, len(seen), dtype=torch.bool))
        assert isinstance(own, Paths) and own.columns is None
        assert torch.equal(path_attention(q[:, row : row + 1], k[:, seen], v[:, seen], own, 0.25)[0], out[row])


@pytest.mark.parametrize("prefix", [31, 95, 127, 159])
def test_a_row_in_the_next_block_of_keys_changes_no_other(prefix):
    """The first row ends a block of 32 keys; behind it the second one begins another."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, c, 16) for n, c in ((2, 2), (2, prefix + 2), (2, prefix + 2)))
    visible = torch.ones(2, prefix + 2, dtype=torch.bool).tril(prefix)
    together = path_attention(q, k, v, paths_of(visible), 0.25)
    alone = path_attention(q[:, :1], k[:, :-1], v[:, :-1], paths_of(visible[:1, :-1]), 0.25)
    assert torch.equal(together[:1], alone)


def test_nothing_is_exact_by_a_draft_alone(llama):
    """Without the mode a bfloat16 forward over many rows differs: the tests above compare what could differ."""
    model = build("llama", torch.bfloat16)
    assert differing(model) is not None
    assert fresh_draft(llama).dtype == torch.float32
