"""How weights come: each form is loaded as a user loads it, and gives its own plain generate's tokens."""

import json
import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.distributed import DistributedConfig

from fspad_hf.evaluation.divergence import first_divergence
from fspad_hf.generation.drafting import Drafter
from fspad_hf.generation.probe import probe

from .. import tiny
from ..conftest import Oracle, fresh_draft, oracles_growth, plain_run

# rows of 64 and 128, which every format can cut into its blocks
SIZE = {**tiny.COMMON, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.15}
NEW = 16
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(dtype, **fields)`: where such a llama is saved."""
    known = {}

    def folder(dtype=torch.float32, **fields):
        key = dtype, *fields.items()
        if key not in known:
            known[key] = tmp_path_factory.mktemp("llama")
            built(tf.LlamaConfig(**SIZE, **fields), dtype).save_pretrained(known[key])
        return known[key]

    return folder


def built(config, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def loaded(folder, **kwargs):
    return tf.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **kwargs}).eval()


def traces(model):
    """What a call could leave on a model: hooks, attributes, other weights or more of them."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    weights = (*model.named_parameters(), *model.named_buffers())
    held = [(name, type(weight), weight.device, weight.dtype, weight.shape) for name, weight in weights]
    return hooks, [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()], held


@pytest.fixture
def speculates(same, prompt):
    """
    `speculates(model)`: the same tokens with the trees of an oracle, as [`same`] has them, and with those of two
    fresh drafts, one of which wants few rows of the head; and nothing of it stays on the model.
    """

    def check(model, chains_only=False):
        options = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
        plain = model.generate(prompt, **options)  # whatever a library does at its first forward is done
        before = traces(model)
        for draft in (fresh_draft(model), fresh_draft(model, draft_vocab_size=30)):
            fast = model.generate(prompt, assistant_model=draft, return_dict_in_generate=True, **options)
            assert fast.speculation.rounds and fast.sequences.equal(plain)
        for do_sample in (False, True):
            same(model, prompt, do_sample=do_sample, max_new_tokens=NEW, accuracies=(0.5, 0.95))
        found = probe(getattr(model, "_orig_mod", model))
        assert found.reason is None and found.chains_only == chains_only
        assert traces(model) == before

    return check


def parts_at_near_ties(model, prompt):
    """For products whose rows are quantised as they come: they round as half precision does, whatever the dtype."""
    draft = fresh_draft(model)
    for mode, do_sample in (("greedy", False), ("sampled", True)):
        kwargs = {"do_sample": do_sample, "eos_token_id": None, "pad_token_id": 0}
        for seed in range(2):
            outs = []
            for assistant in (None, draft):
                torch.manual_seed(seed)
                wanted = {"max_new_tokens": NEW, "return_dict_in_generate": True}
                outs.append(model.generate(prompt, assistant_model=assistant, **wanted, **kwargs))
            assert outs[1].speculation.rounds
            inputs = {"input_ids": prompt}
            found = first_divergence(model, inputs, *(out.sequences for out in outs), seed=seed, **kwargs)
            assert found is None or found.is_near_tie(mode)


class TestBitsAndBytes:
    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("bitsandbytes")

    @pytest.mark.parametrize("form", ["nf4", "fp4", "nf4 with the head"])
    def test_4_bit(self, form, folders, speculates):
        skipped = {"llm_int8_skip_modules": ["model.embed_tokens"]} if "head" in form else {}
        config = tf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=form[:3], bnb_4bit_use_double_quant=form == "fp4",
            bnb_4bit_compute_dtype=torch.float32, **skipped,
        )  # fmt: skip
        model = loaded(folders(), quantization_config=config)
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
        assert (type(model.lm_head) is nn.Linear) == ("head" not in form)
        speculates(model)

    def test_8_bit(self, folders, speculates):
        """In float64 no product lies near enough to a rounding edge of its activations for that to be seen."""
        config = tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        model = loaded(folders(torch.float64), quantization_config=config, dtype=torch.float64)
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
        speculates(model)

    def test_8_bit_with_outliers(self, folders, prompt):
        """By default the columns that stay unquantised are chosen over all rows of a forward, a tree's together."""
        model = loaded(folders(), quantization_config=tf.BitsAndBytesConfig(load_in_8bit=True))
        parts_at_near_ties(model, prompt)


class TestTorchao:
    """The weights are tensors of a kind of their own in modules that are plain `Linear`s."""

    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("torchao")

    @pytest.mark.parametrize("with_head", [False, True])
    @pytest.mark.parametrize("form", ["int8", "int4", "float8"])
    def test_weight_only(self, form, with_head, folders, speculates):
        from torchao import quantization as ao
        from torchao.quantization.granularity import PerGroup

        kind = {
            "int8": lambda: ao.Int8WeightOnlyConfig(),
            "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
            "float8": lambda: ao.Float8WeightOnlyConfig(),
        }[form]()
        config = tf.TorchAoConfig(kind, include_input_output_embeddings=with_head)
        model = loaded(folders(), quantization_config=config)
        head, inner = model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight
        assert type(inner) is not nn.Parameter and (type(head) is nn.Parameter) != with_head
        speculates(model)

    def test_int4_in_blocks_of_the_cpu(self, folders, speculates):
        kinds = pytest.importorskip("torchao.prototype.quantization.int4.inference_workflow")
        config = tf.TorchAoConfig(kinds.PrototypeInt4WeightOnlyConfig(group_size=32))
        speculates(loaded(folders(), quantization_config=config))

    def test_int8_activations(self, folders, prompt):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        config = tf.TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
        parts_at_near_ties(loaded(folders(), quantization_config=config), prompt)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm", "model.norm": "output_norm",
    "lm_head": "output", "model.layers": "blk", "operator_norm": "attn_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.out_proj": "attn_output", "q_layernorm": "q_norm",
    "k_layernorm": "k_norm", "self_attn.": "attn_", "attn_q_proj": "attn_q", "attn_k_proj": "attn_k",
    "attn_v_proj": "attn_v", "attn_o_proj": "attn_output", "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up", "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down", "mlp.up_proj": "ffn_up",
    ".conv.": ".shortconv.",
}  # fmt: skip


def write_gguf(path, architecture, model, **fields):
    """As llama.cpp names things; matrices in blocks of 8 bits."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, architecture)
    epsilon = getattr(model.config, "norm_eps", None) or model.config.rms_norm_eps
    fields |= {
        "context_length": 256, "embedding_length": 64, "feed_forward_length": 128, "block_count": 2, "vocab_size": 64,
        "attention.head_count": 4, "attention.layer_norm_rms_epsilon": epsilon,
        "rope.freq_base": float(model.config.rope_parameters["rope_theta"]),
    }  # fmt: skip
    for name, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[type(value)]
        add(f"{architecture}.{name}", value)
    writer.add_token_list([f"t{i}" for i in range(64)])
    for name, weight in model.state_dict().items():
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        if weight.dim() == 2:
            writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight.squeeze().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestGguf:
    def test_dequantised(self, tmp_path, speculates, prompt):
        whole = built(tf.Qwen2Config(**SIZE))
        write_gguf(tmp_path / "q.gguf", "qwen2", whole, **{"attention.head_count_kv": 2})
        model = loaded(tmp_path, gguf_file="q.gguf")
        assert model.lm_head.weight.dtype == torch.float32
        torch.testing.assert_close(model(prompt).logits, whole(prompt).logits, atol=0.2, rtol=0)
        speculates(model)

    @pytest.mark.parametrize("kinds", [["full_attention"] * 2, ["full_attention", "conv"]])
    def test_kept_packed(self, kinds, tmp_path, speculates, prompt, monkeypatch):
        """The kernel of a device is stood in for; modules, loading and the blocks in memory are the host's."""
        kernels = pytest.importorskip("transformers.integrations.gguf.kernels")
        from transformers.integrations.gguf.dequant import dequantize
        from transformers.integrations.gguf.utils import is_gguf_arch_supported

        if not is_gguf_arch_supported("lfm2"):
            pytest.skip("this transformers unpacks every lfm2 file")

        def mul_mat_vec(weight, x, kind, rows):
            return x @ dequantize(weight, kind).view(rows, -1).T

        stand_in = SimpleNamespace(
            mul_mat_vec=mul_mat_vec, dequantize=None, get_rows=None, mul_mat_id=None, GEMV_TYPES={8}
        )
        monkeypatch.setattr(kernels, "_gguf_kernel", kernels.GgufKernel(stand_in))
        own = {"layer_types": kinds, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False}
        whole = built(tf.Lfm2Config(**SIZE, **own))
        heads = {"attention.head_count_kv": [2 * (kind == "full_attention") for kind in kinds]}
        write_gguf(tmp_path / "l.gguf", "lfm2", whole, **heads, **{"shortconv.l_cache": 3})
        model = loaded(tmp_path, gguf_file="l.gguf", attn_implementation="sdpa")
        packed = model.lm_head, model.get_input_embeddings(), model.model.layers[0].feed_forward.w1
        assert {module.weight.dtype for module in packed} == {torch.uint8}
        torch.testing.assert_close(model(prompt).logits, whole(prompt).logits, atol=0.2, rtol=0)
        speculates(model, chains_only="conv" in kinds)


def write_compressed(folder, scheme, dtype):
    """A llama that compressed-tensors itself has quantised and packed."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model, kind = built(tf.LlamaConfig(**SIZE), dtype), preset_name_to_scheme(scheme, ["Linear"])
    kind.weights.group_size = kind.weights.group_size and 32
    groups = {"config_groups": {"group_0": kind}, "ignore": ["lm_head"], "quantization_status": "frozen"}
    apply_quantization_config(model, QuantizationConfig(**groups))
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            rows = module.weight.detach().unflatten(-1, (-1, kind.weights.group_size or module.in_features))
            scale, _ = calculate_qparams(rows.amin(-1), rows.amax(-1), kind.weights)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


class TestCompressedTensors:
    """Left compressed it is decompressed by a hook at its first forward, which takes itself away."""

    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("compressed_tensors")

    @pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC"])
    def test_compressed(self, scheme, tmp_path, speculates):
        dtype = torch.float32 if scheme == "W4A16" else torch.float64  # which activations are rounded in, see above
        write_compressed(tmp_path, scheme, dtype)
        model = loaded(tmp_path, dtype=dtype)
        held = dict(model.model.layers[0].mlp.up_proj.named_parameters())
        packed = held.get("weight_packed", held.get("weight"))
        assert packed.dtype in (torch.int32, torch.int8, torch.float8_e4m3fn)
        speculates(model)

    def test_dequantised(self, tmp_path, speculates):
        write_compressed(tmp_path, "W4A16", torch.float32)
        model = loaded(tmp_path, quantization_config=tf.CompressedTensorsConfig(dequantize=True))
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
        speculates(model)


class TestFloat8:
    def test_fine_grained_on_a_cpu(self, folders, tmp_path, speculates, prompt):
        """A checkpoint of blocks and scales, as DeepSeek's, which the host dequantises where there is no GPU."""
        if torch.cuda.is_available():
            pytest.skip("with a GPU the host keeps the weights in float8")
        weights = load_file(folders() / "model.safetensors")
        for name in [name for name in weights if "_proj" in name]:
            blocks = weights[name].unflatten(0, (-1, 32)).unflatten(2, (-1, 32))
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            weights[name] = (blocks / scale).to(torch.float8_e4m3fn).view(weights[name].shape)
            weights[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folders() / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32],
            "modules_to_not_convert": ["lm_head"],
        }  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = loaded(tmp_path)
        truth = loaded(folders())(prompt).logits.detach()
        torch.testing.assert_close(model(prompt).logits, truth, atol=0.2 * float(truth.abs().max()), rtol=0)
        speculates(model)

    @pytest.mark.parametrize("form", ["fine-grained", "fbgemm", "torchao"])
    def test_on_a_gpu(self, form, folders, prompt):
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("float8 products need a GPU that has them")
        if form == "torchao":
            kind = pytest.importorskip("torchao.quantization").Float8DynamicActivationFloat8WeightConfig()
            config = tf.TorchAoConfig(kind)
        elif form == "fbgemm":
            pytest.importorskip("fbgemm_gpu")
            config = tf.FbgemmFp8Config()
        else:
            pytest.importorskip("kernels")
            config = tf.FineGrainedFP8Config(weight_block_size=(32, 32))
        model = loaded(folders(), quantization_config=config, dtype=torch.bfloat16, device_map="cuda")
        parts_at_near_ties(model, prompt.to("cuda"))


ON_DISK = {
    "a layer": (["model.layers.1"], False),
    "the head": (["lm_head"], False),
    "embedding and head, which are one": (["model.embed_tokens", "lm_head"], True),
    "everything": (PARTS, False),
}


@pytest.mark.parametrize("what", ON_DISK)
def test_a_device_map_with_the_disk(what, folders, tmp_path, speculates):
    """`cpu_offload` and `disk_offload` are in test_hook.py."""
    parts, tied = ON_DISK[what]
    places = {part: "disk" if part in parts else "cpu" for part in PARTS}
    model = loaded(folders(tie_word_embeddings=tied), device_map=places, offload_folder=tmp_path)
    assert {weight.device.type for weight in model.parameters()} >= {"meta"}
    speculates(model)


@pytest.mark.parametrize("how", ["wrapped", "by layer"])
def test_a_compiled_target(how, folders, speculates):
    """Compiled in place, as a whole, it is in test_hook.py."""
    model = loaded(folders())
    if how == "wrapped":
        model = torch.compile(model, backend="eager", dynamic=True)
    else:
        for layer in model.model.layers:
            layer.compile(backend="eager", dynamic=True)
    try:
        speculates(model)
    finally:
        torch.compiler.reset()


def split_in_two(rank, folder, results, ids):
    """One of two processes, each with a half of every matrix. Writes what it has generated."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    store = dist.FileStore(f"{results}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        model, outs = loaded(folder, distributed_config=DistributedConfig(tp_plan="auto")), []
        own = [{"tree": "auto", "tree_lookup_tokens": 8}, {"tree": "auto", "draft_vocab_size": 30}]
        drafts = [fresh_draft(model, **settings) for settings in ({}, *own)]
        for do_sample in (False, True):
            kwargs, plain, state = plain_run(model, ids, 3, dict, {"do_sample": do_sample, "max_new_tokens": 40})
            outs.append((None, plain.sequences.tolist(), True))
            for draft in drafts:
                with pytest.MonkeyPatch.context() as patch:
                    if draft is drafts[0]:
                        oracles = [Oracle(plain.sequences[0].tolist(), 0.95, 64)]
                        patch.setattr(Drafter, "grow", oracles_growth(oracles, patch))
                    torch.manual_seed(3)
                    fast = model.generate(ids, assistant_model=draft, **kwargs)
                ends = torch.equal(torch.get_rng_state(), state)
                outs.append((fast.speculation.tau, fast.sequences.tolist(), ends))
        sharded = type(model.lm_head.weight).__name__, model.tp_size
        torch.save({"reason": probe(model).reason, "sharded": sharded, "outs": outs}, f"{results}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_split_over_two_processes(folders, tmp_path, prompt):
    """Both must take the same rounds, whatever each finds quickest, or their halves of a product do not fit."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    arguments = folders(), tmp_path, prompt
    torch.multiprocessing.start_processes(split_in_two, arguments, nprocs=2, start_method="spawn")
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one == other and one["reason"] is None and one["sharded"] == ("DTensor", 2)
    whole, runs = loaded(folders()), len(one["outs"]) // 2
    for do_sample in (False, True):
        _, plain, _ = plain_run(whole, prompt, 3, dict, {"do_sample": do_sample, "max_new_tokens": 40})
        (_, tokens, _), *found = one["outs"][runs * do_sample :][:runs]
        assert [tokens, *(sequences for _, sequences, _ in found)] == [plain.sequences.tolist()] * runs
        assert all(ends for *_, ends in found) and found[0][0] > 2 and min(tau for tau, *_ in found) >= 1
