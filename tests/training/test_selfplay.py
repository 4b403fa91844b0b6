import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

import fspad_hf
from fspad_hf.training import decode_loop, shards
from fspad_hf.training.data import span_mask
from fspad_hf.training.decode_loop import SelfplayDecoder, TurnTables
from fspad_hf.training.exclusion import (
    fingerprint,
    is_excluded,
    load_excluded,
    normalised,
    spec_bench_fingerprints,
)
from fspad_hf.training.selfplay import RowFilter, SelfplayConfig, eos_ids, selfplay
from fspad_hf.training.templates import assistant_span, derive_glue, special_ids, template_sha256
from fspad_hf_cli import main, make_parser

from .. import tiny
from .chat import CHATML, TEMPLATES, chat_tokenizer, talker

QUESTIONS = Path(__file__).parents[3] / "shared/data/spec_bench/question.jsonl"


@pytest.fixture(scope="module")
def chatml():
    return talker()


def settings_of(**changes) -> SelfplayConfig:
    return SelfplayConfig(**{"rows": 8, "row_length": 160, "batch_rows": 6, "seed": 5, **changes})


def load(folder) -> np.ndarray:
    return np.concatenate([np.load(file) for file in sorted(folder.glob("*.npy"))])


def conversation_of(glue, tokenizer, row):
    """The finished turns of a row as messages, and whether an answer comes next."""
    turns = [turn for turn in glue.turns(row.tolist()) if turn[3]]
    return [{"role": role, "content": tokenizer.decode(row[a:b].tolist())} for role, a, b, _ in turns]


# the decode loop


@pytest.mark.parametrize("family", TEMPLATES)
def test_rows_obey_the_template(family, tmp_path):
    model, tokenizer = talker(family=family)
    glue = derive_glue(tokenizer)
    selfplay(model, tokenizer, tmp_path, settings_of(rows=4))
    answered = 0
    for row in load(tmp_path):
        messages = conversation_of(glue, tokenizer, row)
        rendered = tokenizer.decode(row.tolist())
        if family in ("chatml", "tagged"):  # the others trim what is said, or add a space to it
            again = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=messages[-1]["role"] == "user"
            )
            assert rendered.startswith(again) or again.startswith(rendered)
        rebuilt = list(glue.opening)
        for role, start, end, _ in glue.turns(row.tolist()):
            rebuilt += [*row[start:end].tolist(), *(glue.to_assistant if role == "user" else glue.to_user)]
            assert end > start or role == "assistant"
            assert role == "assistant" or not special_ids(tokenizer) & set(row[start:end].tolist())
        assert rebuilt[: len(row)] == row.tolist()
        answered += len(messages) // 2
    assert answered > 4


@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gemma3_text", "sdpa"), ("opt", "sdpa")]
)
def test_greedy_answers_are_those_of_plain_generate(name, attention):
    model, tokenizer = talker(name, attention=attention)
    glue, stops = derive_glue(tokenizer), eos_ids(model, tokenizer)
    tables = TurnTables(glue, stops, special_ids(tokenizer), 64, model.device)
    decoder = SelfplayDecoder(model, tables, 2, 110)
    checked = 0
    for seed in (0, 1):  # the second batch finds nothing of the first
        for row in decoder.rows([0.0] * 2, seed):
            for role, start, end, finished in glue.turns(row.tolist()):
                if role == "user" or end == start:
                    continue
                room = end - start + finished
                plain = model.generate(
                    row[None, :start], attention_mask=torch.ones(1, start), do_sample=False, max_new_tokens=room,
                    pad_token_id=0,
                )  # fmt: skip
                assert plain[0, start:].tolist() == row[start : start + room].tolist()
                checked += room
    assert checked > 20


