import importlib
import runpy
import sys

import numpy as np
import pytest

import fspad_hf
from fspad_hf import FSPADDraftModel, cli, demo

from . import tiny
from .conftest import fresh_draft


def replace_demo(monkeypatch, result):
    def run_demo(**options):
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(demo, "run_demo", run_demo)


def test_version_and_help(capsys):
    for option, shown in (("--version", fspad_hf.__version__), ("--help", "demo")):
        with pytest.raises(SystemExit) as left:
            cli.main([option])
        assert left.value.code == 0 and shown in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["dance"], ["demo", "--max-new-tokens", "many"]])
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2 and "usage: fspad-hf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("one\n  two"), 2, "fspad-hf: error: one two\n"),
        (OSError("gone"), 2, "fspad-hf: error: gone\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, error, code, said):
    replace_demo(monkeypatch, error)
    assert cli.main(["demo"]) == code
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", said)


def test_a_missing_extra_names_it_and_other_errors_are_not_hidden(monkeypatch, capsys):
    replace_demo(monkeypatch, ModuleNotFoundError("No module named 'rich'", name="rich"))
    assert cli.main(["demo"]) == 2 and "fspad_hf[demo]" in capsys.readouterr().err
    for error in (ModuleNotFoundError("No module named 'x'", name="x"), RuntimeError("a bug")):
        replace_demo(monkeypatch, error)
        with pytest.raises(type(error)):
            cli.main(["demo"])


@pytest.mark.parametrize(("identical", "dtype", "code"), [(True, "float32", 0), (False, "float32", 1)])
def test_a_difference_is_a_failure(monkeypatch, identical, dtype, code):
    replace_demo(monkeypatch, [{"identical": True}, {"identical": identical}])
    assert cli.main(["demo", "--dtype", dtype]) == code


def test_options_reach_the_demo(monkeypatch):
    seen = {}
    monkeypatch.setattr(demo, "run_demo", lambda **options: seen.update(options) or [])
    arguments = (
        "demo --prompt a --prompt b --seed 3 --json f --tree-depth 2 --tree-top-k 4 --tree-nodes 5 --tree-lookup 6"
    )
    assert cli.main(arguments.split()) == 0
    assert seen == {
        "target": None, "draft": None, "device": None, "dtype": None, "prompts": ["a", "b"], "max_new_tokens": 128,
        "seed": 3, "json_file": "f", "tree_depth": 2, "tree_top_k": 4, "tree_nodes": 5,
        "tree_lookup": 6, "tree": None,
    }  # fmt: skip


def test_python_dash_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fspad-hf", "--version"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("fspad_hf", run_name="__main__")
    assert left.value.code == 0 and fspad_hf.__version__ in capsys.readouterr().out


DRAFT_ALONE = {
    "demo": "", "chat": "", "explain": "Why? --output rounds.html", "verify": "", "bench": "--output results",
    "profile": "", "acceptance": "--questions q.jsonl", "calibrate": "--data rows.npy",
}  # fmt: skip


def test_commands_with_a_draft_alone_take_the_target_that_it_names(tmp_path, monkeypatch, tokenizer, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"category": "qa", "turns": ["Why?"]}')
    np.save(tmp_path / "rows.npy", np.ones((60, 40), dtype=np.uint16))
    fresh_draft(tiny.build("llama"), target_name_or_path="alice/target").save_pretrained("d", tokenizer=tokenizer)

    def load_pair(draft, *, target, **kwargs):
        raise OSError(f"asked for {target} beside {draft}")

    monkeypatch.setattr(FSPADDraftModel, "load_pair", load_pair)
    monkeypatch.setattr("fspad_hf.evaluation.run.published_questions", lambda: tmp_path / "q.jsonl")
    for command, rest in DRAFT_ALONE.items():
        assert cli.main([command, *rest.split(), "--draft", "d", "--device", "cpu"]) == 2
        assert "error: asked for alice/target beside d\n" in capsys.readouterr().err, command
    modules = [importlib.import_module(f"fspad_hf.commands.{name.replace('-', '_')}") for name in cli.COMMANDS]
    takers = {n for n, m in zip(cli.COMMANDS, modules, strict=True) if "add_model_arguments" in vars(m)}
    assert takers == DRAFT_ALONE.keys()
