import json
from types import SimpleNamespace

import pytest
import torch

from fspad_hf import bit_exact
from fspad_hf.evaluation import verify as module
from fspad_hf.evaluation.divergence import BitDifference, Divergence, first_different_bits
from fspad_hf.evaluation.verify import verify
from fspad_hf.generation import hook, rounds
from fspad_hf.generation.cache import ArenaCache
from fspad_hf.generation.noise import NoiseQueue
from fspad_hf.generation.probe import ProbeResult
from fspad_hf_cli import main

from .. import tiny
from ..conftest import fresh_draft

SHORT = {"prompts": ["tell me"], "seeds": [0, 1], "max_new_tokens": 16}


@pytest.fixture(scope="module")
def draft(llama):
    return fresh_draft(llama, tree_depth=3, tree_top_k=4, tree_total_nodes=12)


def test_the_battery_passes_and_speculates(llama, tokenizer, draft):
    checks = verify(llama, tokenizer, draft, **SHORT)
    assert len(checks) == 19 and all(check.passed and check.same == check.compared for check in checks)
    assert all(check.speculated == check.compared and check.rounds for check in checks)
    assert {check.compared for check in checks} == {1, 2}


def test_a_long_prompt_passes_the_window(tokenizer, draft):
    mistral = tiny.build("mistral")
    assert module._long_length(mistral, 16) == mistral.config.sliding_window + 64
    assert module._long_length(tiny.build("llama"), 16) == 64
    checks = verify(mistral, tokenizer, fresh_draft(mistral), ["tell me"], [0], 16)
    assert all(check.passed for check in checks)
    inputs = {"input_ids": torch.arange(9)[None]}
    longer = module.lengthen(inputs, 40)["input_ids"][0].tolist()
    assert longer[:3] == [0, 1, 2] and longer[-3:] == [6, 7, 8] and 36 < len(longer) <= 40


def test_a_broken_decoder_is_caught(llama, tokenizer, draft, monkeypatch):
    """No compaction: the cache keeps the tree's first slots, whichever path was accepted."""
    keep = ArenaCache.keep
    monkeypatch.setattr(ArenaCache, "keep", lambda self, slots: keep(self, [list(range(len(kept))) for kept in slots]))
    checks = verify(llama, tokenizer, draft, **SHORT)
    assert sum(check.real for check in checks) > 3
    bad = next(check for check in checks if check.real)
    assert not bad.passed and bad.differences[0]["plain_token"] != bad.differences[0]["other_token"]


def test_a_generator_left_elsewhere_is_caught(llama, tokenizer, draft, monkeypatch):
    draw = NoiseQueue.draw

    def extra(self, probabilities, *args):
        token = draw(self, probabilities, *args)
        self.at_end = getattr(self, "at_end", 0) + 1
        if self.at_end == 16:
            torch.rand(1)
        return token

    monkeypatch.setattr(NoiseQueue, "draw", extra)
    checks = {check.name: check for check in verify(llama, tokenizer, draft, **SHORT)}
    assert checks["greedy"].passed and not checks["T = 1.5"].passed
    assert {"random_state": "differs"}.items() <= checks["T = 1.5"].differences[0].items()


@pytest.mark.parametrize(("gap", "passed"), [(0.1, True), (0.9, False), (None, False)])
def test_half_precision_forgives_near_ties_alone(llama, tokenizer, monkeypatch, gap, passed):
    half = tiny.build("llama", dtype=torch.bfloat16)
    monkeypatch.setattr(module, "first_divergence", lambda *_, **__: Divergence(3, 5, 6, gap, 1))
    check = verify(half, tokenizer, fresh_draft(half), ["tell me"], [0], 4)[0]
    assert check.passed is passed and check.near_ties == int(passed) and check.real == int(not passed)
    check = verify(llama, tokenizer, fresh_draft(llama), ["tell me"], [0], 4)[0]
    assert not check.passed  # never in float32
    monkeypatch.setattr(llama, "hf_quantizer", SimpleNamespace(is_compileable=False), raising=False)
    check = verify(llama, tokenizer, fresh_draft(llama), ["tell me"], [0], 4)[0]
    assert check.passed is passed  # but where activations may be rounded on their way