def test_another_eos_closes_the_turn_in_the_template_s_own_way():
    tokenizer = chat_tokenizer("gemma")  # <eos> is not <end_of_turn>
    glue, eos = derive_glue(tokenizer), tokenizer.eos_token_id
    tables = TurnTables(glue, {eos}, special_ids(tokenizer), 64, "cpu")
    logits = torch.zeros(1, 64)
    logits[0, eos] = 9.0
    state, greedy = torch.tensor([tables.count + 2]), torch.zeros(1, 3)
    noise = torch.zeros(1, 64)  # as rare as it is, it must not make a greedy choice undefined
    written = []
    for _ in range(len(glue.to_user)):
        token, state = tables.advance(state, logits, noise, greedy)
        written.append(int(token))
    assert tuple(written) == glue.to_user and int(state) == tables.count


def test_a_user_s_turn_holds_no_special_token_and_is_not_empty():
    tokenizer = chat_tokenizer("chatml")
    glue = derive_glue(tokenizer)
    end, start = glue.to_assistant[0], glue.to_assistant[2]
    tables = TurnTables(glue, {end}, special_ids(tokenizer), 64, "cpu")
    logits = torch.zeros(1, 64)
    logits[0, [end, start, 7]] = torch.tensor([9.0, 8.0, 7.0])
    noise, greedy = torch.ones(1, 64), torch.zeros(1, 3)
    token, state = tables.advance(torch.tensor([tables.count]), logits, noise, greedy)
    assert int(token) == 7 and int(state) == tables.count + 1
    token, state = tables.advance(state, logits, noise, greedy)
    assert (int(token), int(state)) == (end, len(glue.opening) + 1)
    logits[0, end] = 0.0
    token, _ = tables.advance(torch.tensor([tables.count + 2]), logits, noise, greedy)
    assert int(token) == start  # an answer is the target's own, whatever it says


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_choices_follow_the_tempered_softmax(temperature):
    tokenizer = chat_tokenizer("chatml")
    tables = TurnTables(derive_glue(tokenizer), (), (), 64, "cpu")
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 64, generator=generator)
    rows = 40_000
    noise = torch.empty(rows, 64).exponential_(generator=generator)
    state = torch.full((rows,), tables.count + 2)
    mix = torch.tensor([[9.0, 9.0, temperature]]).expand(rows, 3)
    token, _ = tables.advance(state, logits.expand(rows, 64), noise, mix)
    seen = token.bincount(minlength=64) / rows
    assert (seen - (logits[0] / temperature).softmax(-1)).abs().max() < 0.01


def test_each_row_has_its_own_temperature(chatml, tmp_path):
    model, tokenizer = chatml
    glue = derive_glue(tokenizer)
    tables = TurnTables(glue, eos_ids(model, tokenizer), special_ids(tokenizer), 64, model.device)
    decoder = SelfplayDecoder(model, tables, 6, 160)

    def greedy_share(temperature: float) -> float:
        """How many of the answers' tokens are the likeliest ones, in rows that share a batch with greedy ones."""
        rows = decoder.rows([0.0, temperature] * 3, 7)[1::2]
        with torch.no_grad():
            best = model(rows).logits.argmax(-1)
        same = [
            rows[i, t] == best[i, t - 1]
            for i, row in enumerate(rows)
            for role, a, b, _ in glue.turns(row.tolist())
            if role == "assistant"
            for t in range(a, b)
        ]
        return float(torch.stack(same).float().mean())

    shares = [greedy_share(t) for t in (0.0, 0.3, 1.5)]
    assert shares[0] == 1.0 and shares[0] > shares[1] > shares[2] + 0.1
    manifest = selfplay(model, tokenizer, tmp_path, settings_of(temperatures=(0.0, 0.7)))
    totals = manifest["totals"]
    assert totals["rows"] == totals["rows_at_temperature_0"] + totals["rows_at_temperature_0.7"] >= 8
    assert min(totals["rows_at_temperature_0"], totals["rows_at_temperature_0.7"]) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_graph_writes_what_the_eager_step_writes(name):
    model, tokenizer = talker(name)
    model = model.cuda()
    tables = TurnTables(derive_glue(tokenizer), eos_ids(model, tokenizer), special_ids(tokenizer), 64, model.device)
    eager, graph = (SelfplayDecoder(model, tables, 6, 160, graph=captured) for captured in (False, True))
    for seed in (0, 1):
        assert torch.equal(graph.rows([0.0, 0.7, 1.0] * 2, seed), eager.rows([0.0, 0.7, 1.0] * 2, seed))


