import functools
import gc
import io
import json
import time
import weakref
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from torch.autograd import DeviceType
from transformers import CompileConfig

from fspad_hf.evaluation import peers, profile_run
from fspad_hf.evaluation import profile as module
from fspad_hf.evaluation.forcing import forced, plan, total_tokens
from fspad_hf.evaluation.instrument import GRAPHS, PARTS, TIMED, Round, RoundClock, covered, device_busy, instrumented
from fspad_hf.evaluation.peers import MODES, Method
from fspad_hf.evaluation.profile import ProfileSettings, full_rounds, middle_half, profile
from fspad_hf.evaluation.profile_report import profile_tables, save_plot
from fspad_hf.evaluation.roofline import copy_bandwidth, weight_traffic
from fspad_hf.evaluation.shapes import random_draft, random_target
from fspad_hf.generation.cache import ArenaCache
from fspad_hf.generation.drafting import Drafter
from fspad_hf.generation.graphs import GraphRounds
from fspad_hf.generation.rounds import Rounds
from fspad_hf.generation.target import Target
from fspad_hf.generation.tree import CandidateTree
from fspad_hf_cli import main

from .. import tiny
from ..conftest import fresh_draft, rng_state

CPU = torch.device("cpu")
TREE = {"tree_depth": 3, "tree_top_k": 4, "tree_total_nodes": 12}
WRAPPED = [(owner, name) for owner, name, *_ in TIMED]
WRAPPED += [(Target, "_armed"), (ArenaCache, "append_to"), (Rounds, "run"), (GraphRounds, "_replayed")]


@pytest.fixture(scope="module")
def draft(llama):
    return fresh_draft(llama, **TREE)


@pytest.fixture(scope="module")
def models(llama, draft, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("profile")
    llama.save_pretrained(root / "target"), tokenizer.save_pretrained(root / "target")
    draft.save_pretrained(root / "draft", tokenizer=tokenizer)
    return root


@pytest.fixture
def small(monkeypatch):
    """A copy of a megabyte is bandwidth enough."""
    monkeypatch.setattr(module, "copy_bandwidth", lambda device: copy_bandwidth(device, 1 << 20))


def inputs_of(prompt):
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}


def answer(target, method, prompt, mode, tokens=40):
    return method.answer(target, inputs_of(prompt), mode, tokens, seed=5)


def functions():
    return [vars(owner)[name] for owner, name in WRAPPED]


@pytest.mark.parametrize("mode", MODES)
def test_tokens_and_generator_are_untouched_and_parts_add_up(llama, draft, prompt, mode, oracle):
    plain = answer(llama, Method("plain"), prompt, mode)
    state = rng_state(CPU)
    fast, clock = Method("FSPAD", {"assistant_model": draft}), RoundClock(CPU)
    with instrumented(clock):
        timed = answer(llama, fast, prompt, mode)
    assert torch.equal(timed.sequences, plain.sequences) and torch.equal(rng_state(CPU), state)
    assert timed.accepted_lengths == answer(llama, fast, prompt, mode).accepted_lengths
    rounds = clock.rounds()
    assert len(rounds) == len(timed.accepted_lengths) and [r.first for r in rounds] == [True] + [False] * (
        len(rounds) - 1
    )
    decoding = timed.seconds - timed.prefill_seconds
    assert 0.8 * decoding < sum(r.seconds for r in rounds) <= decoding
    for r in rounds[:-3]:
        assert r.levels == 3
        used = {part for part, seconds in r.parts.items() if seconds > 0}
        assert used == PARTS.keys() - {*GRAPHS.values()} - ({"noise"} if mode == "greedy" else set())


