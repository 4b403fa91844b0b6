"""benchmarks/gpu.py, rehearsed on a CPU; what it refuses; what becomes of a job that fails; files in parts."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_training
import numpy as np
import parts
import pytest
import torch

from fspad_hf import FSPADDraftModel
from fspad_hf.training.data import TrainingRows

from . import tiny


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_rehearsal(tmp_path):
    """Every job that a CPU can run, in a process that has nothing but the checkout."""
    command = [sys.executable, str(gpu.ROOT / "benchmarks" / "gpu.py"), "--rehearse", "--out", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in gpu.JOBS}
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{results}"
    for name, job in gpu.JOBS.items():
        assert f"\n{name} " in done.stdout
        if job.on_cpu:
            assert results[name]["reason"].startswith("not rehearsed, because ")
            continue
        assert results[name]["status"] == "ok" and results[name]["rehearsed"] and results[name]["command"]
        assert results[name]["versions"]["torch"] == torch.__version__ and len(results[name]["output"]) <= 40
    rows = results["eager"]["figures"]["rows"]
    assert len(rows) == 20 and all(row["identical"] for row in rows if row["dtype"] == "float32")
    assert not any(row["fell_back"] for row in rows)
    told = results["speed"]["figures"]["float32, sampled"]
    assert set(told) == {"plain", "plain, static cache + compile", "ours, eager"}
    assert told["ours, eager"]["identical"] == "1 of 1" and told["ours, eager"]["round_ms"] > 0
    assert all(row["ours_us"] > 0 and row["library_us"] > 0 for row in results["kernels"]["figures"]["rows"])
    assert results["bit-exact"]["figures"]["bit exact, sampled"]["ours, eager"]["identical"] == "1 of 1"
    assert results["train"]["figures"]["tau"]["greedy"]["mean"] > 1
    trained = results["train"]["figures"]
    assert trained["best"] in trained["recipes"] and {"fspad-seed1", "eagle2-seed1"} < set(trained["ablation"])
    assert FSPADDraftModel.from_pretrained(tmp_path / "draft").config.draft_vocab_size
    assert all(file.stat().st_size <= 16 * parts.MIB for file in tmp_path.rglob("*.part*"))
    assert [r["job"] for r in json.loads((tmp_path / "summary.json").read_text())] == list(gpu.JOBS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "egaer"], r"'egaer'.*unknown: expected some of .*'eager'"),
        (["--minutes", "0"], "minutes=0 .*more than 0"),
        (["--target", "."], r"target='\.' holds no \*\.safetensors.*save_pretrained.*parts.py join"),
        (["--ids", "."], r"ids='\.' holds no \*\.npy"),
        (["--jobs", "train"], "'train' needs --target and --ids"),
        (["--jobs", "eager"], "no CUDA device.*--rehearse"),
    ],
)
def test_bad_input_is_one_error(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)
    assert not (tmp_path / "out").exists()


def test_too_little_memory_names_the_jobs_that_fit(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * 2**30, 10 * 2**30))
    assert gpu.main(["--jobs", "eager", "speed-8b"]) == 2
    assert "['speed-8b'] need 24 GiB of GPU memory, 8.0 are free" in (said := capsys.readouterr().err)
    assert said.rstrip().endswith("--jobs eager.")


ACTS = """
import json, pathlib, subprocess, sys, time
name, told, figures = sys.argv[1:]
pathlib.Path(figures).write_text(json.dumps({"figures": {"headline": f"{name} began"}}))
print("\\n".join(f"line {i}" for i in range(60)), flush=True)
if name == "crash": raise RuntimeError("out of memory")
if name == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pathlib.Path(json.loads(told)["out"], "child").write_text(str(child.pid))
    time.sleep(60)
