from argparse import Namespace

import numpy as np
import pytest
import torch

from fspad_hf import FSPADDraftModel
from fspad_hf.training import schedule, trainer
from fspad_hf.training.config import TrainingConfig
from fspad_hf.training.data import TrainingRows, load_token_rows, span_mask
from fspad_hf.training.frozen import TargetFeatures
from fspad_hf.training.losses import draft_loss
from fspad_hf.training.trainer import train
from fspad_hf.training.warm_start import warm_start

from ..conftest import fresh_draft


@pytest.fixture(scope="module")
def rows(llama):
    torch.manual_seed(0)
    return llama.generate(torch.randint(3, 64, (12, 4)), do_sample=True, max_new_tokens=44, eos_token_id=None)


def config(path, **kwargs):
    fields = {"steps": 30, "batch_rows": 4, "micro_rows": 2, "warmup_steps": 3, "learning_rate": 3e-3}
    return TrainingConfig(output_dir=str(path), **{**fields, **kwargs})


def trained(rows):
    return TrainingRows(rows, torch.ones_like(rows, dtype=torch.bool), None)


def run(llama, rows, path, draft=None, **kwargs):
    records = []
    draft = draft or fresh_draft(llama)
    train(draft, llama, rows, torch.ones_like(rows, dtype=torch.bool), config(path, **kwargs), report=records.append)
    return draft, records


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_it_learns_and_saves(llama, rows, tmp_path):
    draft, records = run(llama, rows, tmp_path, steps=120)
    assert records[-1]["loss"] < 0.85 * records[0]["loss"] and records[-1]["top1"] > records[0]["top1"]
    loaded = FSPADDraftModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(draft.parameters(), loaded.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_a_killed_run_resumes_on_the_same_curve(llama, rows, tmp_path):
    whole, expected = run(llama, rows, tmp_path / "whole", steps=20, checkpoint_every=8)
    records = []

    def kill(record):
        records.append(record)
        if record["step"] == 13:
            raise KeyboardInterrupt

    masks = torch.ones_like(rows, dtype=torch.bool)
    with pytest.raises(KeyboardInterrupt):
        train(
            fresh_draft(llama), llama, rows, masks, config(tmp_path / "cut", steps=20, checkpoint_every=8), report=kill
        )
    assert not list((tmp_path / "cut").glob("*.partial")) and (tmp_path / "cut" / "checkpoint").exists()
    draft, rest = run(llama, rows, tmp_path / "cut", steps=20, checkpoint_every=8)
    assert [r["step"] for r in rest] == list(range(9, 21))
    assert [r["loss"] for r in records[:8] + rest] == [r["loss"] for r in expected]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), draft.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_micro_batches_do_not_change_the_gradient(llama, rows, tmp_path):
    whole, *results = [run(llama, rows, tmp_path / str(m), steps=2, micro_rows=m)[0] for m in (4, 1, 3)]
    for draft in results:
        for a, b in zip(whole.parameters(), draft.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_a_sampled_softmax_of_every_id_is_the_softmax(llama, rows, tmp_path):
    whole, sampled = (run(llama, rows, tmp_path / str(n), steps=3, head_sample=n)[1] for n in (0, 64))
    few = run(llama, rows, tmp_path / "few", steps=3, head_sample=8, head_extra=8)[1]
    assert [r["loss"] for r in sampled] == pytest.approx([r["loss"] for r in whole], rel=1e-5)
    assert few[0]["loss"] != pytest.approx(whole[0]["loss"], rel=1e-5)


def test_processes_with_other_data_are_refused(llama, monkeypatch):
    monkeypatch.setattr(trainer, "broadcast_object_list", lambda objects: [{"seed": 0, "data_sha256": "ab"}])
    with pytest.raises(ValueError, match=r"Process 1 and the main process differ in \['data_sha256'\]"):
        trainer._check_agreement({"seed": 0, "data_sha256": "cd"}, Namespace(process_index=1))


def test_every_epoch_sees_every_row_once():
    settings = config("x", batch_rows=4)
    seen = [row for step in range(5) for row in schedule.step_rows(10, step, settings)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]


def test_warm_start_is_the_least_squares_solution(llama, rows):
    draft, embedding = fresh_draft(llama), llama.get_input_embeddings()
    with torch.no_grad():
        features = llama.model(rows).last_hidden_state
        warm_start(draft, embedding, [(rows[:6], features[:6]), (rows[6:], features[6:])])
        x = torch.cat((embedding(rows[:, 1:]), features[:, :-1], torch.ones(12, 47, 1)), -1).flatten(0, 1)
        y = features[:, 1:].flatten(0, 1)
        best = x @ torch.linalg.lstsq(x.double(), y.double()).solution.float()
        out = draft(inputs_embeds=embedding(rows[:, 1:]), features=features[:, :-1])
    assert torch.equal(out.features, out.logit_features)
    ours = (out.features.flatten(0, 1) - y).pow(2).mean()
    assert ours <= 1.01 * (best - y).pow(2).mean() < 0.9 * y.var()


def test_kept_features_are_those_of_the_target(llama, rows):
    kept, online = TargetFeatures(llama, keep=True), TargetFeatures(llama)
    for chosen in ([0, 3], [3, 1], [0, 1]):
        torch.testing.assert_close(kept(chosen, rows[chosen]), online(chosen, rows[chosen]), atol=2e-3, rtol=2e-3)
    assert set(kept.kept) == {0, 1, 3}


def test_bad_input(llama, rows, tmp_path):
    none = torch.zeros_like(rows, dtype=torch.bool)
    with pytest.raises(ValueError, match="Nothing to train on"):
        train(fresh_draft(llama), llama, rows, none, config(tmp_path))
    with pytest.raises(ValueError, match=r"torch\.float16: expected float32"):
        run(llama, rows, tmp_path, draft=fresh_draft(llama).half())
    with pytest.raises(ValueError, match="batch_rows=3 cannot be shared by 2 processes"):
        trainer._check(fresh_draft(llama), trained(rows), config(tmp_path, batch_rows=3), Namespace(num_processes=2))
    draft = fresh_draft(llama)
    torch.nn.init.constant_(draft.feature_sampler.fc.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        run(llama, rows, tmp_path, draft=draft)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_a_gradient_that_is_no_number_spoils_no_checkpoint(llama, rows, tmp_path):
    """The loss of that step is fine, so that only the next one's would tell."""
    draft, steps = fresh_draft(llama), []

    def spoil(gradient):
        steps.append(len(steps) + 1)
        return gradient * float("nan") if len(steps) == 2 else gradient

    draft.feature_sampler.fc.bias.register_hook(spoil)
    with pytest.raises(FloatingPointError, match="largest gradient is nan at step 2: lower learning_rate"):
        run(llama, rows, tmp_path, draft=draft, steps=2, micro_rows=4, checkpoint_every=1)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000001.safetensors"]
    assert all(parameter.isfinite().all() for parameter in draft.parameters())


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_a_step_is_adamw_of_the_clipped_gradient(llama, rows, tmp_path):
    """By value, with the run's betas, the loss divided by the masked positions of the whole step."""
    fields = {"steps": 2, "batch_rows": 12, "micro_rows": 5, "clip_value": 2e-3, "warmup_steps": 1, "noise": 0.0}
    trained, _ = run(llama, rows, tmp_path, **fields)
    plain, every = fresh_draft(llama), torch.ones_like(rows, dtype=torch.bool)
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    features, clipped = TargetFeatures(llama)([], rows), 0
    for step in range(2):
        sums = draft_loss(plain, llama.get_input_embeddings(), llama.lm_head, rows, features, every)
        ((sums.feature + 0.1 * sums.logit) / sums.positions).backward()
        clipped += sum(int((p.grad.abs() > 2e-3).sum()) for p in plain.parameters())
        torch.nn.utils.clip_grad_value_(plain.parameters(), 2e-3)
        optimizer.param_groups[0]["lr"] = schedule.learning_rate_at(step, config(tmp_path, **fields))
        optimizer.step(), optimizer.zero_grad()
    assert clipped > 100
    for a, b in zip(trained.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_token_rows(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.uint16).reshape(2, 3))
    np.save(tmp_path / "b.npy", np.arange(3, dtype=np.uint16).reshape(1, 3))
    assert load_token_rows([tmp_path]).tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    np.save(tmp_path / "c.npy", np.zeros((2, 4), dtype=np.uint16))
    with pytest.raises(ValueError, match=r"c\.npy"):
        load_token_rows([tmp_path])
    with pytest.raises(ValueError, match=r"No \.npy files"):
        load_token_rows([tmp_path / "nowhere"])


def test_spans():
    ids = torch.tensor([[1, 5, 6, 9, 9, 2, 1, 7, 8, 2, 5, 6, 9], [9, 5, 9, 6, 2, 5, 6, 2, 5, 6, 5, 6, 2]])
    assert span_mask(ids, [5, 6], [2]).int().tolist() == [
        [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 1],
    ]


def test_the_command_trains_a_draft_that_generate_takes(llama, rows, tokenizer, tmp_path, monkeypatch, capsys):
    from fspad_hf.training import data as training_data
    from fspad_hf.training import run
    from fspad_hf.training.templates import assistant_span
    from fspad_hf_cli import main

    llama.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    opening, closing = assistant_span(tokenizer)
    assert (tokenizer.decode(opening), tokenizer.decode(closing)) == ("<a>", "|")
    data = rows.clone()
    data[:, 6 : 6 + len(opening)] = torch.tensor(opening)
    np.save(tmp_path / "ids.npy", data.numpy().astype(np.uint16))
    places = {"--target": "target", "--data": "ids.npy", "--output": "draft"}
    arguments = ["train", *(x for option, name in places.items() for x in (option, str(tmp_path / name)))]
    arguments += ["--steps", "3", "--batch-rows", "2", "--micro-rows", "2"]
    monkeypatch.setattr(training_data, "HELD_OUT_SHARE", 6)
    for rows_asked in ("11", "0"):
        assert main([*arguments, "--rows", rows_asked]) == 2 and "has 10 (and 2 held out)" in capsys.readouterr().err
    assert (
        main(
            [*arguments, "--rows", "8", "--keep-features", "--target-name", "user/target", "--draft-vocab-size", "20"]
        )
        == 0
    )
    draft = FSPADDraftModel.from_pretrained(tmp_path / "draft")
    counts = torch.from_numpy(np.load(tmp_path / "ids.npy")[:-2].astype(np.int64)).flatten().bincount(minlength=64)
    assert counts[draft.draft_vocab_ids].min() >= counts.sort(descending=True).values[20]
    assert draft.config.target_name_or_path == "user/target" and (tmp_path / "draft" / "tokenizer.json").exists()
    out = llama.generate(rows[:1, :8], assistant_model=draft, max_new_tokens=9)
    assert out.tolist() == llama.generate(rows[:1, :8], max_new_tokens=9).tolist()
    np.save(tmp_path / "ids.npy", np.full((4, 8), 64, dtype=np.uint16))
    with pytest.raises(ValueError, match="token id 64"):
        run.run_training(str(tmp_path / "target"), [str(tmp_path / "ids.npy")], config(tmp_path / "x"))