def test_a_slow_part_is_found(llama, draft, prompt, monkeypatch):
    """Each part gets the time that passes in it, and no other part does."""
    for owner, name, part, _ in TIMED[:9]:  # the tenth is of captured rounds
        original = vars(owner)[name]

        def slow(*args, _original=original, **kwargs):
            time.sleep(0.01)
            return _original(*args, **kwargs)

        clock = RoundClock(CPU)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, slow)
            with instrumented(clock):
                answer(llama, Method("FSPAD", {"assistant_model": draft}), prompt, "sampled", tokens=12)
        rounds = [r for r in clock.rounds()[1:] if r.levels == 3]
        slowed = {part for part in PARTS if min(r.parts[part] for r in rounds) > 0.009}
        assert slowed == {part} | ({"accept"} if part in ("levels", "compact") else set())  # they are called there too


def test_the_functions_are_themselves_again(llama, draft, prompt, monkeypatch):
    before = functions()
    with instrumented(RoundClock(CPU)), forced(2.0):
        assert all(now is not was for now, was in zip(functions(), before, strict=True))
    assert functions() == before

    class Broken(RuntimeError):
        pass

    def fails(*args, **kwargs):
        raise Broken

    clock = RoundClock(CPU)
    fast = Method("FSPAD", {"assistant_model": draft})
    with pytest.raises(Broken), instrumented(clock):
        answer(llama, Method("broken", {"assistant_model": draft, "logits_processor": [fails]}), prompt, "greedy")
    assert functions() == before
    with pytest.raises(Broken), instrumented(clock), monkeypatch.context() as patched:
        patched.setattr(Drafter, "_children", fails)
        answer(llama, fast, prompt, "greedy")
    assert functions() == before
    with instrumented(clock):  # and the clock goes on
        timed = answer(llama, fast, prompt, "greedy")
    assert sum(not r.first for r in clock.rounds()) == len(timed.accepted_lengths) - 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tau", "vocabulary"), [(1.0, None), (2.25, 20), (4.0, None)])
def test_tau_is_met_exactly(prompt, mode, tau, vocabulary):
    target = random_target(tiny.CONFIGS["llama"](), CPU, torch.float32)
    made = random_draft(target, **TREE, draft_vocab_size=vocabulary)
    method = module.fspad_method(made, tau, clock := RoundClock(CPU))
    with instrumented(clock):
        lengths = answer(target, method, prompt, mode, tokens=1 + total_tokens(tau, 20)).accepted_lengths
    assert len(lengths) == 20 and sum(lengths) == 20 * tau
    assert max(lengths) - min(lengths) <= 1
    assert sum(not r.first for r in clock.rounds()) == 19


def test_a_plan_follows_the_tree():
    tree = CandidateTree(*(torch.tensor([x]) for x in ([9, 0, 5, 7, 0, 1], [0, 0, 0, 2, 2, 3], [0, 1, 1, 2, 2, 3])))
    assert plan(tree, 1) == [1]  # 0 and 5 are children of the root
    assert plan(tree, 2) == [0, 0]
    assert plan(tree, 3) == [5, 7, 0]
    assert plan(tree, 9) == [5, 7, 1, 0]


def test_bytes_are_counted_by_hand(llama):
    made = fresh_draft(llama, **TREE, draft_vocab_size=16)
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    target = 2 * layer + 32 + 64 * 32  # the final norm and the head; the embedding is only gathered
    network = (2 * 32 * 32 + 32) + 32 + 3 * 32 * 48 + 4 * 32 * 32 + 32 + 2 * 32 * 48 + 48 * 64
    traffic = weight_traffic(llama, made)
    assert (traffic.target, traffic.draft, traffic.head) == (4 * target, 4 * network, 4 * 16 * 32)
    assert traffic.round == 4 * (target + 3 * (network + 16 * 32))
    config = tiny.CONFIGS["llama"]()
    config.tie_word_embeddings = True
    tied = random_target(config, CPU, torch.bfloat16)
    assert weight_traffic(tied, random_draft(tied, **TREE)).target == 2 * target  # read as the head all the same


def test_bandwidth_is_that_of_a_copy(monkeypatch):
    from fspad_hf.evaluation import roofline

    monkeypatch.setattr(roofline, "_seconds", lambda copy, source: 0.25)
    assert copy_bandwidth(CPU, 1 << 20) == 8 << 20
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.8)]) == 4


