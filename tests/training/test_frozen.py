"""Targets that live elsewhere: split up, on disk, quantised, in another dtype, with a function after the head."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fspad_hf.training.config import TrainingConfig
from fspad_hf.training.data import TrainingRows
from fspad_hf.training.frozen import FrozenTarget, TargetFeatures
from fspad_hf.training.trainer import train

from .. import tiny
from ..conftest import fresh_draft


class PackedHead(nn.Module):
    """A stand-in for a quantised LM head: codes and a scale, and nothing that is called weight."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.abs().max() / 127)
        self.register_buffer("codes", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype))


@pytest.fixture(scope="module")
def rows():
    return torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(0))


def losses(target, rows, path, draft, **fields):
    records = []
    config = TrainingConfig(
        str(path), **{"steps": 2, "batch_rows": 4, "micro_rows": 2, "validate_tokens": 40, **fields}
    )
    mask = torch.ones_like(rows, dtype=torch.bool)
    held_out = TrainingRows(rows[6:], mask[6:], None)
    train(draft, target, rows[:6], mask[:6], config, report=records.append, held_out=held_out)
    assert records[-1]["validation_tau"] >= 1
    return [record["loss"] for record in records]


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_a_target_on_disk_trains_as_one_in_memory(llama, rows, tmp_path):
    llama.save_pretrained(tmp_path / "target")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk", "lm_head": "disk"}
    target = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert target.get_output_embeddings().weight.device.type == "meta"
    there = losses(target, rows, tmp_path / "there", fresh_draft(llama))
    assert there == losses(llama, rows, tmp_path / "here", fresh_draft(llama))


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_a_head_without_weight_is_called(llama, rows, tmp_path):
    quantised = copy.deepcopy(llama)
    quantised.lm_head = PackedHead(llama.lm_head)
    ours = losses(quantised, rows, tmp_path / "quantised", fresh_draft(llama))
    assert ours == pytest.approx(losses(llama, rows, tmp_path / "whole", fresh_draft(llama)), rel=0.02)
    with pytest.raises(ValueError, match="head_sample=10: a sampled softmax"):
        losses(quantised, rows, tmp_path / "sampled", fresh_draft(llama), head_sample=10)


@pytest.mark.filterwarnings("ignore:No tokenizer")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_bf16_target_trains_an_fp32_draft(llama, rows, tmp_path, precision):
    half, draft = copy.deepcopy(llama).bfloat16(), fresh_draft(llama)
    ours = losses(half, rows, tmp_path / "half", draft, mixed_precision=precision)
    assert draft.dtype == torch.float32
    assert ours == pytest.approx(losses(llama, rows, tmp_path / "whole", fresh_draft(llama)), rel=0.02)


def test_autocast_is_on_for_bf16_alone(llama, rows, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "fspad_hf.training.trainer.draft_loss",
        lambda *args: seen.append(torch.is_autocast_enabled("cpu")) or pytest.fail("far enough"),
    )
    for precision in ("bf16", "no"):
        with pytest.raises(pytest.fail.Exception):
            losses(llama, rows, tmp_path, fresh_draft(llama), mixed_precision=precision)
    assert seen == [True, False]


@pytest.mark.parametrize("name", ["gemma2", "cohere2", "llama"])
def test_logits_are_the_model_s_own(name, rows):
    """Also where something comes after the head: a cap (Gemma 2), a scale (Cohere)."""
    target = tiny.build(name, attention="eager")
    if name == "gemma2":
        target.config.final_logit_softcapping = 2.0
    with torch.no_grad():
        features = TargetFeatures(target)([0, 1], rows[:2])
        torch.testing.assert_close(FrozenTarget(target, rows.device).head(features), target(rows[:2]).logits)
