import json

import numpy as np
import pytest
import torch

from fspad_hf.training import regenerate as regeneration
from fspad_hf.training.conversations import load_conversations, tokenize
from fspad_hf.training.regenerate import regenerate
from fspad_hf_cli import main

from .chat import CHAT, chat_tokenizer, saved_target, talker, write_chats


@pytest.fixture
def answering():
    return talker(family="gemma")


def chats():
    return [CHAT, CHAT[:2], [CHAT[2], CHAT[3], CHAT[0], CHAT[1], CHAT[2]], CHAT[2:]]


@pytest.mark.parametrize("longest", [40, 5])
def test_regenerated_answers_are_those_of_plain_generate(answering, tmp_path, longest):
    model, tokenizer = answering
    files = regenerate(model, tokenizer, chats(), tmp_path, max_new_tokens=longest, batch_rows=3, row_length=250)
    made = [messages for file in files for messages in load_conversations(str(file))]
    assert len(made) == len(chats()) and len(files) == 2
    answers = cut = 0
    for messages, asked in zip(made, chats(), strict=True):
        for number, message in enumerate(messages):
            assert message["role"] == asked[number]["role"]
            if message["role"] == "user":
                assert message["content"] == asked[number]["content"]
                continue
            prompt = tokenizer.apply_chat_template(
                messages[:number], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            stop = tokenizer.eos_token_id
            plain = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=longest, do_sample=False,
                pad_token_id=0, eos_token_id=stop,
            )[0, prompt.shape[1] :]  # fmt: skip
            assert message["content"] == tokenizer.decode(plain, skip_special_tokens=True)
            finished = plain[-1] == stop
            assert ("unfinished" not in message) == finished
            assert finished or number == len(messages) - 1  # an answer cut short is the last
            ids, mask = tokenize(tokenizer, messages[: number + 1])
            assert mask[-1] != finished and (finished or ids[-1] != stop)
            cut += not finished
            answers += 1
        assert messages[-1]["role"] == "assistant"
    assert answers > len(made) and (cut > 0) == (longest == 5)
    tokenized = [tokenize(tokenizer, messages) for messages in made]
    assert all(any(mask) for _, mask in tokenized)


def test_half_a_character_is_no_part_of_an_answer_cut_short(answering, monkeypatch):
    answerer = regeneration._Answerer(*answering, 0.0, 8, 250)
    said = [[("a b", True), ("ab\ufffd", False), ("\ufffd", False)], [("c", True)]]
    monkeypatch.setattr(answerer, "_generate", lambda prompts: said.pop(0))
    first, second, third = answerer.answer([CHAT, CHAT, CHAT])
    assert [message["content"] for message in first] == ["hi", "a b", "why", "c"]
    assert second == [CHAT[0], {"role": "assistant", "content": "ab", "unfinished": True}] and third == []


def test_regeneration_resumes_and_refuses(answering, tmp_path):
    model, tokenizer = answering
    options = {"temperature": 1.0, "max_new_tokens": 12, "batch_rows": 1, "row_length": 250}
    state = torch.get_rng_state()
    regenerate(model, tokenizer, chats(), tmp_path / "whole", **options)
    assert torch.equal(torch.get_rng_state(), state)

    def kill(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regenerate(model, tokenizer, chats(), tmp_path / "cut", **options, report=kill)
    assert len(list((tmp_path / "cut").glob("*.jsonl"))) == 2
    reached = []
    regenerate(model, tokenizer, chats(), tmp_path / "cut", **options, report=reached.append)
    assert reached == [2, 3, 4]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()
    for name, value in (("temperature", 0.5), ("seed", 1), ("max_new_tokens", 13)):
        with pytest.raises(ValueError, match=f"other settings .{name}"):
            regenerate(model, tokenizer, chats(), tmp_path / "cut", **{**options, name: value})
    with pytest.raises(ValueError, match="temperature=-1"):
        regenerate(model, tokenizer, chats(), tmp_path / "x", temperature=-1)
    with pytest.raises(ValueError, match="None of 4 conversations is left"):
        regenerate(model, tokenizer, chats(), tmp_path / "x", excluded=["hi", "why"])
    files = regenerate(model, tokenizer, chats(), tmp_path / "less", **options, excluded=["hi"])
    assert [load_conversations(str(file))[0][0]["content"] for file in files] == ["why"]
    short = regenerate(model, tokenizer, chats(), tmp_path / "short", **{**options, "row_length": 8})
    assert short == [] and json.loads((tmp_path / "short" / "manifest.json").read_text())["totals"] == {
        "conversations": 0, "answers": 0, "dropped_too_long": 4,
    }  # fmt: skip


def test_the_command_regenerates_once(tmp_path, capsys):
    saved_target(tmp_path / "target", chat_tokenizer("gemma"))
    write_chats(tmp_path / "a.jsonl", 6)
    arguments = f"train --target {tmp_path}/target --data {tmp_path}/a.jsonl --output {tmp_path}/draft --steps 1"
    arguments = [*arguments.split(), "--row-length", "128", "--batch-rows", "2", "--micro-rows", "2"]
    arguments += ["--regenerate", "--regenerate-tokens", "8"]
    assert main(arguments) == 0
    (made,) = (tmp_path / "draft" / "regenerated").glob("*.jsonl")
    stamp = made.stat().st_mtime_ns
    assert main(arguments) == 0 and made.stat().st_mtime_ns == stamp
    capsys.readouterr()
    np.save(tmp_path / "b.npy", np.zeros((2, 30), dtype=np.uint16))
    arguments[arguments.index("--data") + 1] = str(tmp_path / "b.npy")
    assert main(arguments) == 2 and "only conversations can be regenerated" in capsys.readouterr().err
