import errno
import json

import pytest
import torch

from fspad_hf.training import checkpoints
from fspad_hf.training.checkpoints import Checkpoints, Progress

from ..conftest import fresh_draft


def trained(target, steps=1, seed=0):
    """A draft and its optimiser after some steps of nonsense."""
    draft = fresh_draft(target)
    optimizer = torch.optim.AdamW(draft.parameters(), fused=True)
    torch.manual_seed(seed)
    for _ in range(steps):
        for parameter in draft.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return draft, optimizer


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture
def saved(llama, tmp_path):
    """Checkpoints of steps 1, 2 and 3; what was saved of the last two."""
    kept = Checkpoints(tmp_path, {"seed": 0, "betas": (0.9, 0.95)})
    states = {}
    for step in (1, 2, 3):
        states[step] = trained(llama, step)
        kept.save(*states[step], Progress(step, 1.5 * step, {"loss": 2.0}, {"step": 2, "tau": 1.5}))
    return states


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def test_what_was_saved_comes_back(llama, saved, tmp_path):
    draft, optimizer = fresh_draft(llama), None
    optimizer = torch.optim.AdamW(draft.parameters(), fused=True)
    progress = Checkpoints(tmp_path, {"seed": 0, "betas": (0.9, 0.95)}).load(draft, optimizer)
    assert progress == Progress(3, 4.5, {"loss": 2.0}, {"step": 2, "tau": 1.5})
    theirs, their_optimizer = saved[3]
    assert same(draft, theirs)
    for mine, made in ((draft, optimizer), (theirs, their_optimizer)):  # the next step is the same
        torch.manual_seed(9)
        for parameter in mine.parameters():
            parameter.grad = torch.randn_like(parameter)
        made.step()
    assert same(draft, theirs)


def test_the_last_two_and_the_best_are_kept(llama, tmp_path):
    kept, state = Checkpoints(tmp_path, {}), trained(llama)
    for step in range(1, 7):
        kept.save(*state, Progress(step, best={"step": 2} if step < 6 else {"step": 6}))
    assert names(tmp_path) == [f"step-{step:08d}.safetensors" for step in (2, 5, 6)]  # the fifth still says 2
    kept.save(*state, Progress(7, best={"step": 6}))
    assert names(tmp_path) == [f"step-{step:08d}.safetensors" for step in (6, 7)]


def test_other_settings_are_refused_by_name(llama, saved, tmp_path):
    with pytest.raises(ValueError, match=r"other settings \(seed 0 -> 1, noise null -> 0\.2\): repeat") as refused:
        Checkpoints(tmp_path, {"seed": 1, "betas": (0.9, 0.95), "noise": 0.2}).load(*trained(llama))
    assert "betas" not in str(refused.value)


@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:-9]), "empty"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(llama, saved, tmp_path, damage):
    damage = damage if callable(damage) else lambda path: path.write_bytes(b"")
    damage(tmp_path / "step-00000003.safetensors")
    kept, state = Checkpoints(tmp_path, {"seed": 0, "betas": (0.9, 0.95)}), trained(llama)
    with pytest.warns(UserWarning, match=r"00000003.safetensors' is damaged .*going on from step 2"):
        assert kept.load(*state).step == 2
    assert same(state[0], saved[2][0])
    damage(tmp_path / "step-00000002.safetensors")
    with pytest.raises(ValueError, match="no sound one before it: delete"):
        kept.load(*state)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), "SafetensorError"])
def test_a_full_disk_leaves_the_last_checkpoint(llama, saved, tmp_path, monkeypatch, error):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if error == "SafetensorError":
        error = checkpoints.SafetensorError("I/O error: No space left on device (os error 28)")

    def half(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(checkpoints, "save_file", half)
    with pytest.raises(OSError, match=r"step 4 cannot be written .*No space left on device.*that of step 3 stands"):
        Checkpoints(tmp_path, {}).save(*trained(llama), Progress(4))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_a_killed_writer_left_is_cleared(llama, saved, tmp_path):
    (tmp_path / ".step-00000004.safetensors.77").write_bytes(b"half")
    Checkpoints(tmp_path, {"seed": 0, "betas": (0.9, 0.95)}).load(*trained(llama))
    assert names(tmp_path) == ["step-00000002.safetensors", "step-00000003.safetensors"]


def test_the_best_is_read_or_warned_of(llama, saved, tmp_path):
    kept, draft = Checkpoints(tmp_path, {}), fresh_draft(llama)
    assert kept.load_weights(draft, 2) and same(draft, saved[2][0])
    flip_a_bit(tmp_path / "step-00000003.safetensors")
    with pytest.warns(UserWarning, match="last step's weights are taken"):
        assert not kept.load_weights(draft, 3)
    assert same(draft, saved[2][0])


def test_a_checkpoint_is_plain_safetensors(saved, tmp_path):
    with checkpoints.safe_open(tmp_path / "step-00000003.safetensors", "pt") as file:
        assert json.loads(file.metadata()["fspad"])["progress"]["step"] == 3
        assert {name.split(".")[0] for name in file.keys()} == {"weights", "exp_avg", "exp_avg_sq"}  # noqa: SIM118
