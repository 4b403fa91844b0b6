import datasets
import numpy as np
import pytest
import torch
from transformers import TrainerCallback, get_cosine_schedule_with_warmup

from fspad_hf import FSPADDraftModel
from fspad_hf.training import trainer
from fspad_hf.training.data import TrainingRows, load_token_rows, span_mask
from fspad_hf.training.losses import draft_loss
from fspad_hf.training.trainer import last_checkpoint
from fspad_hf.training.warm_start import warm_start

from ..conftest import fresh_draft
from .runs import all_counted, arguments, known, logged, trained


@pytest.fixture(scope="module")
def rows(llama):
    torch.manual_seed(0)
    return llama.generate(torch.randint(3, 64, (12, 4)), do_sample=True, max_new_tokens=44, eos_token_id=None)


def run(llama, rows, path, draft=None, **kwargs):
    draft = draft or fresh_draft(llama)
    trainer = trained(draft, llama, all_counted(rows), path, **kwargs)
    return draft, logged(trainer)


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_it_learns_and_saves(llama, rows, tmp_path):
    draft, records = run(llama, rows, tmp_path, max_steps=120)
    assert records[-1]["loss"] < 0.85 * records[0]["loss"] and records[-1]["top1"] > records[0]["top1"]
    loaded = FSPADDraftModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(draft.parameters(), loaded.parameters(), strict=True))
    assert not list(tmp_path.glob("*.bin")) and "use_cache" not in loaded.config.to_dict()


