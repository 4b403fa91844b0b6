import gc
import io
import json
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.autograd import DeviceType
from transformers import CompileConfig

from fspad_hf.evaluation import peers
from fspad_hf.evaluation import profile as module
from fspad_hf.evaluation.peers import MODES, Method
from fspad_hf.evaluation.profile import ProfileSettings, Watched, copy_bandwidth, profile
from fspad_hf.evaluation.profile_tables import profile_tables
from fspad_hf.evaluation.shapes import Decree, plan, random_pair, weight_bytes
from fspad_hf.evaluation.trace import PARTS, Round, Tracer, covered, middle_half, read_rounds
from fspad_hf.generation.cache import ArenaCache
from fspad_hf.generation.drafting import Drafter
from fspad_hf.generation.noise import NoiseQueue
from fspad_hf.generation.target import Target
from fspad_hf.generation.tree import CandidateTree
from fspad_hf_cli import main

from .. import tiny
from ..conftest import fresh_draft, rng_state

CPU = torch.device("cpu")
TREE = {"tree_depth": 3, "tree_top_k": 4, "tree_total_nodes": 12, "tree": "fixed"}


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


@pytest.mark.parametrize("mode", MODES)
def test_tokens_and_generator_are_untouched_and_parts_add_up(llama, draft, prompt, mode):
    plain = answer(llama, Method("plain"), prompt, mode)
    state = rng_state(CPU)
    timed, rounds = Watched(draft, None).traced(llama, inputs_of(prompt), mode, 40, 5)
    assert torch.equal(timed.sequences, plain.sequences) and torch.equal(rng_state(CPU), state)
    assert timed.accepted_lengths == answer(llama, Watched(draft, None), prompt, mode).accepted_lengths
    assert len(rounds) == 12 and {one.levels for one in rounds} == {3}
    for one in rounds:
        assert {part for part, seconds in one.parts.items() if seconds > 0} == PARTS.keys() - (
            {"noise"} if mode == "greedy" else set()
        )
        assert one.busy is None and 0 < one.seconds < 1


SLOW = (
    (Drafter, "_step", "network"), (NoiseQueue, "peek", "noise"),
    (Target, "_mask", "verify"), (ArenaCache, "keep", "keep"), (NoiseQueue, "draw", "emit"),
)  # fmt: skip


@pytest.mark.parametrize(("owner", "name", "part"), SLOW)
def test_a_slow_part_is_found(llama, draft, prompt, owner, name, part, monkeypatch):
    """Each part gets the time that passes in it, and no other part does."""
    original = vars(owner)[name]

    def slow(*args, **kwargs):
        with torch.profiler.record_function(f"fspad: {part}"):
            time.sleep(0.01)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)
    _, rounds = Watched(draft, None).traced(llama, inputs_of(prompt), "sampled", 24, 5)
    assert {part for part in PARTS if min(one.parts[part] for one in rounds) > 0.009} == {part}


def test_a_call_that_raises_stops_its_trace(llama, draft, prompt):
    """And the next one is traced again."""

    class Broken(RuntimeError):
        pass

    calls = []

    def fails(ids, scores):
        calls.append(len(ids))
        if len(calls) == 9:
            raise Broken
        return scores

    class Failing(Watched):
        def timer(self):
            timer = super().timer()
            self.arguments["logits_processor"] = [fails]
            return timer

    broken = Failing(draft, None)
    with pytest.raises(Broken):
        broken.traced(llama, inputs_of(prompt), "greedy", 30, 5)
    assert broken.tracer is None
    _, rounds = Watched(draft, None).traced(llama, inputs_of(prompt), "greedy", 30, 5)
    assert len(rounds) == 12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tau", "vocabulary"), [(1.0, None), (2.25, 20), (4.0, None)])
def test_tau_is_met_exactly(prompt, mode, tau, vocabulary):
    target, made = random_pair(tiny.CONFIGS["llama"](), CPU, torch.float32, {**TREE, "draft_vocab_size": vocabulary})
    lengths = answer(target, Watched(made, tau), prompt, mode, tokens=Decree.tokens(tau, 20)).accepted_lengths
    assert len(lengths) == 20 and sum(lengths) == 20 * tau
    assert max(lengths) - min(lengths) <= 1


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
    assert weight_bytes(llama, made) == {"target": 4 * target, "draft": 4 * network, "head": 4 * 16 * 32}
    config = tiny.CONFIGS["llama"]()
    config.tie_word_embeddings = True
    tied = random_pair(config, CPU, torch.bfloat16, TREE)
    assert weight_bytes(*tied)["target"] == 2 * target  # read as the head all the same


