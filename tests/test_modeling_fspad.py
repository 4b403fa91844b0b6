import json
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from fspad_hf import FSPADConfig, FSPADDraftModel

from . import tiny
from .conftest import fresh_draft


def test_the_equations(llama):
    """Section 3 of the paper, written out."""
    draft = fresh_draft(llama)
    e, f = torch.randn(2, 1, 7, 32).unbind()
    silu = torch.nn.functional.silu
    with torch.no_grad():
        s, layer = draft.feature_sampler, draft.layer

        def norm(module, x):
            return module.weight * x / (x.pow(2).mean(-1, keepdim=True) + draft.config.rms_norm_eps).sqrt()

        z = torch.cat((e, f), -1) @ s.fc.weight.T + s.fc.bias
        x = z + (silu(e @ s.gate_proj.weight.T) * (norm(s.norm, z) @ s.up_proj.weight.T)) @ s.down_proj.weight.T
        cos_sin = draft.rotary_emb(x, torch.arange(7)[None])
        causal = torch.full((7, 7), float("-inf")).triu(1)[None, None]
        a = x + layer.self_attn(x, position_embeddings=cos_sin, attention_mask=causal)[0]
        n = norm(layer.post_attention_layernorm, a)
        m = (silu(n @ layer.mlp.gate_proj.weight.T) * (n @ layer.mlp.up_proj.weight.T)) @ layer.mlp.down_proj.weight.T
        out = draft(inputs_embeds=e, features=f)
    torch.testing.assert_close(out.logit_features, a + m[..., :32], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.features, a + m[..., 32:], atol=1e-5, rtol=1e-4)


def test_both_ablations_off_is_the_eagle_draft_parameter_for_parameter(llama):
    draft = fresh_draft(llama, feature_sampling=False, partial_alignment=False)
    attention = {f"layer.self_attn.{p}_proj.weight": (32, 32) for p in "qkvo"}
    mlp = {f"layer.mlp.{p}_proj.weight": (48, 32) for p in ("gate", "up")} | {"layer.mlp.down_proj.weight": (32, 48)}
    assert {name: tuple(p.shape) for name, p in draft.named_parameters()} == {
        "feature_sampler.fc.weight": (32, 64),
        "feature_sampler.fc.bias": (32,),
        "layer.post_attention_layernorm.weight": (32,),
        **attention,
        **mlp,
    }
    out = draft(inputs_embeds=torch.randn(1, 3, 32), features=torch.randn(1, 3, 32))
    assert torch.equal(out.logit_features, out.features)


def test_shape_follows_the_target():
    for name in tiny.CONFIGS:
        model = tiny.build(name, "eager")
        config = fresh_draft(model).config
        text = model.config.get_text_config()
        assert config.hidden_size == model.get_output_embeddings().weight.shape[-1]
        assert config.num_key_value_heads == config.num_attention_heads
        assert config.head_dim == config.hidden_size // config.num_attention_heads
        assert (config.vocab_size, config.eos_token_id) == (text.vocab_size, text.eos_token_id)
        assert config.rope_parameters["rope_type"] == "default"
    opt = OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=1,
                                   num_attention_heads=4, ffn_dim=32, max_position_embeddings=64))  # fmt: skip
    assert fresh_draft(opt).config.hidden_size == 16  # the head's input, not config.hidden_size
    assert fresh_draft(opt, tree_depth=3, fc_bias=False).speculation_config.tree_depth == 3
    with pytest.raises(ValueError, match=r"\['tree_dept'\] are not fields"):
        fresh_draft(opt, tree_dept=3)


def test_rotary_base_is_the_full_attention_layers():
    model = tiny.build("gemma3_text")
    theta = model.config.rope_parameters["full_attention"]["rope_theta"]
    assert fresh_draft(model).config.rope_parameters["rope_theta"] == theta
    assert fresh_draft(tiny.build("gpt2")).config.rope_parameters["rope_theta"] == 10_000.0
    far = fresh_draft(model)(
        inputs_embeds=torch.randn(1, 1, 32), features=torch.randn(1, 1, 32), position_ids=torch.tensor([[100_000]])
    )
    assert torch.isfinite(far.features).all()  # no length cap


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