def test_a_target_that_cannot_be_captured_is_told_the_way_out(monkeypatch):
    model, tokenizer = talker()
    tables = TurnTables(derive_glue(tokenizer), (), (), 64, model.device)
    decoder = SelfplayDecoder(model, tables, 2, 160, graph=False)

    def refuses(step, device):
        step()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(decode_loop, "captured", refuses)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be captured .*capturing\): use graph=False"):
        decoder._captured()


def test_unfit_targets_are_refused():
    tokenizer = chat_tokenizer("chatml")
    tables = TurnTables(derive_glue(tokenizer), (), (), 64, "cpu")
    with pytest.raises(ValueError, match="MambaForCausalLM cannot be a target because"):
        SelfplayDecoder(tiny.build("mamba", "eager"), tables, 2, 64)


# shards and the manifest


def test_manifest(chatml, tmp_path):
    model, tokenizer = chatml
    manifest = selfplay(model, tokenizer, tmp_path, settings_of())
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    rows = load(tmp_path)
    assert rows.dtype == np.uint16 and rows.shape[1] == 160
    mask = span_mask(torch.from_numpy(rows.astype(np.int64)), *assistant_span(tokenizer))
    totals = manifest["totals"]
    assert (totals["rows"], totals["tokens"]) == (len(rows), rows.size) and totals["rows"] >= 8
    assert totals["assistant_tokens"] == int(mask.sum()) > 0
    made = totals["rows"] + sum(count for key, count in totals.items() if key.startswith("dropped"))
    assert made == 6 * len(manifest["shards"])
    assert manifest["versions"] == [
        {"fspad_hf": fspad_hf.__version__, "transformers": tf.__version__, "torch": torch.__version__}
    ]
    described = manifest["settings"]
    assert described["chat_template_sha256"] == template_sha256(tokenizer) and described["revision"] is None
    assert (described["seed"], described["temperatures"]) == (5, [0.0, 0.7, 1.0])
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("between", [False, True])
def test_a_killed_run_ends_as_an_uninterrupted_one(chatml, tmp_path, monkeypatch, between):
    model, tokenizer = chatml
    selfplay(model, tokenizer, tmp_path / "whole", settings_of(rows=16))
    steps = 0

    def kill(rows, tokens):
        nonlocal steps
        steps += 1
        if steps == 200:  # in the second batch
            raise KeyboardInterrupt

    def kill_before_manifest(path, value):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if between:  # a shard that no manifest names
            patch.setattr(shards, "write_json", kill_before_manifest)
        with pytest.raises(KeyboardInterrupt):
            selfplay(model, tokenizer, tmp_path / "cut", settings_of(rows=16), report=kill)
    assert len(list((tmp_path / "cut").glob("*.npy"))) == 1
    selfplay(model, tokenizer, tmp_path / "cut", settings_of(rows=9))
    selfplay(model, tokenizer, tmp_path / "cut", settings_of(rows=16))
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "cut").iterdir()) and len(names) > 3
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    finished = (tmp_path / "cut" / "manifest.json").stat().st_mtime_ns
    selfplay(model, tokenizer, tmp_path / "cut", settings_of(rows=3))
    assert (tmp_path / "cut" / "manifest.json").stat().st_mtime_ns == finished


