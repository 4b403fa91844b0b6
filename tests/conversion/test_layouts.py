"""The converted draft computes what the checkpoint's own code computes, and speculates."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from fspad_hf import FSPADDraftModel
from fspad_hf.conversion import convert_checkpoint

from .. import tiny
from . import reference

FLAGS = {  # variant, feature_sampling, partial_alignment, fc_bias, attention_bias
    "vicuna": ("EAGLE / EAGLE-2", False, False, True, False),
    "llama3": ("EAGLE / EAGLE-2", False, False, False, False),
    "qwen2": ("EAGLE / EAGLE-2", False, False, True, True),
    "wide_heads": ("EAGLE / EAGLE-2", False, False, True, False),
    "linear_rope": ("EAGLE / EAGLE-2", False, False, True, False),
    "fspad": ("FSPAD", True, True, True, False),
    "fspad_wofs": ("FSPAD without feature sampling", False, True, True, False),
    "mlplin": ("FSPAD without partial alignment", True, False, True, False),
}


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    for name in ("llama", "qwen2"):
        tiny.build(name).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("layout", reference.LAYOUTS)
def test_it_computes_the_same_and_speculates(targets, tmp_path, layout, prompt):
    target_path = str(targets / ("qwen2" if layout == "qwen2" else "llama"))
    target = AutoModelForCausalLM.from_pretrained(target_path)
    weights = reference.weights_of(layout, target.get_input_embeddings().weight)
    checkpoint = reference.write(tmp_path / "checkpoint", layout, weights)
    done = convert_checkpoint(checkpoint, target_path, tmp_path / "draft")
    assert done.remarks == ()

    draft = FSPADDraftModel.from_pretrained(tmp_path / "draft")
    config = draft.config
    assert (
        done.variant, config.feature_sampling, config.partial_alignment, config.fc_bias, config.attention_bias
    ) == FLAGS[layout]  # fmt: skip
    assert (config.vocab_size, config.eos_token_id, config.target_name_or_path) == (64, 2, target_path)
    assert (tmp_path / "draft" / "tokenizer.json").exists()

    embeds, features = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = reference.forward(layout, weights, embeds, features)
        for model in (draft, done.draft):
            out = model(inputs_embeds=embeds[None], features=features[None])
            torch.testing.assert_close(out.logit_features[0], expected[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(out.features[0], expected[1], atol=1e-4, rtol=1e-4)

    for kwargs in ({"do_sample": False}, {"do_sample": True}):
        torch.manual_seed(0)
        plain = target.generate(prompt, max_new_tokens=24, eos_token_id=None, **kwargs)
        torch.manual_seed(0)
        fast = target.generate(
            prompt, max_new_tokens=24, eos_token_id=None, assistant_model=draft, return_dict_in_generate=True, **kwargs
        )
        assert fast.sequences.tolist() == plain.tolist()
        assert fast.speculation is not None and fast.speculation.rounds > 0


@pytest.mark.parametrize("kind", ["safetensors sharded", "bin", "bin sharded"])
def test_every_way_of_storing(targets, tmp_path, kind):
    weights = reference.weights_of("fspad")
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # old checkpoints carry it
    checkpoint = reference.write(tmp_path / "checkpoint", "fspad", weights, kind)
    if kind.startswith("bin"):
        with pytest.raises(ValueError, match=r"has no model.safetensors.*a pickle.*allow_pickle=True"):
            convert_checkpoint(checkpoint, targets / "llama", tmp_path / "draft")
        assert not (tmp_path / "draft").exists()
    draft = convert_checkpoint(checkpoint, targets / "llama", tmp_path / "draft", allow_pickle=True).draft
    assert torch.equal(draft.layer.mlp.down_proj.weight, weights["layers.0.mlp.down_proj.weight"])
    assert torch.equal(draft.feature_sampler.norm.weight, weights["fc.post_attention_layernorm.weight"])


def test_the_dtype_and_the_name_of_the_target_are_kept(targets, tmp_path):
    weights = {name: value.half() for name, value in reference.weights_of("vicuna").items()}
    checkpoint = reference.write(tmp_path / "checkpoint", "vicuna", weights)
    convert_checkpoint(checkpoint, targets / "llama", tmp_path / "draft", target_name="me/llama")
    draft = FSPADDraftModel.from_pretrained(tmp_path / "draft")
    assert draft.dtype == torch.float16 and draft.config.target_name_or_path == "me/llama"
    assert (tmp_path / "draft" / "tokenizer.json").exists()  # the target's, though its name is not where it lies


def test_rotary_scalings(targets, tmp_path):
    def converted(scaling):
        checkpoint = tmp_path / f"checkpoint{scaling['rope_type']}"
        reference.write(checkpoint, "vicuna", reference.weights_of("vicuna"))
        config = {**reference.config_of("vicuna"), "rope_scaling": scaling, "rope_theta": 500_000.0}
        (checkpoint / "config.json").write_text(json.dumps(config))
        return convert_checkpoint(checkpoint, targets / "llama", tmp_path / f"draft{scaling['rope_type']}").draft

    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64}  # fmt: skip
    assert converted(llama3).config.rope_parameters == {**llama3, "rope_theta": 500_000.0}
    with pytest.raises(ValueError, match=r"rope_scaling=.*dynamic.*expected none, 'linear' or 'llama3'"):
        converted({"rope_type": "dynamic", "factor": 2.0})