class TestSaving:
    @pytest.fixture
    def saved(self, llama, tmp_path, tokenizer):
        llama.save_pretrained(tmp_path / "target")
        tokenizer.save_pretrained(tmp_path / "target")
        target = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
        draft = fresh_draft(target, tree_depth=4, tree_top_k=5, tree_total_nodes=17)
        draft.save_pretrained(tmp_path / "draft")
        return tmp_path

    def test_a_fresh_process_loads_it_every_way(self, saved):
        code = f"""
import torch, fspad_hf
from transformers import AutoModelForCausalLM, pipeline
t, d = {str(saved / "target")!r}, {str(saved / "draft")!r}
a, b = fspad_hf.FSPADDraftModel.from_pretrained(d), AutoModelForCausalLM.from_pretrained(d)
assert type(a) is type(b) is fspad_hf.FSPADDraftModel and not a.training
assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
tree = a.speculation_config
assert (tree.tree_depth, tree.tree_top_k, tree.tree_total_nodes) == (4, 5, 17)
assert a.config.target_name_or_path == t
model = AutoModelForCausalLM.from_pretrained(t)
ids = torch.tensor([[5, 9, 20, 33]])
assert torch.equal(model.generate(ids, max_new_tokens=12), model.generate(ids, assistant_model=a, max_new_tokens=12))
plain, fast = (pipeline("text-generation", model=t, **kw) for kw in ({{}}, {{"assistant_model": d}}))
assert type(fast.assistant_model) is fspad_hf.FSPADDraftModel
for do_sample in (True, False):
    texts = []
    for p in (plain, fast):
        torch.manual_seed(0)
        texts.append(p("abcab", max_new_tokens=12, do_sample=do_sample))
    assert texts[0] == texts[1], texts
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_only_its_own_weights_and_the_tokenizer(self, saved):
        files = {path.name for path in (saved / "draft").iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
        assert not any(name.endswith((".bin", ".py", ".pt", ".partial")) for name in files)
        weights = load_file(saved / "draft" / "model.safetensors")
        assert not any("embed" in name or "head" in name for name in weights) and len(weights) == 14
        assert [path.name for path in saved.rglob(".*")] == []
        config = json.loads((saved / "draft" / "config.json").read_text())
        assert config["architectures"] == ["FSPADDraftModel", "AutoModelForCausalLM"]

    def test_without_a_tokenizer_it_saves_and_warns(self, llama, tmp_path, tokenizer):
        with pytest.warns(UserWarning, match="will not load it"):
            fresh_draft(llama).save_pretrained(tmp_path / "a")
        assert (tmp_path / "a" / "model.safetensors").exists()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fresh_draft(llama).save_pretrained(tmp_path / "b", tokenizer=tokenizer)
        assert (tmp_path / "b" / "tokenizer.json").exists()

    def test_a_reduced_vocabulary_is_saved_with_the_draft(self, saved):
        target = AutoModelForCausalLM.from_pretrained(saved / "target")
        draft = fresh_draft(target, draft_vocab_size=24)
        draft.draft_vocab_ids = torch.arange(40, 64)
        draft.save_pretrained(saved / "reduced")
        loaded = FSPADDraftModel.from_pretrained(saved / "reduced", dtype=torch.bfloat16)
        assert loaded.draft_vocab_ids.tolist() == list(range(40, 64)) and loaded.config.vocab_size == 64
        ids = torch.tensor([[5, 9, 20, 33]])
        for kwargs in ({}, {"do_sample": True}):
            torch.manual_seed(0)
            plain = target.generate(ids, max_new_tokens=20, **kwargs)
            torch.manual_seed(0)
            assert target.generate(ids, max_new_tokens=20, assistant_model=loaded, **kwargs).tolist() == plain.tolist()

    def test_a_missing_weight_is_an_error(self, saved):
        path = saved / "draft" / "model.safetensors"
        weights = load_file(path)
        del weights["layer.mlp.down_proj.weight"]
        save_file(weights, path, metadata={"format": "pt"})
        edit_config(saved / "draft", weights_sha256=None)
        for load in (FSPADDraftModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(ValueError, match=r"lacks the draft weights \['layer.mlp.down_proj.weight'\]"):
                load(saved / "draft")

    def test_corrupt_or_missing_safetensors(self, saved):
        path = saved / "draft" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:2000])
        for way_to_see in ("were changed: their sha256 is", "expected a whole"):
            with pytest.raises(OSError, match=rf"damaged.*{way_to_see}"):
                FSPADDraftModel.from_pretrained(saved / "draft")
            edit_config(saved / "draft", weights_sha256=None)
        path.unlink()
        with pytest.raises(OSError, match=r"model\.safetensors"):
            FSPADDraftModel.from_pretrained(saved / "draft")
        (saved / "draft" / "pytorch_model.bin").write_bytes(b"never read")
        with pytest.raises(OSError):
            FSPADDraftModel.from_pretrained(saved / "draft")

    def test_load_pair(self, saved):
        target, tokenizer, draft = FSPADDraftModel.load_pair(saved / "draft", attn_implementation="eager")
        assert target.name_or_path == str(saved / "target") and tokenizer.decode([20]) == "r"
        assert target.config._attn_implementation == "eager" and target.dtype == draft.dtype == torch.float32
        tiny.build("llama", dtype=torch.bfloat16).save_pretrained(saved / "other")
        tokenizer.save_pretrained(saved / "other")
        target, _, draft = FSPADDraftModel.load_pair(saved / "draft", target=saved / "other")
        assert target.name_or_path == str(saved / "other") and target.dtype == draft.dtype == torch.bfloat16
        assert not draft.training
        with pytest.raises(ValueError, match="is a 'llama' model: expected an FSPAD draft"):
            FSPADDraftModel.from_pretrained(saved / "target")
        edit_config(saved / "draft", target_name_or_path=None)
        with pytest.raises(ValueError, match="names no target"):
            FSPADDraftModel.load_pair(saved / "draft")

    def test_an_interrupted_save_leaves_the_old_files(self, saved, monkeypatch, tokenizer):
        before = (saved / "draft" / "model.safetensors").read_bytes()
        monkeypatch.setattr(
            type(tokenizer), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        draft = FSPADDraftModel.from_pretrained(saved / "draft")
        torch.nn.init.zeros_(draft.feature_sampler.fc.weight)
        with pytest.raises(KeyboardInterrupt):
            draft.save_pretrained(saved / "draft", tokenizer=tokenizer)
        assert (saved / "draft" / "model.safetensors").read_bytes() == before
        assert [path.name for path in saved.rglob(".*")] == []

    def test_a_file_in_the_way(self, llama, tmp_path):
        (tmp_path / "x").write_text("")
        with pytest.raises(ValueError, match="is a file"):
            fresh_draft(llama).save_pretrained(tmp_path / "x")


class TestConfig:
    def test_defaults(self):
        config = FSPADConfig()
        assert config.feature_sampling and config.partial_alignment and config.draft_vocab_size is None

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_attention_heads=6"),
            ({"head_dim": 7}, "head_dim=7"),
            ({"draft_vocab_size": 32001}, "draft_vocab_size=32001"),
            ({"weights_sha256": "abc"}, "weights_sha256='abc' is no sha256"),
        ],
    )
    def test_nonsense_is_refused(self, fields, words):
        with pytest.raises(Exception, match=words):
            FSPADConfig(**fields)