def test_folders_that_disagree_are_refused(chatml, tmp_path):
    model, tokenizer = chatml
    selfplay(model, tokenizer, tmp_path, settings_of(rows=1))
    for changes in ({"seed": 6}, {"row_length": 120}, {"temperatures": (0.0,)}, {"batch_rows": 5}):
        (name,) = changes
        with pytest.raises(ValueError, match=f"other settings .{name} "):
            selfplay(model, tokenizer, tmp_path, settings_of(rows=1, **changes))
    other = chat_tokenizer("chatml", CHATML.replace("be nice", "be kind"))
    with pytest.raises(ValueError, match="chat_template_sha256"):
        selfplay(model, other, tmp_path, settings_of(rows=1))
    shard = tmp_path / "ids-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"ids-00000\.npy was changed"):
        selfplay(model, tokenizer, tmp_path, settings_of(rows=1))
    shard.unlink()
    with pytest.raises(ValueError, match=r"ids-00000\.npy is missing"):
        selfplay(model, tokenizer, tmp_path, settings_of(rows=1))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="not a manifest"):
        selfplay(model, tokenizer, tmp_path, settings_of(rows=1))
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "mine.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 'mine\.npy'"):
        selfplay(model, tokenizer, tmp_path, settings_of(rows=1))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        selfplay(model, tokenizer, tmp_path / "file", settings_of(rows=1))


def test_the_day_in_a_template_is_that_of_the_first_run(chatml, tmp_path):
    model, _ = chatml
    day = chat_tokenizer("chatml", "{% set day = '1' if day is undefined else day %}" + CHATML)
    selfplay(model, day, tmp_path, settings_of(rows=1))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["opening"] = [*manifest["opening"][:-1], manifest["opening"][0]]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    rows = manifest["totals"]["rows"]
    selfplay(model, day, tmp_path, settings_of(rows=rows + 1))
    assert load(tmp_path)[rows:, : len(manifest["opening"])].tolist()[0] == manifest["opening"]


# what may not be in them


def rows_of(tokenizer, glue, *chats, length=120):
    made = []
    for chat in chats:
        row = list(glue.opening)
        for number, text in enumerate(chat):
            row += tokenizer.encode(text, add_special_tokens=False)
            row += glue.to_user if number % 2 else glue.to_assistant
        made.append((row + [tokenizer.convert_tokens_to_ids("z")] * length)[:length])
    return np.array(made, dtype=np.uint16)


def test_what_is_dropped():
    tokenizer = chat_tokenizer("chatml")
    glue = derive_glue(tokenizer)
    keep = RowFilter(glue, tokenizer, ["who is it"])
    cases = [
        (["what", "this", "and", "that"], "kept"),
        (["what", "this", "and", "that"], "dropped_same_row"),
        (["WHAT".lower() + " ", "other"], "dropped_same_question"),  # white space aside
        (["and", "so"], "dropped_same_question"),  # a later turn of the first row
        (["new", "yes", "new", "no"], "dropped_same_question"),  # twice in one row
        (["new", "yes", "newer", "no"], "kept"),  # the row before was dropped, and its question with it
        (["tell me: who  is\nit?", "me"], "dropped_excluded"),
        (["the end is cut", "who is it"], "kept"),  # an answer may say so
    ]
    for row, (_, verdict) in zip(rows_of(tokenizer, glue, *(chat for chat, _ in cases)), cases, strict=True):
        assert keep.verdict(row) == verdict
    unanswered = rows_of(tokenizer, glue, [], length=60)[0]
    assert keep.verdict(unanswered) == "dropped_no_answer"
    cut = rows_of(tokenizer, glue, ["one", "two"], length=200)[0]
    at = len(cut) - 9
    cut[at:] = tokenizer.encode("who is it", add_special_tokens=False)
    assert keep.verdict(cut) == "dropped_excluded"  # although the row ends within the turn


def test_a_target_that_repeats_itself_is_refused(chatml, tmp_path):
    model, tokenizer = chatml
    with pytest.raises(ValueError, match="None of 6 rows of 160 tokens can stay"):
        selfplay(model, tokenizer, tmp_path, settings_of(rows=30, temperatures=(0.0,), user_temperature=0.0))
    assert len(list(tmp_path.glob("*.npy"))) <= 1


