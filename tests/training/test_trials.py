import json

import torch
import trials
from gpu_training import make_optimizers
from trials import Together

from ..conftest import fresh_draft
from .runs import write_files


def test_trials_of_equal_time_are_kept_and_compared(llama, tokenizer, tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(trials, "Together", lambda *parts: made.append(parts) or Together(*parts))
    options = write_files(tmp_path, llama, tokenizer)
    options += ["--keep-features", str(tmp_path / "kept"), "--output", str(tmp_path / "trials.jsonl"), "--rows", "30"]
    options += ["--seconds", "0.5", "--eval-tokens", "40"]
    chosen = ["Muon for matrices, rate 2e-3", "self-feeding, 2 runs"]
    trials.main([*options, "--only", chosen[1]])
    trials.main([*options, "--only", *chosen])
    told = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [one["trial"] for one in told] == chosen[::-1]  # the second one is run once
    assert [[type(part).__name__ for part in parts] for parts in made] == [["AdamW", "Muon"]] * 2  # timed, then run
    assert all(one["steps"] * one["seconds_a_step"] < 0.7 and one["tau"] > 1 < one["coupled_tau"] for one in told)
    trials.main([*options, "--seconds", "0.2", "--only", chosen[1]])  # other options: run again
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 3
    shown = capsys.readouterr().out
    assert all(f"| {one['trial']} | {one['steps']} | {one['tau']:.3f} |" in shown for one in told)


def test_muon_moves_matrices_and_adamw_the_rest(llama):
    draft = fresh_draft(llama)
    before = {name: weight.clone() for name, weight in draft.named_parameters()}
    optimizer = Together(*make_optimizers(draft, True, 1e-2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert all(group["lr"] == 5e-3 for one in optimizer.optimizers for group in one.param_groups)
    for weight in draft.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step(), schedule.step(), optimizer.zero_grad()
    assert all(weight.grad is None for weight in draft.parameters())
    for name, weight in draft.named_parameters():
        moved = (weight - before[name]).detach()
        if weight.ndim != 2:  # AdamW's first step is the rate, whatever the gradient
            torch.testing.assert_close(moved, torch.full_like(moved, -5e-3), rtol=1e-3, atol=1e-6)
        else:
            assert moved.abs().max() > 0
