"""Real processes: several that train together, one that is killed."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fspad_hf_cli import main

from .runs import shown_steps, write_files

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def files(llama, tokenizer, tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"), llama, tokenizer)


BEYOND = {
    "": "",
    "the objective": " --self-steps 3 --self-step-decay 0.8 --top-k-weight 0.5 --top-k 4",
    "a target that is split": " --shard-target",
    "and kept": " --shard-target --keep-features {folder}",
}


@pytest.mark.parametrize("beyond", BEYOND.values(), ids=BEYOND)
def test_two_processes_are_one(files, tmp_path, capsys, beyond):
    beyond = beyond.format(folder=tmp_path / "kept")
    options = "--steps 8 --batch-rows 4 --micro-rows 1 --log-every 1 --validate-every 4 --validate-tokens 60"
    options += " --warmup-steps 2 --draft-vocab-size 40 --checkpoint-every 3" + beyond
    command = ["train", *files, *options.split(), "--output"]
    assert main([*command, str(tmp_path / "one")]) == 0
    alone = capsys.readouterr().out
    launch = f"-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port {free_port()}"
    launch += " --num_machines 1 --mixed_precision no --dynamo_backend no -m fspad_hf"
    done = subprocess.run(
        [sys.executable, *launch.split(), *command, str(tmp_path / "two")],
        env=ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, theirs = shown_steps(alone), shown_steps(done.stdout)
    assert [line[0] for line in ours] == [line[0] for line in theirs] == [str(step) for step in range(1, 9)]
    for a, b in zip(ours, theirs, strict=True):
        assert [float(x) for x in a] == pytest.approx([float(x) for x in b], abs=2e-4)
    assert done.stdout.count("evaluated at step") == 2 and done.stdout.count("A row of the data") == 1
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-4, rtol=1e-3, msg=name)
    told = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two")]
    assert [about["processes"] for about in told] == [1, 2]
    for name in ("validation_tau", "validation_coupled_tau", "validation_hit_3", "best_step"):
        assert told[0][name] == pytest.approx(told[1][name], abs=1e-6), name


def test_a_run_killed_between_checkpoints_goes_on_as_if_nothing_had_been(files, tmp_path, capsys):
    options = "--steps 200 --batch-rows 2 --log-every 1 --checkpoint-every 40 --validate-every 50"
    options += " --validate-tokens 30"
    command = ["train", *files, *options.split(), "--output"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    expected = shown_steps(capsys.readouterr().out)
    with subprocess.Popen(
        [sys.executable, "-m", "fspad_hf", *command, str(tmp_path / "cut")],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("step 65/"):
                process.kill()
                break
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert main([*command, str(tmp_path / "cut")]) == 0
    rest = shown_steps(capsys.readouterr().out)
    first = int(rest[0][0])
    assert first - 1 in {40, 50, 80, 100, 120, 150, 160}  # an evaluation is a checkpoint, too
    assert rest == expected[first - 1 :]
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not list((tmp_path / "cut").rglob(".*"))
