import json
import re

import pytest
import torch

from fspad_hf import runtime
from fspad_hf.generation.drafting import Drafter
from fspad_hf.generation.target import Target
from fspad_hf.generation.tree import TreeShape
from fspad_hf.loading import encode_chat
from fspad_hf.modeling_fspad import FSPADDraftOutput
from fspad_hf.training import acceptance
from fspad_hf.training.acceptance import (
    KnownNoise,
    draft_chains,
    known_continuations,
    mean_tau,
    measure_acceptance,
    simulate,
)
from fspad_hf_cli import main

from .. import tiny
from ..conftest import fresh_draft, grown


@pytest.mark.parametrize("mode", ["greedy", "coupled", "uncoupled"])
@pytest.mark.parametrize("eos", [None, 2])
@pytest.mark.parametrize("drafted", [None, 32])
@pytest.mark.parametrize("at_once, lookup", [(64, 0), (7, 0), (7, 6)])
def test_simulation_equals_decoding_round_for_round(llama, prompt, mode, eos, drafted, at_once, lookup, monkeypatch):
    monkeypatch.setattr(acceptance, "TREES_AT_ONCE", at_once)
    fields = {"tree_depth": 4, "tree_top_k": 4, "tree_total_nodes": 15, "draft_vocab_size": drafted}
    fields["tree_lookup_tokens"] = lookup
    draft = fresh_draft(llama, coupled_drafting=mode == "coupled", **fields)
    if drafted:
        draft.draft_vocab_ids = torch.arange(1, 64, 2)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for weight in (*draft.layer.self_attn.parameters(), draft.layer.mlp.down_proj.weight):
            torch.nn.init.normal_(weight, std=0.4)  # a fresh draft hardly attends to anything
    kwargs = {"do_sample": mode != "greedy", "max_new_tokens": 40, "eos_token_id": eos}
    if mode != "greedy":
        kwargs |= {"temperature": 1.0, "top_k": 0}
    seen = accepted = 0
    for seed in range(3):
        torch.manual_seed(seed)
        out = llama.generate(prompt, assistant_model=draft, return_dict_in_generate=True, **kwargs)
        noise = KnownNoise(seed, 50, 64, prompt.device) if mode == "coupled" else None
        length = prompt.shape[1]
        record = simulate(llama, draft, out.sequences, length, length + 40, noise, ends=[] if eos is None else [eos])
        assert record.accepted_lengths == out.speculation.accepted_lengths
        seen, accepted = seen + record.rounds, accepted + sum(record.accepted_lengths)
    assert seen and (mode != "coupled" or accepted > 1.2 * seen)


