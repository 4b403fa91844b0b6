"""Targets that live elsewhere: split up, on disk, quantised, in another dtype, with a function after the head."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fspad_hf.training import targets
from fspad_hf.training.data import TrainingRows
from fspad_hf.training.targets import FrozenTarget, KeptOutputs
from fspad_hf.training.trainer import FSPADTrainer

from .. import tiny
from ..conftest import fresh_draft
from .runs import all_counted, arguments, logged, trained


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
    made = trained(draft, target, all_counted(rows[:6]), path, all_counted(rows[6:]), max_steps=2, **fields)
    assert [log["eval_tau"] for log in made.state.log_history if "eval_tau" in log][-1] >= 1
    return [log["loss"] for log in logged(made)]


@pytest.mark.filterwarnings("ignore:No tokenizer")
@pytest.mark.parametrize("kept", [False, True])
def test_a_target_on_disk_trains_as_one_in_memory(llama, rows, tmp_path, kept):
    llama.save_pretrained(tmp_path / "target")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk", "lm_head": "disk"}
    target = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert target.get_output_embeddings().weight.device.type == "meta"
    there = losses(target, rows, tmp_path / "there", fresh_draft(llama), keep_features=kept)
    assert there == losses(llama, rows, tmp_path / "here", fresh_draft(llama), keep_features=kept)


@pytest.mark.filterwarnings("ignore:No tokenizer")
@pytest.mark.parametrize("drafted", [None, 40])
def test_a_head_without_weight_is_called(llama, rows, tmp_path, drafted):
    quantised = copy.deepcopy(llama)
    quantised.lm_head = PackedHead(llama.lm_head)
    ours, theirs = (
        losses(target, rows, tmp_path / name, fresh_draft(llama, draft_vocab_size=drafted))
        for name, target in (("quantised", quantised), ("whole", llama))
    )
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.filterwarnings("ignore:No tokenizer")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_bf16_target_trains_an_fp32_draft(llama, rows, tmp_path, bf16):
    half, draft = copy.deepcopy(llama).bfloat16(), fresh_draft(llama)
    ours = losses(half, rows, tmp_path / "half", draft, bf16=bf16)
    assert draft.dtype == torch.float32 and "forward" not in vars(draft)  # accelerate's autocast is gone
    assert ours == pytest.approx(losses(llama, rows, tmp_path / "whole", fresh_draft(llama)), rel=0.02)


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_autocast_is_on_for_bf16_alone(llama, rows, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "fspad_hf.training.trainer.draft_loss",
        lambda *args: seen.append(torch.is_autocast_enabled("cpu")) or pytest.fail("far enough"),
    )
    for bf16 in (True, False):
        with pytest.raises(pytest.fail.Exception):
            losses(llama, rows, tmp_path, fresh_draft(llama), bf16=bf16)
    assert seen == [True, False]


@pytest.mark.parametrize("name", ["gemma2", "cohere2", "llama"])
def test_logits_and_likeliest_tokens_are_the_model_s_own(name, rows):
    """Also where something comes after the head: a cap (Gemma 2), a scale (Cohere)."""
    target = tiny.build(name, attention="eager")
    if name == "gemma2":
        target.config.final_logit_softcapping = 2.0
    frozen, counted = FrozenTarget(target, top_k=5), torch.rand(2, 24) > 0.5
    with torch.no_grad():
        found, logits = frozen(rows[:2], counted), target(rows[:2]).logits
        torch.testing.assert_close(frozen.logits(found.features), logits)
    top = logits.log_softmax(-1).topk(5, dim=-1)
    torch.testing.assert_close(found.top_log_probs[counted], top.values[counted])
    assert torch.equal(found.top_ids[counted], top.indices[counted]) and not found.top_ids[~counted].any()


@pytest.fixture
def many(rows, monkeypatch):
    """Rows of several shards."""
    monkeypatch.setattr(targets, "SHARD_ROWS", 3)
    monkeypatch.setattr(targets, "ROWS_AT_ONCE", 2)
    return all_counted(rows).counted()


@pytest.mark.parametrize("folder", [True, False])
def test_kept_outputs_are_those_of_the_target(llama, many, tmp_path, folder):
    frozen = FrozenTarget(llama, top_k=6)
    kept, online = KeptOutputs(frozen, many, tmp_path / "kept" if folder else None).fill(), frozen(many.ids, many.mask)
    copied = pickle.loads(pickle.dumps(kept))  # as a worker of a data loader gets it
    for row in (0, 7, 3, 2):
        for name, value in kept[row].items():
            torch.testing.assert_close(value.double(), getattr(online, name)[row].double(), atol=5e-3, rtol=2e-3)
            assert torch.equal(value, copied[row][name])


def test_a_folder_of_outputs_is_taken_up_and_checked(llama, many, tmp_path):
    frozen, folder, made = FrozenTarget(llama, top_k=6), tmp_path / "kept", []

    def stop():
        made.append(1)
        if len(made) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        KeptOutputs(frozen, many, folder).fill(stop)
    again = KeptOutputs(frozen, many, folder)
    assert again.made == 2 and len(again.starts) == 3
    again.fill(stop)
    assert len(made) == 3 and KeptOutputs(frozen, many, folder).made == 3
    assert KeptOutputs(frozen, many[:6], folder).made == 2  # the beginning of the same rows
    other = TrainingRows(many.ids.clone(), many.mask, None)
    other.ids[4, 4] += 1
    with pytest.raises(ValueError, match=r"outputs-00001.safetensors' was made from other rows than number 3"):
        KeptOutputs(frozen, other, folder)
    tuned = copy.deepcopy(llama)
    tuned.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    for target, top_k, said in ((tuned, 6, "target_sha256"), (llama, 5, "top_k 6 -> 5")):
        with pytest.raises(ValueError, match=f"begun with other settings .*{said}"):
            KeptOutputs(FrozenTarget(target, top_k=top_k), many, folder)
    (folder / "outputs-00002.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"outputs-00002.safetensors' is damaged or missing"):
        KeptOutputs(frozen, many, folder)


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_a_run_on_kept_outputs_never_reads_the_target(llama, rows, tmp_path, monkeypatch):
    online = losses(llama, rows, tmp_path / "online", fresh_draft(llama))
    FSPADTrainer(
        fresh_draft(llama), llama, arguments(tmp_path, keep_features=str(tmp_path / "kept")), all_counted(rows[:6])
    )._keep_features()
    monkeypatch.setattr(FrozenTarget, "__call__", lambda *args: pytest.fail("read the target"))
    made = trained(
        fresh_draft(llama), llama, all_counted(rows[:6]), tmp_path / "x", max_steps=2,
        keep_features=str(tmp_path / "kept"),
    )  # fmt: skip
    assert [log["loss"] for log in logged(made)] == pytest.approx(online, rel=2e-3)