def test_the_gpus_busy_time_is_that_of_the_later_rounds(llama, draft, prompt, monkeypatch):
    """The arithmetic around torch.profiler, without a GPU."""
    calls = []

    def event(start, end, device=DeviceType.CUDA, annotation=False):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(time_range=span, device_type=device, is_user_annotation=annotation)

    events = [event(0, 4e6), event(2e6, 6e6), event(8e6, 9e6, DeviceType.CPU), event(0, 9e9, annotation=True)]
    fake = SimpleNamespace(
        start=lambda: calls.append("start"), stop=lambda: calls.append("stop"), events=lambda: events
    )
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    fast, answers = Method("FSPAD", {"assistant_model": draft}), []
    busy = device_busy(CPU, lambda clock: answers.append(answer(llama, fast, prompt, "greedy")))
    assert busy == 6 / (len(answers[0].accepted_lengths) - 1) and calls == ["start", "stop"]
    assert device_busy(CPU, lambda clock: answer(llama, fast, prompt, "greedy", tokens=1)) is None


def test_the_rounds_that_count():
    def made(milliseconds, first=False, levels=3):
        return Round({"host": milliseconds / 1e3}, first, levels)

    rounds = [made(50, first=True), *map(made, (5, 1, 2, 3, 4, 6, 7, 90)), made(1, levels=2)]
    full = full_rounds(rounds)
    assert len(full) == 8 and [round(r.seconds * 1e3) for r in middle_half(full)] == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="answers ended early"):
        full_rounds(rounds[:1])


def test_a_profile(llama, draft, prompt, small, monkeypatch):
    monkeypatch.setattr(peers, "CompileConfig", functools.partial(CompileConfig, backend="eager"))  # seconds
    settings = ProfileSettings(max_new_tokens=16, repeats=2, rows=(1, 5))
    result = profile(llama, draft, [inputs_of(prompt), inputs_of(prompt[:, :6])], settings)
    json.dumps(result, allow_nan=False)
    assert set(result) == {"rounds", "graph_rounds", "verify", "roofline", "speed"} and not result["graph_rounds"]
    for mode in MODES:
        found = result["rounds"][mode]
        assert set(found) == {"seconds", "parts", "timed", "used", "tau", "gpu_busy_seconds"}
        assert found["seconds"] == pytest.approx(sum(found["parts"].values())) and found["gpu_busy_seconds"] is None
        assert 1 <= found["used"] < found["timed"]
        rows = {row["method"]: row for row in result["speed"][mode]}
        assert (
            list(rows) == ["plain", "static+compile", "prompt lookup", "FSPAD eager"] and rows["plain"]["ratio"] == 1
        )
        assert all(r["error"] is None and min(r["token_seconds"], r["tokens_per_second"]) > 0 for r in rows.values())
        assert rows["FSPAD eager"]["tau"] == found["tau"] >= 1
        roof = result["roofline"]
        assert roof["fspad_tokens_per_second"][mode] == found["tau"] / roof["round_seconds"]
    assert roof["plain_token_seconds"] == roof["target_bytes"] / roof["bandwidth"]
    assert [cost["rows"] for cost in result["verify"]] == [1, 5] and all(c["seconds"] > 0 for c in result["verify"])