def test_excluded_prompts_do_not_come_through(chatml, tmp_path):
    model, tokenizer = chatml
    glue = derive_glue(tokenizer)
    free = selfplay(model, tokenizer, tmp_path / "free", settings_of())
    asked = conversation_of(glue, tokenizer, load(tmp_path / "free")[0])[0]["content"]
    phrase = normalised(asked)
    (tmp_path / "phrases.txt").write_text(f"\n  {phrase.upper()}\n")
    config = settings_of(exclude=[tmp_path / "phrases.txt"])
    made = selfplay(model, tokenizer, tmp_path / "kept", config)
    assert made["totals"]["dropped_excluded"] >= 1 and free["totals"]["dropped_excluded"] == 0
    for row in load(tmp_path / "kept"):
        questions = [m["content"] for m in conversation_of(glue, tokenizer, row) if m["role"] == "user"]
        assert not is_excluded(questions, [phrase])
    with pytest.raises(ValueError, match="excluded_"):
        selfplay(model, tokenizer, tmp_path / "free", config)


def test_excluded_files(tmp_path):
    questions = tmp_path / "question.jsonl"
    questions.write_text(json.dumps({"category": "qa", "turns": ["Who  is\nIt?", "And so?"]}) + "\n\n")
    (tmp_path / "a.txt").write_text("One  More\nwho is it?\n")
    assert load_excluded([questions, tmp_path / "a.txt"]) == ["who is it?", "and so?", "one more"]
    assert is_excluded(["hello", "Tell me, WHO is it? Now."], ["who is it?"]) and not is_excluded([], ["x"])
    for text, said in (
        ("", "no prompts"),
        ('{"turn": []}', "line 1"),
        ("[1]", "line 1"),
        ('{"turns": "x"}', "line 1"),
    ):
        questions.write_text(text)
        with pytest.raises(ValueError, match=said):
            load_excluded([questions])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": 0}, "rows=0"),
        ({"batch_rows": 0}, "batch_rows=0"),
        ({"row_length": 2}, "row_length=2"),
        ({"temperatures": ()}, "temperatures"),
        ({"temperatures": (-1.0,)}, "temperature -1.0"),
        ({"user_temperature": float("nan")}, "temperature nan"),
        ({"row_length": 30}, "row_length=30 does not fit: expected at least"),
        ({"row_length": 257}, "at most 256"),
    ],
)
def test_settings_that_make_no_sense(chatml, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        selfplay(*chatml, tmp_path / "x", settings_of(**changes))
    assert not (tmp_path / "x").exists()


def test_the_command(chatml, tmp_path, capsys):
    model, tokenizer = chatml
    target = str(tmp_path / "target")
    plain = tiny.build("llama")
    plain.lm_head.weight.data[list(eos_ids(model, tokenizer))] *= 3
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
    arguments = ["selfplay", "--target", target, "--output", str(tmp_path / "rows"), "--rows", "3"]
    arguments += ["--row-length", "250", "--batch-rows", "8", "--temperatures", "0", "1", "--device", "cpu"]
    assert main(arguments) == 0
    err = capsys.readouterr().err
    assert "tok/s" in err
    hint = make_parser().parse_args(shlex.split(err.splitlines()[-1])[1:])  # as it stands, on a line of its own
    assert (hint.target, hint.data, hint.output_dir) == (
        target,
        [str(tmp_path / "rows")],
        str(tmp_path / "rows-draft"),
    )
    assert json.loads((tmp_path / "rows" / "manifest.json").read_text())["settings"]["temperatures"] == [0.0, 1.0]
    assert main([*arguments, "--seed", "1"]) == 2 and "seed 0 -> 1" in capsys.readouterr().err
    assert main([*arguments, "--exclude", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_spec_bench_is_always_kept_out():
    """Prompts that anybody can read in MT-bench; the whole file is compared where it is at hand."""
    first = (
        "Compose an engaging travel blog post about a recent trip to Hawaii, highlighting cultural experiences and "
    )
    prompt = f"{first}must-see attractions."
    assert is_excluded(["Hello", f"  {prompt.upper()}\n"], []) and not is_excluded([first, "Hello"], [])
    if QUESTIONS.is_file():
        known = load_excluded([QUESTIONS])
        assert {fingerprint(prompt) for prompt in known} == spec_bench_fingerprints() and len(known) > 480