def test_nothing_speculated_is_no_success(tokenizer, tmp_path, monkeypatch, capsys):
    llama = tiny.build("llama")
    llama.save_pretrained(tmp_path / "target"), tokenizer.save_pretrained(tmp_path / "target")
    monkeypatch.setattr(module, "probe", lambda model: ProbeResult("it is a bad day"))
    monkeypatch.setattr(hook, "probe", module.probe)
    fresh_draft(llama).save_pretrained(tmp_path / "draft", tokenizer=tokenizer)
    command = ["verify", "--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"), "--prompt", "tell"]
    assert main([*command, "--seeds", "1", "--max-new-tokens", "4"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "NOTHING VERIFIED: every answer ran without speculation, because it is a bad day" in shown
    assert "1 without speculation" in shown and "lossless" not in shown


def test_the_battery_covers_what_it_is_for(llama, tokenizer):
    settings = module.battery(llama, tokenizer, 16)
    given = {name for setting in settings for name, value in setting.arguments.items() if value not in (0, 1.0)}
    wanted = {"temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"}
    assert wanted | {"min_new_tokens", "stop_strings", "eos_token_id"} <= given
    for sampled in (False, True):
        mine = [setting for setting in settings if setting.arguments["do_sample"] is sampled]
        assert any(setting.long_prompt for setting in mine)
        assert any(len(setting.arguments.get("eos_token_id", ())) > 1 for setting in mine)


def test_a_broken_walk_fails_the_command(llama, tokenizer, draft, tmp_path, monkeypatch, capsys):
    """The walk steps to a child that was not drawn, as a decoder does that accepts what it guessed."""
    llama.save_pretrained(tmp_path / "target"), tokenizer.save_pretrained(tmp_path / "target")
    draft.save_pretrained(tmp_path / "draft", tokenizer=tokenizer)

    def gullible(tree, logits, emitters, paths, *_):
        node = 1 if tree.tokens.shape[1] > 1 else 0
        paths[0] += [0, node][: 1 + bool(node)]
        for row in paths[0]:
            if not emitters[0].finished:
                emitters[0].emit(logits[:, row])

    monkeypatch.setattr(rounds, "walk_and_emit", gullible)
    paths = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft")]
    assert main(["verify", *paths, "--prompt", "tell me", "--seeds", "1", "--max-new-tokens", "12"]) == 1
    shown = capsys.readouterr().out
    assert "DIFFERS: {'seed': 0, 'index':" in shown and "NOT LOSSLESS in float32" in shown


def test_the_command(llama, tokenizer, draft, tmp_path, monkeypatch, capsys):
    target, folder = tmp_path / "target", tmp_path / "draft"
    (
        llama.save_pretrained(target),
        tokenizer.save_pretrained(target),
        draft.save_pretrained(folder, tokenizer=tokenizer),
    )
    command = ["verify", "--target", str(target), "--draft", str(folder), "--prompt", "tell me", "--seeds", "1"]
    command += ["--max-new-tokens", "8", "--json", str(tmp_path / "rows.json")]
    assert main(command) == 0
    assert "lossless in float32: 19 of 19 answers identical" in capsys.readouterr().out
    assert all(row["passed"] for row in json.loads((tmp_path / "rows.json").read_text()))

    def broken(*_, **__):
        raise RuntimeError("lost\nin the woods")

    monkeypatch.setattr(module, "first_divergence", broken)
    assert main(command) == 1
    shown = capsys.readouterr().out
    assert "RuntimeError: lost" in shown and "NOT LOSSLESS" in shown
    for bad in (["--seeds", "0"], ["--max-new-tokens", "1"], ["--prompt", " "]):
        assert main([*command, *bad]) == 2


def test_bits_are_compared_and_the_first_layer_is_named(tokenizer, monkeypatch):
    half = tiny.build("llama", dtype=torch.bfloat16)
    draft = fresh_draft(half)
    with bit_exact(half):
        checks = verify(half, tokenizer, draft, ["tell me"], [0], 12, bits=True)
        assert all(check.passed and check.same == check.compared == check.speculated for check in checks)
        down = half.model.layers[1].mlp.down_proj
        plain = vars(down)["forward"]
        monkeypatch.setitem(vars(down), "forward", lambda x: plain(x) * (1 + 0.01 * (1 < x.shape[1] < 40)))
        check = verify(half, tokenizer, draft, ["tell me"], [0], 12, bits=True)[0]
        assert not check.passed and check.differences[0]["bits"]["layer"] == 2
        monkeypatch.undo()
    assert "bits" not in str(verify(half, tokenizer, draft, ["tell me"], [0], 12)[0].differences)


def test_the_command_is_bit_exact(llama, tokenizer, draft, tmp_path, capsys):
    llama.save_pretrained(tmp_path / "target"), tokenizer.save_pretrained(tmp_path / "target")
    draft.save_pretrained(tmp_path / "draft", tokenizer=tokenizer)
    command = [
        "verify",
        "--target",
        str(tmp_path / "target"),
        "--draft",
        str(tmp_path / "draft"),
        "--prompt",
        "tell me",
    ]
    command += ["--seeds", "1", "--max-new-tokens", "8", "--dtype", "bfloat16"]
    assert main([*command, "--bit-exact"]) == 0
    assert "lossless in bfloat16, bit for bit: 19 of 19 answers identical" in " ".join(capsys.readouterr().out.split())


def test_the_first_different_bits():
    def run(tokens, states, logits):
        hidden = [tuple(torch.full((1, 1, 4), float(x)) for x in layers) for layers in states]
        logits = [torch.full((1, 6), float(x)) for x in logits]
        return SimpleNamespace(sequences=torch.tensor([[7, *tokens]]), hidden_states=hidden, logits=logits)

    plain = run([1, 2], [(0, 1, 2), (0, 1, 2)], [5, 5])
    assert first_different_bits(plain, run([1, 2], [(0, 1, 2), (0, 1, 2)], [5, 5])) is None
    assert first_different_bits(plain, run([1, 2], [(0, 1, 2), (0, 3, 2)], [5, 6])) == BitDifference(1, 1, 4)
    assert first_different_bits(plain, run([1, 2], [(0, 1, 2), (0, 1, 2)], [6, 5])) == BitDifference(0, None, 6)
    assert first_different_bits(plain, run([3, 2], [(0, 1, 2), (9, 9, 9)], [5, 5])) is None  # of another text