def test_measure(llama, tokenizer):
    draft = fresh_draft(llama, tree_depth=3, tree_top_k=4, tree_total_nodes=12)
    rows = measure_acceptance(llama, tokenizer, draft, [("qa", "why"), ("rag", "who")], max_new_tokens=20)
    assert {row["mode"] for row in rows} == {"greedy", "coupled", "uncoupled"} and len(rows) == 6
    taus, mean = mean_tau(rows, "greedy")
    assert set(taus) == {"qa", "rag"} and mean == pytest.approx(sum(taus.values()) / 2) and mean >= 1
    assert draft.speculation_config.coupled_drafting is None
    for row in rows:  # what decoding would have recorded, the noise of that very prompt included
        inputs = encode_chat(tokenizer, [{"role": "user", "content": ("why", "who")[row["prompt"]]}])
        torch.manual_seed(row["prompt"])
        draft.speculation_config.coupled_drafting = row["mode"] == "coupled"
        out = llama.generate(
            **inputs, assistant_model=draft, do_sample=row["mode"] != "greedy", top_k=0, max_new_tokens=20,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert row["accepted_lengths"] == out.speculation.accepted_lengths
    drafted = {row["mode"]: row["accepted_lengths"] for row in rows if row["prompt"] == 1}
    assert drafted["coupled"] != drafted["uncoupled"]


def test_the_command_tells_how_far_it_is_when_piped(llama, tokenizer, tmp_path, capsys):
    llama.save_pretrained(tmp_path / "target"), tokenizer.save_pretrained(tmp_path / "target")
    fresh_draft(llama, tree_depth=2, tree_top_k=2, tree_total_nodes=4).save_pretrained(tmp_path, tokenizer=tokenizer)
    asked = [{"category": c, "turns": [f"{c} {n}"]} for c in ("rag", "summarization") for n in range(11)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    command = ["acceptance", "--target", tmp_path / "target", "--draft", tmp_path, "--device", "cpu"]
    command += ["--questions", tmp_path / "questions.jsonl", "--per-task", "11", "--max-new-tokens", "4"]
    assert main([*map(str, command), "--json", str(tmp_path / "rows.json")]) == 0
    shown = capsys.readouterr()
    lines = re.findall(r"^answers simulated (\d+)/44, \d+ s left$", shown.err, re.MULTILINE)
    assert len(lines) == 20 and lines[-1] == "44" and [int(n) for n in lines] == sorted(map(int, lines))
    assert max(map(len, shown.out.splitlines())) <= 80  # and nothing is cut
    assert re.search(r"T = 0 +T = 1, coupled +T = 1, uncoupled", shown.out)
    figures = {name: line.split() for line in shown.out.splitlines() for name in line.split()[:1]}
    assert all(len(figures[name]) == 4 for name in ("summarization", "rag", "mean"))
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 66


def test_chains_are_those_of_engines_without_trees(tokenizer, tmp_path, capsys):
    llama = tiny.build("llama")
    llama.generation_config.eos_token_id = llama.config.eos_token_id = None
    llama.save_pretrained(tmp_path / "target"), tokenizer.save_pretrained(tmp_path / "target")
    draft = fresh_draft(llama, draft_vocab_size=16)
    draft.save_pretrained(tmp_path, tokenizer=tokenizer)
    (tmp_path / "questions.jsonl").write_text(json.dumps({"category": "rag", "turns": ["why"]}))
    command = ["acceptance", "--target", tmp_path / "target", "--draft", tmp_path, "--device", "cpu"]
    command += ["--questions", tmp_path / "questions.jsonl", "--max-new-tokens", 200, "--json", tmp_path / "rows.json"]
    assert main([*map(str, command), "--chain", "0"]) == 2 and "--chain 0: expected 1" in capsys.readouterr().err
    assert main([*map(str, command), "--chain", "3"]) == 0
    greedy = json.loads((tmp_path / "rows.json").read_text())[0]["accepted_lengths"]
    draft_chains(draft, 3)  # of all ids
    inputs = encode_chat(tokenizer, [{"role": "user", "content": "why"}])
    kwargs = {"do_sample": False, "max_new_tokens": 200, "return_dict_in_generate": True}
    assert greedy == llama.generate(**inputs, assistant_model=draft, **kwargs).speculation.accepted_lengths
    shown = capsys.readouterr().out
    for at in (1, 2, 3):
        share = sum(length > at for length in greedy) / len(greedy)
        assert float(re.search(rf"accepted at {at} +(\S+)", shown)[1]) == pytest.approx(share, abs=1e-3)
    assert max(greedy) > 1


def test_durations():
    said = [runtime.duration(seconds) for seconds in (0.4, 59, 65.2, 3599.6, 7800)]
    assert said == ["0 s", "59 s", "1 min 05 s", "1 h 00 min", "2 h 10 min"]


def test_batched_continuations_are_what_plain_generate_makes(llama):
    prompts = [torch.tensor([[1, 17, 5, 40, 9][:n]]) for n in (5, 2, 4, 3)]
    plain, seeds = {"max_new_tokens": 30, "pad_token_id": 0}, [3, 1, 4, 2]
    for sampled in (False, True):
        made = dict(known_continuations(llama, prompts, 30, seeds if sampled else None, batch_size=3))
        for number, prompt in enumerate(prompts):
            torch.manual_seed(seeds[number])
            truth = llama.generate(prompt, do_sample=sampled, temperature=1.0, top_k=0, top_p=1.0, **plain)
            assert made[number].tolist() == truth.tolist()
        lengths = {made[number].shape[1] - prompts[number].shape[1] for number in made}
        assert not sampled or min(lengths) < 30  # some end with EOS


@pytest.mark.parametrize("coupled", [True, False])
@torch.no_grad()
def test_trees_side_by_side_are_those_of_decoding(llama, coupled):
    draft = fresh_draft(llama, coupled_drafting=coupled)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for weight in (*draft.layer.self_attn.parameters(), draft.layer.mlp.down_proj.weight):
            torch.nn.init.normal_(weight, std=0.4)
        ids, shape = torch.randint(3, 64, (1, 14)), TreeShape(4, 5, 30)
        noise = torch.empty(16, 64).exponential_() if coupled else None
    features = llama.model(ids).last_hidden_state
    many, places = Drafter(draft, Target(llama)), range(3, 12)
    read = many.accept(features[:, :-1], ids[:, 1:])
    read = FSPADDraftOutput(read.logit_features[:, 3:12], read.features[:, 3:12])
    rows = torch.stack([noise[level : level + 9] for level in range(4)]) if coupled else None
    trees = many.grow_at(read, torch.tensor([list(places)]), shape, rows)
    for number, place in enumerate(places):
        one, root = Drafter(draft, Target(llama)), ids[:, [place + 1]]
        alone = one.accept(features[:, : place + 1], ids[:, 1 : place + 2])
        seen = noise[number : number + 4, None] if coupled else None
        expected, made = grown(one, alone, root, shape, seen), trees.best(root, number).trimmed()
        for part in ("tokens", "parents", "depths"):
            assert getattr(made, part).tolist() == getattr(expected, part).tolist(), (place, part)
        torch.testing.assert_close(made.scores, expected.scores, atol=1e-4, rtol=1e-4)
