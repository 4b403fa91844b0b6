import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fspad_hf
import fspad_hf_cli as cli
from fspad_hf import FSPADDraftModel, demo, runtime

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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"), (["dance"], "'dance' is no command; see fspad-hf --help"),
        (["becnh", "--seed", "1"], "error: 'becnh' is no command: did you mean 'bench'?"),
        (["export-custom-genrate", "x"], "did you mean 'export-custom-generate'?"),
        (["demo", "--max-new-tokens", "many"], "invalid int value: 'many'"),
    ],
)  # fmt: skip
def test_usage_errors_exit_with_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    printed = capsys.readouterr().err
    assert left.value.code == 2 and "usage: fspad-hf" in printed and said in printed


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["dance"], ["train", "--seed", "x"]]
)
def test_what_runs_no_command_imports_nothing_heavy(arguments):
    """As the console script starts: torch and transformers take seconds, this should take none."""
    code = (
        "import atexit, sys, fspad_hf_cli\n"
        "heavy = ('fspad_hf', 'torch', 'transformers', 'huggingface_hub', 'rich')\n"
        "atexit.register(lambda: print('HEAVY', [name for name in heavy if name in sys.modules]))\n"
        "sys.exit(fspad_hf_cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if arguments[-1] in ("--help", "--version") else 2), done.stderr
    assert done.stdout.endswith("HEAVY []\n")
    project = (Path(cli.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'fspad-hf = "fspad_hf_cli:main"' in project


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
    "profile": "", "acceptance": "",
}  # fmt: skip


def test_commands_with_a_draft_alone_take_the_target_that_it_names(tmp_path, monkeypatch, tokenizer, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"category": "qa", "turns": ["Why?"]}')
    fresh_draft(tiny.build("llama"), target_name_or_path="alice/target").save_pretrained("d", tokenizer=tokenizer)

    def load_pair(draft, *, target, **kwargs):
        raise OSError(f"asked for {target} beside {draft}")

    monkeypatch.setattr(FSPADDraftModel, "load_pair", load_pair)
    monkeypatch.setattr("fspad_hf.loading.check_reachable", lambda *_: None)
    monkeypatch.setattr("fspad_hf.evaluation.spec_bench.published_questions", lambda: tmp_path / "q.jsonl")
    for command, rest in DRAFT_ALONE.items():
        assert cli.main([command, *rest.split(), "--draft", "d", "--device", "cpu"]) == 2
        assert "error: asked for alice/target beside d\n" in capsys.readouterr().err, command
    modules = [importlib.import_module(f"fspad_hf_cli.commands.{name.replace('-', '_')}") for name in cli.COMMANDS]
    takers = {n for n, m in zip(cli.COMMANDS, modules, strict=True) if "add_model_arguments" in vars(m)}
    assert takers == DRAFT_ALONE.keys()


@pytest.mark.parametrize(
    "command",
    [
        "train --target nope --data rows.npy --output out", "train --target d --start-from nope --data r --output out",
        "selfplay --target nope --output out", "demo --target nope", "demo --draft nope", "explain x --draft nope "
        "--output x.svg", "bench --draft nope --output out", "acceptance --target nope", "profile --target nope",
        "ablate --target nope --data rows.npy --output out", "verify --target nope", "chat --target nope",
    ],
)  # fmt: skip
def test_a_hub_that_cannot_be_reached_is_asked_once(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    asked = []

    def unreachable(url):
        asked.append(url)
        raise ConnectionRefusedError("nobody there")

    questions = tmp_path / "spec_bench_question.jsonl"
    questions.write_text('{"category": "qa", "turns": ["Why?"]}')
    monkeypatch.setenv("FSPAD_HF_CACHE", str(tmp_path))
    monkeypatch.setattr(runtime, "get_hf_file_metadata", unreachable)
    for loader in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        original = loader.from_pretrained

        def local(name, *args, original=original, **kwargs):
            assert Path(name).exists(), f"{name} was asked for"
            return original(name, *args, **kwargs)

        monkeypatch.setattr(loader, "from_pretrained", local)
    assert cli.main(command.split()) == 2
    said = capsys.readouterr().err
    assert len(asked) == 1 and said.count("error:") == 1 == len(said.splitlines()), said
    assert "'nope' is no folder here, is not in the cache, and the Hub cannot be asked for it (nobody there)" in said


def test_a_hub_that_answers_is_left_to_the_loaders(local_hub, tmp_path):
    runtime.check_reachable(tmp_path, "target")
    runtime.check_reachable("alice/nothing", "target")
    local_hub.create("alice/there", {"config.json": b"{}"})
    runtime.check_reachable("alice/there", "target")
    with pytest.raises(OSError, match="draft='a/b/c' is no folder here"):
        runtime.check_reachable("a/b/c", "draft")