def test_bandwidth_is_that_of_a_copy(monkeypatch):
    monkeypatch.setattr(module.Stopwatch, "read", lambda self: 0.25)
    assert copy_bandwidth(CPU, 1 << 20) == 8 << 20
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.8)]) == 4


def test_a_gpus_rounds_are_read_from_its_own_time_line():
    """The arithmetic around torch.profiler, without a GPU. In microseconds."""

    def event(name, start, end, device=DeviceType.CUDA, annotation=True):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)

    host = [event(f"fspad: {name}", *span, DeviceType.CPU) for name, *span in (
        ("round", 0, 100), ("draft", 1, 10), ("head", 2, 4), ("head", 5, 6), ("round", 100, 150), ("verify", 101, 110),
    )]  # fmt: skip
    there = [event("fspad: draft", 5, 25), event("fspad: network", 10, 20), event("fspad: verify", 120, 140)]
    kernels = [event("k", *span, annotation=False) for span in ((5, 9), (8, 19), (120, 139), (160, 170))]
    first, second = read_rounds([*host, *there, *kernels])
    assert first.levels == 2 and first.busy == pytest.approx(14e-6) and first.seconds == pytest.approx(100e-6)
    wanted = {"draft": 10e-6, "network": 10e-6, "host": 80e-6}
    assert first.parts == pytest.approx(dict.fromkeys(PARTS, 0.0) | wanted)
    assert second.parts["verify"] == pytest.approx(20e-6) and second.busy == pytest.approx(19e-6)


def test_the_rounds_that_count():
    rounds = [Round({"host": ms / 1e3}, 3) for ms in (5, 1, 2, 3, 4, 6, 7, 90)]
    assert [round(one.seconds * 1e3) for one in middle_half(rounds)] == [3, 4, 5, 6]
    found = module._rounds([*rounds, Round({**dict.fromkeys(PARTS, 0.0), "host": 1e-3}, 2)][-1:], [2, 3])
    assert found["used"] == found["timed"] == 1 and found["tau"] == 2.5
    with pytest.raises(ValueError, match="answers ended early"):
        module._rounds([], [1])
    tracer = Tracer(CPU)
    assert tracer.read() == []  # of a call without a round


def test_a_profile(llama, draft, prompt, small, monkeypatch):
    monkeypatch.setattr(peers, "CompileConfig", lambda: CompileConfig(backend="eager"))  # seconds
    settings = ProfileSettings(max_new_tokens=24, repeats=2, rows=(1, 5))
    result = profile(llama, draft, [inputs_of(prompt), inputs_of(prompt[:, :6])], settings)
    json.dumps(result, allow_nan=False)
    assert set(result) == {"rounds", "graph_rounds", "verify", "roofline", "speed"} and not result["graph_rounds"]
    for mode in MODES:
        found = result["rounds"][mode]
        assert set(found) == {"seconds", "parts", "timed", "used", "tau", "gpu_busy_seconds"}
        assert found["seconds"] == pytest.approx(sum(found["parts"].values())) and found["gpu_busy_seconds"] is None
        assert 1 <= found["used"] < found["timed"] <= 48
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
def test_captured_rounds_beside_eager_ones(llama, prompt, small, captured, tau):
    draft = fresh_draft(llama, **TREE)
    settings = ProfileSettings(max_new_tokens=25, repeats=1, rows=(1,), methods=(), tau=tau)
    if tau is not None:
        llama, draft = random_pair(tiny.CONFIGS["llama"](), CPU, torch.float32, TREE)
    result = profile(llama, draft, [inputs_of(prompt)], settings)
    assert captured and not draft.speculation_config.cuda_graphs
    for mode in MODES:
        found, eager = result["graph_rounds"][mode], result["rounds"][mode]
        used = {part for part, seconds in found["parts"].items() if seconds}
        assert {"draft", "verify", "emit", "keep", "host"} <= used
        rows = {row["method"]: row for row in result["speed"][mode]}
        assert list(rows) == ["plain", "FSPAD eager", "FSPAD graph"]
        if tau is not None:
            assert found["tau"] == eager["tau"] == tau
    for title, table in profile_tables(result):
        Console(file=(shown := io.StringIO()), width=80).print(title, table)
        shown = shown.getvalue()
        assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
        assert "at least" not in shown or "graph round" in shown


