"""Rounds on a device that is not the host, with real values: see `tests/no_device.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from .. import tiny
from ..no_device import MODES, NAME

pytestmark = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.10"), reason="a device written in Python needs torch 2.10"
)


@pytest.fixture(scope="module")
def found():
    """What each model and mode came to, in a process of its own."""
    command = [sys.executable, "-m", "tests.no_device"]
    here = {"cwd": Path(__file__).parents[2], "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, **here)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(line["name"], line["mode"]): line for line in lines}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_the_tokens_are_the_host_s_and_nothing_is_mixed(found, name, mode):
    one = found[name, mode]
    assert "error" not in one, one["error"]
    assert one["device"] == f"{NAME}:0" and one["oracle"]["same"]
    assert one["oracle"]["tau"] > 2


def test_reads_of_a_round(found):
    """How often the host waits for the device. docs/support.md says so."""
    for mode in MODES:
        one = found["llama", mode]
        assert one["draft"]["same"] and len(one["rounds"]) > 5
        own = int(mode == "sampled")  # of each token; such a device draws by an algorithm of its own
        assert all(reads == 2 + own * tokens for reads, tokens in one["rounds"][:-1]), one["rounds"]