@pytest.mark.parametrize("tau", [None, 2.0])
def test_captured_rounds_beside_eager_ones(llama, prompt, small, captured, tau, tmp_path):
    draft = fresh_draft(llama, **TREE)
    settings = ProfileSettings(max_new_tokens=41, repeats=2, rows=(1,), methods=(), tau=tau)
    result = profile(llama, draft, [inputs_of(prompt)], settings)
    assert captured and not draft.speculation_config.cuda_graphs
    for mode in MODES:
        found, eager = result["graph_rounds"][mode], result["rounds"][mode]
        used = {part for part, seconds in found["parts"].items() if seconds}
        assert used - {"noise"} == {*GRAPHS.values(), "walk", "host"} and ("noise" in used) == (mode == "sampled")
        assert {part for part, seconds in eager["parts"].items() if seconds}.isdisjoint(GRAPHS.values())
        rows = {row["method"]: row for row in result["speed"][mode]}
        assert list(rows) == ["plain", "FSPAD eager", "FSPAD graph"]
        if tau is not None:
            assert found["tau"] == eager["tau"] == tau
    for title, table in profile_tables(result):
        Console(file=(shown := io.StringIO()), width=80).print(title, table)
        shown = shown.getvalue()
        assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
        assert ("verify graph" in shown) == (title == "A round as CUDA graphs")
        assert "at least" not in shown or "graph round" in shown
    save_plot(result, tmp_path / "rounds.svg")
    assert "T = 1, graph" in (tmp_path / "rounds.svg").read_text()


def test_a_failing_method_is_a_row_that_says_why(llama, draft, prompt, small, monkeypatch):
    original = Method.answer

    def fails(self, *arguments):
        if self.name in failing:
            raise RuntimeError("no such luck\nat all")
        return original(self, *arguments)

    monkeypatch.setattr(Method, "answer", fails)
    settings = ProfileSettings(max_new_tokens=12, repeats=1, methods=("prompt-lookup",), rows=(1,), modes=("greedy",))
    failing = ["prompt lookup"]
    plain, lookup, fast = profile(llama, draft, [inputs_of(prompt)], settings)["speed"]["greedy"]
    assert lookup["error"] == "RuntimeError: no such luck" and lookup["tokens_per_second"] is None
    assert plain["error"] is fast["error"] is None and fast["ratio"] > 0
    failing = ["FSPAD eager"]  # of what is nothing left to say
    with pytest.raises(RuntimeError, match="no such luck"):
        profile(llama, draft, [inputs_of(prompt)], settings)


def command(*options):
    return main(["profile", *(str(option) for option in options)])


QUICK = ["--repeats", "1", "--rows", "1", "4"]


def test_the_command_on_a_real_pair(models, tmp_path, capsys, small):
    pair = ["--target", models / "target", "--draft", models / "draft"]
    options = ["--prompt", "tell me", "--context", "60", "--max-new-tokens", "16", "--methods", "prompt-lookup"]
    assert command(*pair, *QUICK, *options, "--json", tmp_path / "out.json") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["tree"].values()) == [3, 4, 12, 0]
    assert 40 <= result["context"][0] <= 60 and result["dtype"] == "float32" and result["settings"]["seed"] == 0
    shown = capsys.readouterr().out
    for title in ("A round", "verify forward", "by its rows", "weights alone", "prompt lookup", "FSPAD eager"):
        assert title in shown
    assert "GPU" not in shown and not list(tmp_path.glob(".*"))


def test_the_command_on_a_shape(tmp_path, small, monkeypatch, capsys):
    tiny.CONFIGS["qwen3"]().save_pretrained(tmp_path)
    made, original = [], random_target
    monkeypatch.setattr(profile_run, "random_target", lambda *a: made.append(weakref.ref(m := original(*a))) or m)
    options = ["--shape", tmp_path / "config.json", "--tau", "2.5", "--rounds", "8", "--context", "20", "--methods"]
    more = ["--draft-vocab-size", "32", "--dtype", "bfloat16", "--device", "cpu", "--json", tmp_path / "out.json"]
    assert command(*options, *more, *QUICK) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["dtype"] == "bfloat16" and result["draft_vocab_size"] == 32 and result["context"] == [20]
    for mode in MODES:
        assert result["rounds"][mode]["tau"] == 2.5 and result["rounds"][mode]["timed"] == 8
        assert [row["method"] for row in result["speed"][mode]] == ["plain", "FSPAD eager"]
        assert result["speed"][mode][1]["tau"] == 2.5
    gc.collect()
    assert len(made) == 1 and made[0]() is None  # its memory is free