def test_a_failing_method_is_a_row_that_says_why(llama, draft, prompt, small, monkeypatch):
    original = Method.answer

    def fails(self, *arguments):
        if self.name in failing:
            raise RuntimeError("no such luck\nat all")
        return original(self, *arguments)

    monkeypatch.setattr(Method, "answer", fails)
    settings = ProfileSettings(max_new_tokens=24, repeats=1, methods=("prompt-lookup",), rows=(1,), modes=("greedy",))
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
    options = ["--prompt", "tell me", "--context", "60", "--max-new-tokens", "24", "--methods", "prompt-lookup"]
    assert command(*pair, *QUICK, *options, "--json", tmp_path / "out.json") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["tree"].values()) == [3, 4, 12, 0]
    assert 40 <= result["context"][0] <= 60 and result["dtype"] == "float32" and result["settings"]["seed"] == 0
    shown = capsys.readouterr().out
    for title in ("A round", "verification forward", "by its rows", "weights alone", "prompt lookup", "FSPAD eager"):
        assert title in shown
    assert "GPU" not in shown and not list(tmp_path.glob(".*"))


def test_the_command_inside_the_mode(models, capsys, small, monkeypatch):
    inside, profile = [], module.profile

    def noted(model, *args):
        inside.append(any("forward" in vars(m) for m in model.modules()))
        return profile(model, *args)

    monkeypatch.setattr(module, "profile", noted)
    pair = ["--target", models / "target", "--draft", models / "draft", "--prompt", "tell me", "--methods"]
    for options in ((), ("--bit-exact",)):
        assert command(*pair, *QUICK, "--max-new-tokens", "24", "--modes", "greedy", *options) == 0
    assert inside == [False, True]


def test_the_command_on_a_shape(tmp_path, small, monkeypatch, capsys):
    tiny.CONFIGS["qwen3"]().save_pretrained(tmp_path)
    made, original = [], random_pair

    def noted(*args):
        pair = original(*args)
        made.extend(map(weakref.ref, pair))
        return pair

    monkeypatch.setattr(module, "random_pair", noted)
    options = ["--shape", tmp_path / "config.json", "--tau", "2.5", "--rounds", "8", "--context", "20", "--methods"]
    more = ["--draft-vocab-size", "32", "--dtype", "bfloat16", "--device", "cpu", "--json", tmp_path / "out.json"]
    assert command(*options, *more, *QUICK, "--tree-depth", "4") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["dtype"] == "bfloat16" and result["draft_vocab_size"] == 32 and result["context"] == [20]
    for mode in MODES:
        assert result["rounds"][mode]["tau"] == 2.5 and result["rounds"][mode]["timed"] >= 5
        assert [row["method"] for row in result["speed"][mode]] == ["plain", "FSPAD eager"]
        assert result["speed"][mode][1]["tau"] == 2.5
    gc.collect()
    assert len(made) == 2 and made[0]() is None  # its memory is free


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_random_weights_are_whole(name, dtype, prompt):
    config = tiny.CONFIGS[name]()
    (one, _), (two, made) = (random_pair(config, CPU, dtype, {**TREE, "draft_vocab_size": 8}) for _ in range(2))
    assert {p.dtype for p in one.parameters()} == {dtype} and not one.training
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.isfinite(a).all() and torch.equal(a, b)
    reference = tiny.build(name, dtype=dtype)  # rotary tables and whatever else is no parameter
    assert dict(one.named_buffers()).keys() == dict(reference.named_buffers()).keys()
    for a, b in zip(one.buffers(), reference.buffers(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    with torch.no_grad():
        assert torch.isfinite(one(prompt).logits).all()
    assert made.dtype == dtype and made.draft_vocab_ids.tolist() == list(range(8))
    assert all(torch.isfinite(p).all() and p.any() for n, p in made.named_parameters() if "bias" not in n)


SHAPE = ["--shape", "smollm2-135m"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--repeats", "0"], "repeats=0"), (["--rows", "4", "0"], "rows=[4, 0]"), (["--modes", "warm"], "['warm']"),
        (["--methods", "magic"], "methods=['magic']"), (["--max-new-tokens", "6"], "expected 9 or more"),
        (["--json", "no/such/folder/x"], "no/such/folder"),
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

    for name in ("load_models", "profile", "_fill_all"):
        monkeypatch.setattr(module, name, never, raising=False)
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


def test_a_target_that_verifies_nothing_is_refused(prompt, small):
    mamba = tiny.build("mamba", "eager")
    with pytest.raises(ValueError, match="nothing to time"):
        profile(
            mamba, fresh_draft(tiny.build("llama"), **TREE), [inputs_of(prompt)], ProfileSettings(max_new_tokens=12)
        )


@pytest.mark.parametrize("name", ["bloom", "qwen3_5_text"])
def test_chains(name, prompt, small):
    model = tiny.build(name, "eager")
    settings = ProfileSettings(max_new_tokens=24, repeats=1, methods=(), rows=(1, 3), modes=("greedy",))
    result = profile(model, fresh_draft(model, **TREE), [inputs_of(prompt)], settings)
    assert [cost["rows"] for cost in result["verify"]] == [1, 3] and result["rounds"]["greedy"]["tau"] >= 1