class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 13:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:No tokenizer")
@pytest.mark.parametrize("kept", [False, True])
def test_a_killed_run_resumes_on_the_same_curve(llama, rows, tmp_path, kept):
    """Within an epoch and across its end, with another split into forwards."""
    whole, expected = run(llama, rows, tmp_path / "whole", max_steps=20, save_steps=8, keep_features=kept)
    with pytest.raises(KeyboardInterrupt):
        run(llama, rows, tmp_path / "cut", max_steps=20, save_steps=8, callbacks=[Killed()], keep_features=kept)
    draft, rest = run(
        llama, rows, tmp_path / "cut", max_steps=20, save_steps=8, resume=True, keep_features=kept, micro_rows=2
    )
    assert [r["step"] for r in rest] == list(range(1, 21))
    for name in ("loss", "feature", "logit", "learning_rate"):
        assert [r[name] for r in rest] == [r[name] for r in expected]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), draft.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_a_checkpoint_that_was_being_written_is_passed_over(llama, rows, tmp_path):
    run(llama, rows, tmp_path, max_steps=4, save_steps=2)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:-9])
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    state.unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_a_checkpoint_of_other_settings_is_refused_by_name(llama, rows, tmp_path):
    run(llama, rows, tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-3' is of other settings \(learning_rate 0.003 -> 0.01, seed"):
        run(llama, rows, tmp_path, resume=True, learning_rate=1e-2, seed=5)
    other = rows.clone()
    other[0, 7] += 1
    with pytest.raises(ValueError, match=r"\(data_sha256 "):
        run(llama, other, tmp_path, resume=True)


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_micro_batches_do_not_change_the_gradient(llama, rows, tmp_path):
    whole, *results = [run(llama, rows, tmp_path / str(m), max_steps=2, micro_rows=m)[0] for m in (4, 1, 2)]
    for draft in results:
        for a, b in zip(whole.parameters(), draft.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_a_data_set_as_transformers_users_have_it(llama, rows, tmp_path):
    """Lists of any length, labels of -100, position_ids of packed documents: as the rows they say."""
    labels = rows.clone()
    labels[:, :9] = -100
    listed = [{"input_ids": ids.tolist(), "labels": label.tolist()} for ids, label in zip(rows, labels, strict=True)]
    listed[3] = {name: values[:30] for name, values in listed[3].items()}
    data = datasets.Dataset.from_list(listed)
    found = TrainingRows.of(data)
    assert torch.equal(found.ids[0], rows[0]) and torch.equal(found.mask[0], labels[0] >= 0)
    assert found.segments[3].tolist() == [1] * 30 + [0] * 18 and not found.mask[3, 30:].any()
    trainer = trained(fresh_draft(llama), llama, data, tmp_path, held_out=data.select(range(2)))
    assert len(logged(trainer)) == 3 and trainer.state.log_history[-2]["eval_tau"] >= 1
    masks = [{"input_ids": [1, 2, 3, 4], "assistant_masks": [0, 1, 0, 1], "position_ids": [0, 1, 0, 1]}]
    found = TrainingRows.of(masks)
    assert found.segments.tolist() == [[1, 1, 2, 2]] and found.mask.tolist() == [[False, True, False, True]]
    assert found.counted().mask.tolist() == [[False, True, False, True]]
    for bad, said in (({"input_ids": [1]}, "expected input_ids and labels"), ({"labels": [1]}, "expected input_ids"),
                      ({"input_ids": [1, 2], "labels": [1]}, "different shapes")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            TrainingRows.of([bad])


def test_noise_is_another_for_each_row_step_and_seed(llama, rows, tmp_path):
    seen = set()
    for seed in (0, 1):
        made = trainer.FSPADTrainer(fresh_draft(llama), llama, arguments(tmp_path, seed=seed), all_counted(rows))
        for made.state.global_step in (0, 1, 500):
            seen.update(made._noise_seeds({"row": torch.arange(12)}))
    assert len(seen) == 2 * 3 * 12


def test_processes_with_other_data_are_refused(monkeypatch):
    monkeypatch.setattr(trainer, "broadcast_object_list", lambda objects: [{"seed": 0, "data_sha256": "ab"}])
    with pytest.raises(ValueError, match=r"Process 1 and the main process differ in \['data_sha256'\]"):
        trainer._check_agreement({"seed": 0, "data_sha256": "cd"}, 1)


def test_warm_start_is_the_least_squares_solution(llama, rows):
    draft, embedding = fresh_draft(llama), llama.get_input_embeddings()
    with torch.no_grad():
        features = llama.model(rows).last_hidden_state
        warm_start(draft, embedding, [(rows[:6], features[:6], None), (rows[6:], features[6:], None)])
        x = torch.cat((embedding(rows[:, 1:]), features[:, :-1], torch.ones(12, 47, 1)), -1).flatten(0, 1)
        y = features[:, 1:].flatten(0, 1)
        best = x @ torch.linalg.lstsq(x.double(), y.double()).solution.float()
        out = draft(inputs_embeds=embedding(rows[:, 1:]), features=features[:, :-1])
    assert torch.equal(out.features, out.logit_features)
    ours = (out.features.flatten(0, 1) - y).pow(2).mean()
    assert ours <= 1.01 * (best - y).pow(2).mean() < 0.9 * y.var()


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_bad_input(llama, rows, tmp_path):
    none = TrainingRows(rows, torch.zeros_like(rows, dtype=torch.bool), None)
    with pytest.raises(ValueError, match="Nothing to train on"):
        trained(fresh_draft(llama), llama, none, tmp_path)
    with pytest.raises(ValueError, match=r"torch\.float16: expected float32"):
        run(llama, rows, tmp_path, draft=fresh_draft(llama).half())
    with pytest.raises(ValueError, match="batch_rows=0 cannot be shared"):
        run(llama, rows, tmp_path, batch_rows=0)
    draft = fresh_draft(llama)
    torch.nn.init.constant_(draft.feature_sampler.fc.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="largest gradient is nan at step 1"):
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
        run(llama, rows, tmp_path, draft=draft, max_steps=2, micro_rows=4, save_steps=1)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert all(parameter.isfinite().all() for parameter in draft.parameters())


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_a_step_is_adamw_of_the_clipped_gradient(llama, rows, tmp_path):
    """By value, with the run's betas, the loss divided by the masked positions of the whole step."""
    fields = {"max_steps": 2, "batch_rows": 12, "micro_rows": 4, "clip_grad_value": 2e-3, "noise": 0.0}
    fields |= {"warmup_steps": 1, "lr_scheduler_type": "cosine"}
    ours, _ = run(llama, rows, tmp_path, **fields)
    plain, every = fresh_draft(llama), torch.ones_like(rows, dtype=torch.bool)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, 2)
    (frozen, found), clipped = known(llama, rows, every, top_k=64), 0
    for _ in range(2):
        sums = draft_loss(plain, frozen, rows, found, every)
        ((sums.feature + 0.1 * sums.logit) / sums.positions).backward()
        clipped += sum(int((p.grad.abs() > 2e-3).sum()) for p in plain.parameters())
        torch.nn.utils.clip_grad_value_(plain.parameters(), 2e-3)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    assert clipped > 100
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
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
    command = ["train", *(x for option, name in places.items() for x in (option, str(tmp_path / name)))]
    command += ["--steps", "3", "--batch-rows", "2", "--micro-rows", "2"]
    monkeypatch.setattr(training_data, "HELD_OUT_SHARE", 6)
    for rows_asked in ("11", "0"):
        assert main([*command, "--rows", rows_asked]) == 2 and "has 10 (and 2 held out)" in capsys.readouterr().err
    assert (
        main([*command, "--rows", "8", "--keep-features", "--target-name", "user/target", "--draft-vocab-size", "20"])
        == 0
    )
    draft = FSPADDraftModel.from_pretrained(tmp_path / "draft")
    answers = torch.from_numpy(np.load(tmp_path / "ids.npy")[:-2].astype(np.int64))
    counts = answers[span_mask(answers, opening, closing)].bincount(minlength=64)
    assert counts[draft.draft_vocab_ids].min() >= counts.sort(descending=True).values[20]
    assert draft.config.target_name_or_path == "user/target" and (tmp_path / "draft" / "tokenizer.json").exists()
    out = llama.generate(rows[:1, :8], assistant_model=draft, max_new_tokens=9)
    assert out.tolist() == llama.generate(rows[:1, :8], max_new_tokens=9).tolist()
    np.save(tmp_path / "ids.npy", np.full((4, 8), 64, dtype=np.uint16))
    with pytest.raises(ValueError, match="token id 64"):
        run.run_training(str(tmp_path / "target"), [str(tmp_path / "ids.npy")], arguments(tmp_path / "x"))
