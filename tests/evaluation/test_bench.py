import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from huggingface_hub import ModelCard
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from rich.console import Console
from transformers import CompileConfig

from fspad_hf import FSPADConfig
from fspad_hf.cards import make_card, read_results
from fspad_hf.evaluation import bench, peers, report
from fspad_hf.evaluation import run as bench_run
from fspad_hf.evaluation.divergence import Divergence
from fspad_hf.evaluation.peers import Method
from fspad_hf.evaluation.report import results_table
from fspad_hf.generation import hook
from fspad_hf_cli import main

from .. import tiny
from ..conftest import fresh_draft


@pytest.fixture(scope="module")
def models(llama, tokenizer, tmp_path_factory):
    """A target, a draft and four questions on disk."""
    root = tmp_path_factory.mktemp("bench")
    llama.save_pretrained(root / "target"), tokenizer.save_pretrained(root / "target")
    draft = fresh_draft(llama, tree_depth=3, tree_top_k=4, tree_total_nodes=12)
    draft.save_pretrained(root / "draft", tokenizer=tokenizer)
    questions = [{"category": "writing", "turns": ["one", "and two"]}, {"category": "stem", "turns": ["three", "x"]}]
    questions += [{"category": c, "turns": [f"{c} what"]} for c in ("qa", "rag")]
    (root / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return root


@pytest.fixture
def run(models, tmp_path):
    def call(*options, output="out", code=0):
        paths = ["--target", models / "target", "--draft", models / "draft", "--questions", models / "questions.jsonl"]
        command = ["bench", *paths, "--output", tmp_path / output, "--max-new-tokens", "12", *options]
        assert main([str(part) for part in command]) == code
        return tmp_path / output

    return call


def records(folder):
    return json.loads((folder / "results.json").read_text())["records"]


def test_every_method_turn_and_mode(run, models, capsys):
    folder = run(
        "--methods", "prompt-lookup", "fspad", "--assistant", models / "target", "--draft", f"two={models}/draft"
    )
    found = records(folder)
    methods = ["plain", "prompt lookup", "assisted", "FSPAD", "two"]
    assert [r["method"] for r in found[:5]] == methods and len(found) == 2 * 5 * (2 + 2 + 1 + 1)
    for r in found:
        assert r["error"] is None and 0 < r["prefill_seconds"] <= r["seconds"] and 1 <= r["new_tokens"] <= 12
        assert sum(r["accepted_lengths"]) <= r["new_tokens"]
        if r["method"] in ("plain", "FSPAD", "two"):
            assert sum(r["accepted_lengths"]) == r["new_tokens"] - 1
        lossless = r["method"] in ("FSPAD", "two") or (r["mode"] == "greedy" and r["method"] != "plain")
        assert r["identical"] is (True if lossless else None)
    assert {tuple(r["accepted_lengths"]) for r in found if r["method"] == "plain"} <= {(1,) * n for n in range(12)}
    assert any(max(r["accepted_lengths"], default=0) > 1 for r in found if r["method"] == "assisted")
    second = [r["prompt_tokens"] for r in found if r["question"] == 1 and r["turn"] == 1 and r["mode"] == "greedy"]
    first = next(r for r in found if r["question"] == 1 and r["mode"] == "greedy")
    assert set(second) == {second[0]} and second[0] > first["prompt_tokens"] + len("and two")
    shown = capsys.readouterr().out
    assert "FSPAD gave plain generate's tokens in 24 of 24 answers." in shown


def test_the_report_and_its_plots(run, models):
    folder = run("--methods", "prompt-lookup", "fspad")
    text = (folder / "report.md").read_text()
    plots = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert (
        len(plots) == 10
        and "| T = 1 | FSPAD |" in text
        and "| Seconds in all | prefill |" in text
        and "Machine: device" in text
    )
    for alt, plot in re.findall(r"!\[(.*?)\]\((.*?)\)", text):
        root = ElementTree.parse(folder / plot).getroot()
        assert root[0].tag.endswith("}title") and root[0].text == alt and ", T = " in alt
        assert root.tag.endswith("svg") and "#ffffff" not in (folder / plot).read_text()  # no white card on black
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["trees"] == {"FSPAD": [3, 4, 12]} and results["questions"] == 4
    card = read_results(folder / "results.json")
    taus = results["figures"]["greedy"]["FSPAD"]["tasks"]
    assert {task: values["tau"] for task, values in card.tasks.items()} == {
        t: f["tau"]["value"] for t, f in taus.items()
    }
    assert card.settings["mode"] == "T = 0" and set(card.measured) == {"tau", "speedup"}
    config = FSPADConfig.from_pretrained(models / "draft")
    made = make_card(models / "draft", "alice/x", config, "alice/target", card)
    made.save(folder / "README.md")
    read = ModelCard.load(folder / "README.md")
    assert read.data.to_dict() == made.data.to_dict()
    shown = {(r.dataset_config, r.metric_type): r.metric_value for r in read.data.eval_results}
    assert shown == {(t, m): f[m]["value"] for t, f in taus.items() for m in ("tau", "speedup")}
    assert not list(folder.glob(".*"))


def contrast(first, second):
    """Of two colours, as the accessibility guidelines (WCAG 2) define it."""
    lights = []
    for colour in (first, second):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        lights.append(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05)
    return max(lights) / min(lights)


def measured(low, high, lengths):
    figure = {"value": 1.4, "low": low, "high": high}
    return {"tasks": {"qa": {"speedup": figure}}, "mean": {"speedup": figure}, "accepted_lengths": lengths}


def test_error_bars_stand_out_from_their_bars_and_from_the_page():
    methods = {f"draft {i}": measured(1.2, 1.7, {1: 2, 2: 1}) for i in range(len(report.COLOURS))}
    (axes,) = report.grouped_bars(methods, "speedup", "speed-up", 1.0).axes
    top = max(artist.get_zorder() for artist in (*axes.patches, axes.lines[-1]))  # the last line is the baseline
    found = [made for made in axes.containers if isinstance(made, ErrorbarContainer)]
    assert len(found) == len(methods)
    for _, caps, (bars,) in found:
        assert len(caps) == 2 and bars.get_zorder() > top and all(cap.get_zorder() > top for cap in caps)
        for artist in (bars, *caps):
            assert artist.get_path_effects()[0]._gc["linewidth"] > 2 * bars.get_linewidth()[0]
    for behind in (*report.COLOURS, "#ffffff", "#0d1117"):
        assert max(contrast(report.ERROR, behind), contrast(report.HALO, behind)) > 3


@pytest.mark.parametrize(("lengths", "last"), [({"1": 5, "2": 2, "3": 1}, 3), ({1: 5, 4: 2, 17: 1}, 10)])
def test_the_histogram_of_lengths_begins_at_1(lengths, last):
    """Of counts as a bench has them, and as results.json does."""
    (axes,) = report._histogram({"FSPAD": measured(1, 2, lengths)}).axes
    assert axes.get_xticks().tolist() == [*range(1, last + 1)] and axes.get_xlim() == (0.5, last + 0.5)


def test_an_interrupted_run_goes_on(run, monkeypatch):
    asked = []
    ask = bench.Bench.ask

    def interrupted(self, question, order=0):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(question.number)
        return ask(self, question, order)

    monkeypatch.setattr(bench.Bench, "ask", interrupted)
    folder = run("--modes", "greedy", "--methods", "fspad", code=130)
    assert len({r["question"] for r in records(folder)}) == 2  # what there is, is reported
    with (folder / "records.jsonl").open("a") as file:
        file.write('[{"question": 4')  # cut off in the middle of a write
    monkeypatch.setattr(bench.Bench, "ask", lambda self, q, order=0: asked.append(q.number) or ask(self, q, order))
    run("--modes", "greedy", "--methods", "fspad")
    assert sorted(asked) == [1, 2, 3, 4] and {r["question"] for r in records(folder)} == {1, 2, 3, 4}
    run("--modes", "greedy", "--methods", "fspad")
    assert len(asked) == 4  # all done: nothing is asked again


def kept(folder):
    timed = ("seconds", "prefill_seconds")
    return [{name: value for name, value in r.items() if name not in timed} for r in records(folder)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_signalled_ends_as_one_that_was_not(run, models, tmp_path, number):
    options = ["--methods", "prompt-lookup", "fspad", "--tasks", "mt_bench", "qa", "rag"]
    whole = kept(run(*options, output="whole"))
    paths = ["--target", models / "target", "--draft", models / "draft", "--questions", models / "questions.jsonl"]
    command = [sys.executable, "-m", "fspad_hf", "bench", *paths, "--output", tmp_path / "cut", "--max-new-tokens", 12]
    begun = subprocess.Popen(
        [str(part) for part in (*command, *options)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    for line in begun.stderr:
        if re.match(r"question 1 of 4, .*\d s left$", line):
            begun.send_signal(number)
            break
    begun.communicate()
    lines = (tmp_path / "cut" / "records.jsonl").read_text().splitlines()
    assert 1 <= len(lines) < 4 and begun.returncode == (130 if number == signal.SIGINT else -number)
    assert (tmp_path / "cut" / "report.md").is_file() is (number == signal.SIGINT)
    assert kept(run(*options, output="cut")) == whole


def test_other_questions_are_not_mixed_in(run, models, tmp_path, capsys):
    run("--modes", "greedy", "--methods", "fspad")
    other = tmp_path / "other.jsonl"
    other.write_text((models / "questions.jsonl").read_text().replace("three", "four"))
    run("--modes", "greedy", "--methods", "fspad", "--questions", other, code=2)
    assert "asked" in capsys.readouterr().err


def test_half_precision_tells_a_difference_and_does_not_fail(run, models, monkeypatch, capsys):
    found = [Divergence(3, 5, 6, gap, 1) for gap in (0.1, 0.1, 3.0, None)]
    monkeypatch.setattr(bench, "first_divergence", lambda *_, **__: found.pop())
    run("--modes", "greedy", "--methods", "fspad", "--turns", "1", "--dtype", "bfloat16")
    shown = " ".join(capsys.readouterr().out.split())
    assert "0 of 4 answers; 2 part at near ties" in shown and "2 by more than rounding explains: NOT LOSSLESS" in shown


def test_a_difference_that_cannot_be_weighed_is_still_one(run, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "first_divergence", full)
    folder = run("--modes", "greedy", "--methods", "fspad", "--turns", "1", code=1)
    assert "OutOfMemoryError: CUDA out of memory" in (folder / "report.md").read_text()


def test_an_answer_without_speculation_is_told(run, monkeypatch, capsys):
    monkeypatch.setattr(hook, "why_not", lambda *_: "it is a bad day")
    folder = run("--modes", "greedy", "--methods", "fspad", "--turns", "1")
    assert {r["speculated"] for r in records(folder)} == {None, False}
    assert "(4 of them without speculation" in " ".join(capsys.readouterr().out.split())


def test_an_assistant_with_another_tokenizer(run, pair, tokenizer, tmp_path):
    # `pair` has no EOS: our template's prompt ends in one, and transformers 5.17's own assistance then stops at once
    other = type(tokenizer).from_pretrained(pair["target"])
    other.add_tokens(["the", "and", "of"])
    small = tiny.build("llama")
    small.resize_token_embeddings(len(other))
    small.save_pretrained(tmp_path / "small"), other.save_pretrained(tmp_path / "small")
    options = ["--target", pair["target"], "--draft", pair["draft"], "--assistant", tmp_path / "small"]
    found = records(run("--modes", "greedy", "--methods", "fspad", "--turns", "1", *options))
    assisted = [r for r in found if r["method"] == "assisted"]
    assert len(assisted) == 4 and all(r["error"] is None and r["identical"] for r in assisted)


def test_tokens_after_eos_do_not_count(llama):
    made = bench.Bench(llama, None, [], None)
    assert made._count(torch.tensor([5, 2, 7, 2])) == 2 and made._count(torch.tensor([5, 7])) == 2


def test_the_table_fits_80_columns():
    figures = {"tokens_per_second": 12345.6, "speedup": 10.25, "tau": 12.34}
    mean = {name: {"value": value, "low": 10.11, "high": 12.22} for name, value in figures.items()}
    shown = {"mean": mean, "lossless": {"same": 479, "compared": 480}, "errors": {}}
    failed = {
        "mean": None,
        "lossless": {"same": 0, "compared": 0},
        "errors": {"OutOfMemoryError: CUDA out of memory": 3},
    }
    console = Console(file=io.StringIO(), width=80)
    methods = {"my draft of the fine-tuned target, at step 1000": shown, "static+compile": failed}
    console.print(results_table({"sampled": methods}, "title"))
    printed = console.file.getvalue()
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed
    for text in ("T = 1", "12345.6", "10.25x", "10.11 - 12.22", "12.34", "479/480", "failed", "identical"):
        assert f" {text} " in printed, text


def test_the_live_table_in_a_terminal(run, monkeypatch):
    console = Console(force_terminal=True, width=80, height=40, file=io.StringIO(), color_system=None)
    monkeypatch.setattr(bench_run, "Console", lambda *_, **__: console)
    monkeypatch.setattr(bench_run, "SECONDS_A_REFRESH", 0)
    run("--methods", "prompt-lookup", "fspad", "--turns", "1")
    shown = console.file.getvalue()
    assert "questions" in shown and "4/4" in shown and shown.count("prompt lookup") > 4
    assert re.search(r"0/4 .* left .*\d:\d\d:\d\d", shown)  # the time left is there before a question is done
    assert shown.rstrip().endswith("out/report.md")


def test_other_settings_are_not_mixed_in(run, capsys):
    run("--modes", "greedy", "--methods", "fspad")
    before = capsys.readouterr()
    folder = run("--modes", "greedy", "--methods", "fspad", "--seed", "5", code=2)
    assert "(seed 0 -> 5)" in capsys.readouterr().err and before and len(records(folder)) == 12


def test_a_difference_fails_the_run(run, monkeypatch, capsys):
    answer = Method.answer

    def wrong(self, *arguments):
        made = answer(self, *arguments)
        if self.name == "FSPAD":
            sequences = made.sequences.clone()
            sequences[0, -1] += 1
            made = peers.Answer(sequences, made.seconds, made.prefill_seconds, made.accepted_lengths)
        return made

    monkeypatch.setattr(Method, "answer", wrong)
    folder = run("--modes", "greedy", "--methods", "fspad", "--turns", "1", code=1)
    assert "0 of 4 answers: NOT LOSSLESS" in capsys.readouterr().out
    divergences = [r["divergence"] for r in records(folder) if r["method"] == "FSPAD"]
    assert len(divergences) == 4
    assert all(d["other_token"] == d["plain_token"] + 1 and d["gap"] > 0 for d in divergences)


def test_a_failing_method_is_a_row_that_says_why(run, monkeypatch, capsys):
    answer = Method.answer

    def fails(self, target, inputs, *rest):
        if self.name == "prompt lookup":
            raise RuntimeError("no such luck\nat all")
        if self.name == "FSPAD" and inputs["input_ids"].shape[1] == length and rest[1] == 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(self, target, inputs, *rest)

    length = None
    folder = run("--modes", "greedy", "--methods", "fspad", output="first")
    length = next(r["prompt_tokens"] for r in records(folder) if r["task"] == "rag")
    monkeypatch.setattr(Method, "answer", fails)
    folder = run("--modes", "greedy", "--methods", "prompt-lookup", "fspad")
    errors = {(r["method"], r["task"]): r["error"] for r in records(folder) if r["error"]}
    assert errors.pop(("FSPAD", "rag")) == "OutOfMemoryError: CUDA out of memory"
    assert set(errors.values()) == {"RuntimeError: no such luck"} and {method for method, _ in errors} == {
        "prompt lookup"
    }
    assert "prompt lookup does not run here: RuntimeError: no such luck" in capsys.readouterr().out
    assert "| prompt lookup | failed: RuntimeError: no such luck" in (folder / "report.md").read_text()
    assert "prompt lookup failed on" in (folder / "report.md").read_text()


def test_static_cache_and_compile(run, monkeypatch):
    monkeypatch.setattr(
        peers, "CompileConfig", functools.partial(CompileConfig, backend="eager")
    )  # seconds, not minutes
    found = records(run("--modes", "greedy", "--methods", "compile", "--turns", "1"))
    compiled = [r for r in found if r["method"] == "static+compile"]
    assert len(compiled) == 4 and all(r["error"] is None and r["identical"] for r in compiled)


def test_own_prompts_without_a_template(run, models, tmp_path, llama, tokenizer, capsys):
    bare = type(tokenizer).from_pretrained(models / "target")
    bare.chat_template = None
    llama.save_pretrained(tmp_path / "bare"), bare.save_pretrained(tmp_path / "bare")
    (tmp_path / "own.jsonl").write_text('{"prompt": "tell me"}\n')
    options = [
        "--modes",
        "greedy",
        "--methods",
        "fspad",
        "--prompts",
        tmp_path / "own.jsonl",
        "--target",
        tmp_path / "bare",
    ]
    run(*options, code=2)
    assert "has no chat template: pass --raw-prompts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    found = records(run(*options, "--raw-prompts"))
    assert {r["task"] for r in found} == {"prompts"} and found[0]["prompt_tokens"] == len("tell me")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "magic"], "methods=['magic']"), (["--methods", "assistant"], "--assistant"),
        (["--modes", "warm"], "modes=['warm']"), (["--tasks", "cooking"], "cooking"), (["--turns", "0"], "turns=0"),
        (["--draft", "plain=x"], "the name 'plain' is taken"),
        (["--questions", "no.jsonl"], "'no.jsonl' cannot be read"),
        (["--output", "/dev/null/x"], "output='/dev/null/x' cannot be written"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"), (["--per-task", "0"], "per_task=0"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_work(run, tmp_path, capsys, options, said):
    run(*options, code=2)
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_missing_package_is_told_before_the_work(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = run(code=2)
    said = capsys.readouterr().err.strip()
    assert "pip install 'fspad_hf[bench]'" in said and "\n" not in said and not folder.exists()


def test_bit_exact_excuses_nothing_and_names_the_layer(run, monkeypatch):
    options = ("--dtype", "bfloat16", "--bit-exact", "--methods", "prompt-lookup", "fspad", "--turns", "1")
    found = json.loads((run(*options) / "results.json").read_text())
    assert found["config"]["bit_exact"] and found["exact"] and found["lossless"]
    assert all(r["identical"] for r in found["records"] if r["method"] == "FSPAD")

    class Broken(bench.Bench):
        def prepare(self, questions):
            down = self.target.model.layers[1].mlp.down_proj
            plain = vars(down)["forward"]
            vars(down)["forward"] = lambda x: plain(x) * (1 - 2 * (1 < x.shape[1] < 16))
            super().prepare(questions)

    monkeypatch.setattr(bench_run, "Bench", Broken)
    folder = run(*options, output="broken", code=1)
    found = [r["divergence"]["bits"] for r in records(folder) if (r["method"], r["identical"]) == ("FSPAD", False)]
    assert found and {bits["layer"] for bits in found} == {2}
    assert "bits from layer 2 of token" in (folder / "report.md").read_text()