def test_the_plot(models, tmp_path, small):
    pytest.importorskip("matplotlib")
    options = ["--target", models / "target", "--draft", models / "draft", "--max-new-tokens", "12", "--methods"]
    assert command(*options, *QUICK, "--prompt", "a", "--plot", tmp_path / "parts.svg") == 0
    text = (tmp_path / "parts.svg").read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg") and "#ffffff" not in text and "verify forward" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_random_weights_are_whole(name, dtype, prompt):
    config = tiny.CONFIGS[name]()
    one, two = (random_target(config, CPU, dtype) for _ in range(2))
    assert {p.dtype for p in one.parameters()} == {dtype} and not one.training
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.isfinite(a).all() and torch.equal(a, b)
    reference = tiny.build(name, dtype=dtype)  # rotary tables and whatever else is no parameter
    assert dict(one.named_buffers()).keys() == dict(reference.named_buffers()).keys()
    for a, b in zip(one.buffers(), reference.buffers(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    with torch.no_grad():
        assert torch.isfinite(one(prompt).logits).all()
    made = random_draft(two, **TREE, draft_vocab_size=8)
    assert made.dtype == dtype and made.draft_vocab_ids.tolist() == list(range(8))
    assert all(torch.isfinite(p).all() and p.any() for n, p in made.named_parameters() if "bias" not in n)


SHAPE = ["--shape", "smollm2-135m"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--repeats", "0"], "repeats=0"), (["--rows", "4", "0"], "rows=[4, 0]"), (["--modes", "warm"], "['warm']"),
        (["--methods", "magic"], "methods=['magic']"), (["--max-new-tokens", "6"], "expected 9 or more"),
        (["--plot", "parts.png"], ".svg"), (["--json", "no/such/folder/x"], "no/such/folder"),
        (["--tau", "2"], "--tau"), (["--rounds", "9", "--draft-vocab-size", "8"], "--rounds, --draft-vocab-size"),
        (["--context", "0"], "context=0"),
        (SHAPE, "--tau 2.5"), ([*SHAPE, "--tau", "7.5"], "expected 1 to 7"), ([*SHAPE, "--tau", "nan"], "tau=nan"),
        ([*SHAPE, "--tau", "0.5"], "tau=0.5"), ([*SHAPE, "--tau", "2", "--prompt", "x"], "--prompt cannot"),
        ([*SHAPE, "--tau", "2", "--rounds", "2"], "--rounds"), ([*SHAPE, "--tau", "2", "--context", "9000"], "8192"),
        ([*SHAPE, "--tau", "2", "--methods", "prompt-lookup"], "leave it out"),
        (["--shape", "./nowhere"], "./nowhere"),
        ([*SHAPE, "--tau", "2", "--draft-vocab-size", "0"], "draft_vocab_size=0"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_work(options, said, capsys, monkeypatch, models):
    def never(*args, **kwargs):
        raise AssertionError("work was begun")

    for name in ("load_models", "profile", "random_draft"):
        monkeypatch.setattr(profile_run, name, never)
    pair = [] if "--shape" in options else ["--target", models / "target", "--draft", models / "draft"]
    extra = ["--tau", "2"] if options[0] == "--shape" and options[1] == "./nowhere" else []
    assert command(*pair, *options, *extra) == 2
    assert said in capsys.readouterr().err


def test_what_is_no_language_model_or_too_large_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert command("--shape", tmp_path, "--tau", "2") == 2
    assert "'t5' configuration" in capsys.readouterr().err
    from fspad_hf.evaluation import shapes

    monkeypatch.setattr(shapes, "_memory", lambda device: 2**30)
    assert command("--shape", "llama-3-8b", "--tau", "2", "--dtype", "bfloat16") == 2
    assert "take 15.0 GiB in bfloat16" in capsys.readouterr().err


def test_a_target_without_trees_is_refused(prompt, small):
    mpt = tiny.build("mpt", "eager")
    with pytest.raises(ValueError, match="nothing to time"):
        profile(mpt, fresh_draft(tiny.build("llama"), **TREE), [inputs_of(prompt)], ProfileSettings(max_new_tokens=9))