"""


def test_a_crash_or_a_hang_costs_one_job(tmp_path, monkeypatch, capsys):
    (tmp_path / "acts.py").write_text(ACTS)
    monkeypatch.setattr(gpu, "SCRIPT", tmp_path / "acts.py")
    monkeypatch.setattr(gpu, "prepare_rehearsal", lambda options: None)
    jobs = {name: gpu.Job(name, 6) for name in ("crash", "hang", "good")} | {
        "lacking": gpu.Job("", 6, modules=("zzz",))
    }
    monkeypatch.setattr(gpu, "JOBS", jobs)
    monkeypatch.setattr(gpu, "REHEARSAL_SECONDS", 6)
    assert gpu.main(["--rehearse", "--out", str(tmp_path / "out")]) == 1
    crash, hang, good, lacking = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in jobs)
    assert crash["status"] == "failed" and crash["reason"] == "exit status 1: RuntimeError: out of memory"
    assert len(crash["output"]) == 40 and crash["figures"] == {"headline": "crash began"}
    assert hang["status"] == "timeout" and hang["reason"] == "stopped after 6 s" and hang["figures"]
    assert good["status"] == "ok" and lacking["reason"] == "zzz is not installed"
    time.sleep(0.2)  # of what it started, nothing is left, or only what nobody has waited for
    status = Path(f"/proc/{(tmp_path / 'out' / 'child').read_text()}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text()
    assert "until then: hang began" in capsys.readouterr().out
    assert not [file for file in (tmp_path / "out").iterdir() if file.name.startswith(".")]


def test_no_job_begins_when_the_minutes_are_used_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "JOBS", {"first": gpu.Job("", 60)})
    monkeypatch.setattr(gpu, "prepare_rehearsal", lambda options: None)
    assert gpu.main(["--rehearse", "--minutes", "0.01", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "first.json").read_text())
    assert result["status"] == "skipped" and "--minutes 0.01 are used up" in result["reason"]


@pytest.mark.parametrize("recipe", ["AdamW", "Muon"])
def test_training_goes_on_from_its_own_parts(tmp_path, recipe):
    recipe = gpu_training.RECIPES[recipe]
    target, state = tiny.build("llama"), tmp_path / "state" / "train.safetensors"
    options = gpu.argparse.Namespace(rehearse=True, device=torch.device("cpu"))
    ids = torch.randint(3, 60, (8, 32))
    rows = TrainingRows(ids, torch.ones_like(ids, dtype=torch.bool), None)
    features = gpu_training.Features(options, target, rows, rows[:2])
    first, second = (gpu_training.new_draft(target, rows) for _ in range(2))
    ends = []
    for draft in (first, second):
        figures = {}
        gpu_training.run(options, features, draft, recipe, 0.5, lambda told=figures, **new: told.update(new), state)
        state.unlink()  # what comes back from the machine are the parts
        ends.append(figures)
    assert ends[1]["steps_in_all"] == ends[0]["steps_in_all"] + ends[1]["steps"] > ends[1]["steps"]
    parts.join(state.with_name("train.safetensors.parts.json"))
    optimizers = gpu_training.make_optimizers(first, recipe.muon)
    assert gpu_training._restored(first, optimizers, state) == ends[1]["steps_in_all"]
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def whole(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MIB", 100)
    file = tmp_path / "model.safetensors"
    file.write_bytes(np.random.default_rng(0).bytes(350))
    return file


@pytest.mark.parametrize(("mib", "count"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_parts_join_to_what_was_split(whole, mib, count):
    content = whole.read_bytes()
    manifest = parts.split(whole, mib)
    whole.unlink()
    assert len(list(whole.parent.glob("*.part0*"))) == count
    assert parts.main(["join", str(manifest)]) == 0 and whole.read_bytes() == content


def test_a_damaged_or_missing_part_is_named_and_nothing_written(whole, capsys):
    manifest = parts.split(whole, 1)
    whole.unlink()
    part = whole.with_name("model.safetensors.part02")
    content = part.read_bytes()
    part.write_bytes(content[:-1] + b"?")
    assert parts.main(["join", str(manifest)]) == 2 and "part02 is damaged" in capsys.readouterr().err
    part.unlink()
    assert parts.main(["join", str(manifest)]) == 2 and "part02" in capsys.readouterr().err
    assert not whole.exists() and not list(whole.parent.glob(".*"))
    assert parts.main(["split", str(manifest), "--mib", "0"]) == 2 and "mib=0" in capsys.readouterr().err
