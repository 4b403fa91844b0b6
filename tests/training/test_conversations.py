import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fspad_hf import FSPADDraftModel
from fspad_hf.training.conversations import conversation, load_conversations, tokenize
from fspad_hf.training.data import load_training_rows, span_mask
from fspad_hf.training.preview import TRAINED, preview
from fspad_hf.training.templates import TemplateProblem, assistant_span
from fspad_hf_cli import main

from .. import tiny
from .chat import CHAT, CHATML, TEMPLATES, chat_tokenizer, saved_target, talker, write_chats

TRUTH = {  # by hand: [[...]] is what the assistant writes
    "chatml": "<|im_start|>system\nbe nice<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    "[[yes?<|im_end|>]]\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n[[so \n.  so<|im_end|>]]\n",
    "llama3": "<|begin|><|header|>user<|end_header|>\n\nhi<|eot|><|header|>assistant<|end_header|>\n\n[[yes?<|eot|>]]"
    "<|header|>user<|end_header|>\n\nwhy<|eot|><|header|>assistant<|end_header|>\n\n[[so \n.  so<|eot|>]]",
    "gemma": "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n[[yes?<end_of_turn>]]\n"
    "<start_of_turn>user\nwhy<end_of_turn>\n<start_of_turn>model\n[[so \n.  so<end_of_turn>]]\n",
    "mistral": "<s>[INST] hi[/INST][[ yes?</s>]][INST] why[/INST][[ so \n.  so</s>]]",
}
TRUTH["tagged"] = TRUTH["chatml"]


def marked(tokenizer, ids, mask) -> str:
    """The text with [[ ]] around what the mask keeps."""
    text, before = "", False
    for token, inside in zip(ids, mask, strict=True):
        text += "[[" * (inside and not before) + "]]" * (before and not inside) + tokenizer.decode([token])
        before = inside
    return text + "]]" * before


# masks


@pytest.mark.parametrize("family", TRUTH)
def test_masks_against_a_truth_by_hand(family):
    tokenizer = chat_tokenizer(family)
    ids, mask = tokenize(tokenizer, CHAT)
    assert marked(tokenizer, ids, mask) == TRUTH[family]
    assert ids == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    spans = span_mask(torch.tensor([ids]), *assistant_span(tokenizer))[0].tolist()
    assert spans == mask  # rows of tokens and conversations agree


def test_a_system_turn_and_two_answers_in_a_row():
    tokenizer = chat_tokenizer("chatml")
    chat = [{"role": "system", "content": "be"}, CHAT[0], CHAT[1], CHAT[1]]
    ids, mask = tokenize(tokenizer, chat)
    assert marked(tokenizer, ids, mask) == (
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "[[yes?<|im_end|>]]\n<|im_start|>assistant\n[[yes?<|im_end|>]]\n"
    )


@given(
    st.lists(st.text("ab \n.", max_size=6), min_size=2, max_size=6), st.sampled_from(["chatml", "tagged", "llama3"])
)
@settings(max_examples=60, deadline=None)
def test_masks_keep_the_answers_and_nothing_else(said, family):
    tokenizer = chat_tokenizer(family)
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    ids, mask = tokenize(tokenizer, chat)
    kept = [part.split("]]")[0] for part in marked(tokenizer, ids, mask).split("[[")[1:]]
    end, trim = tokenizer.eos_token, str.strip if family == "llama3" else str
    assert kept == [trim(text) + end for text in said[1::2]]


def test_white_space_that_closes_a_turn_is_kept_if_nothing_else_does():
    tokenizer = chat_tokenizer("chatml", "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
                               "{% if add_generation_prompt %}a: {% endif %}")  # fmt: skip
    ids, mask = tokenize(tokenizer, CHAT[:2])
    assert marked(tokenizer, ids, mask) == "u: hi\na: [[yes?\n]]"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% generation %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endgeneration %}", "every token"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}", "no token"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "prompt_is_fine"),
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "otherwise than within"),
    ],
)
def test_templates_whose_masks_say_nothing_are_refused(template, said):
    tokenizer = chat_tokenizer("chatml", template)
    if said == "prompt_is_fine":  # nothing but the contents: still a mask of both kinds
        ids, mask = tokenize(tokenizer, CHAT[:2])
        assert marked(tokenizer, ids, mask) == "hi[[yes?]]"
        return
    with pytest.raises(TemplateProblem, match=said):
        tokenize(tokenizer, CHAT)


@pytest.mark.parametrize("family", TRUTH)
def test_an_unfinished_answer_trains_no_closing(family):
    tokenizer = chat_tokenizer(family)
    for said in ("so \n.  so", "so "):
        cut = {"role": "assistant", "content": said, "unfinished": True}
        chat = conversation({"messages": [*CHAT[:3], cut]}, "x")
        assert chat[-1] == cut
        ids, mask = tokenize(tokenizer, chat)
        told = TRUTH[family].replace("so \n.  so", said)
        expected = told[: told.index(said, told.index("why")) + len(said)]
        if "start_of_turn" in told or "eot" in told:  # these templates trim
            expected = expected.rstrip()
        assert marked(tokenizer, ids, mask) == expected + "]]"
    assert "unfinished" not in conversation({"messages": [{**CHAT[1], "unfinished": "no"}]}, "x")[0]
    tokenizer.chat_template = TEMPLATES[family][0].replace("m['content']", "m['content'] | upper")
    with pytest.raises(TemplateProblem, match="does not appear"):
        tokenize(tokenizer, [*chat[:3], cut])


def test_a_conversation_of_answers_alone_is_refused():
    tokenizer = chat_tokenizer("chatml", "{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    with pytest.raises(TemplateProblem, match="every token"):
        tokenize(tokenizer, [CHAT[1], CHAT[3]])


# records


def test_the_three_forms_of_a_record():
    share = {"id": 3, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}]}
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    for record in (
        {"messages": CHAT[:2], "source": "x"},
        share,
        {"prompt": "hi", "completion": "yes?"},
        {"prompt": CHAT[:1], "completion": CHAT[1:2]},
        {"messages": [{"role": "user", "content": parts}, CHAT[1]]},
    ):
        assert conversation(record, "x") == CHAT[:2]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([], "expected a JSON object"),
        ({"text": "hi", "id": 1}, r"the keys \['id', 'text'\]"),
        ({"prompt": "hi"}, r"the keys \['prompt'\]"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "`role` and `content`"),
        ({"messages": ["hi"]}, "the turn 'hi'"),
        ({"messages": [{"role": "narrator", "content": "hi"}]}, "a turn of 'narrator'"),
        ({"messages": [{"role": "user", "content": None}]}, "expected a text in `content`"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]},
            "cannot be trained on images or sound yet, only on text",
        ),
    ],
)
def test_other_records_are_refused(record, said, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n\n" + json.dumps(record))
    with pytest.raises(ValueError, match=r"a\.jsonl, record 2.*" + said):
        load_conversations(str(path))


def test_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    assert load_conversations(str(path)) == [CHAT]
    path.write_text('{"messages": []}\n{')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is not JSON"):
        load_conversations(str(path))
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        load_conversations(str(path))
    for missing in ("b.jsonl", "c.txt"):
        (tmp_path / "c.txt").write_text("hi")
        with pytest.raises(ValueError, match="is no data to train on"):
            load_conversations(str(tmp_path / missing))


def test_files_that_datasets_reads(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = datasets.Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[:2]}])
    made.to_parquet(str(tmp_path / "a.parquet"))
    assert load_conversations(str(tmp_path / "a.parquet")) == [CHAT, CHAT[:2]]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": CHAT}]))
    assert load_conversations(str(tmp_path / "a.json")) == [CHAT]
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"b\.parquet' cannot be read"):
        load_conversations(str(tmp_path / "b.parquet"))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or made)
    assert len(load_conversations("user/chats", "test")) == 2
    assert asked == [(("user/chats",), {"split": "test"})]


def test_without_datasets_the_command_names_the_extra(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    tiny.build("llama").save_pretrained(tmp_path)
    chat_tokenizer("chatml").save_pretrained(tmp_path)
    assert main(["train", "--target", str(tmp_path), "--data", "user/chats", "--output", str(tmp_path / "x")]) == 2
    assert "fspad_hf[train]" in capsys.readouterr().err


# rows


def test_conversations_become_rows(tmp_path):
    tokenizer = chat_tokenizer("gemma")
    chats = write_chats(tmp_path / "a.jsonl")
    rows = load_training_rows([tmp_path / "a.jsonl"], tokenizer, row_length=128)
    found = []
    for row in range(len(rows.ids)):
        for segment in range(1, int(rows.segments[row].max()) + 1):
            here = rows.segments[row] == segment
            found.append((rows.ids[row, here].tolist(), rows.mask[row, here].tolist()))
    expected = [tokenize(tokenizer, chat[: len(chat) // 2 * 2]) for chat in chats]  # no unanswered turn at the end
    assert sorted(found) == sorted(expected)
    assert rows.held_out == len(rows.ids) // 20 and rows[[0] * 30_000].held_out == 512
    again = load_training_rows([tmp_path / "a.jsonl"], tokenizer, row_length=128)
    assert torch.equal(again.ids, rows.ids)
    (tmp_path / "no.txt").write_text(f"{chats[1][0]['content'].upper()}\n")
    fewer = load_training_rows([tmp_path / "a.jsonl"], tokenizer, row_length=128, exclude=[tmp_path / "no.txt"])
    dropped = [chat for chat in chats if any("why 1" in m["content"] for m in chat if m["role"] == "user")]
    assert 1 < len(dropped) < len(chats)  # "why 13" contains it, too
    lost = sum(sum(tokenize(tokenizer, chat[: len(chat) // 2 * 2])[1]) for chat in dropped)
    assert fewer.mask.sum() == rows.mask.sum() - lost


def test_bad_rows(tmp_path):
    tokenizer = chat_tokenizer("gemma")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "system", "content": "be"}, *CHAT]}))
    with pytest.raises(TemplateProblem, match=r"a\.jsonl, record 1: .*System role not supported"):
        load_training_rows([path], tokenizer)
    path.write_text(json.dumps({"messages": CHAT[:1]}))
    with pytest.raises(ValueError, match="holds no answer within 1024 tokens"):
        load_training_rows([path], tokenizer)
    path.write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(ValueError, match="holds no answer within 9 tokens"):
        load_training_rows([path], tokenizer, row_length=9)
    with pytest.raises(ValueError, match="row_length=7"):
        load_training_rows([path], tokenizer, row_length=7)
    np.save(tmp_path / "b.npy", np.zeros((2, 30), dtype=np.uint16))
    with pytest.raises(ValueError, match="not both"):
        load_training_rows([path, tmp_path / "b.npy"], tokenizer)
    with pytest.raises(ValueError, match="no token of data"):
        load_training_rows([tmp_path / "b.npy"], tokenizer)
    (tmp_path / "no.txt").write_text("x")
    with pytest.raises(ValueError, match="exclude works on conversations"):
        load_training_rows([tmp_path / "b.npy"], tokenizer, exclude=[tmp_path / "no.txt"])
    np.save(tmp_path / "b.npy", np.zeros((0, 30), dtype=np.uint16))
    with pytest.raises(ValueError, match="holds no rows"):
        load_training_rows([tmp_path / "b.npy"], tokenizer)
    with pytest.raises(ValueError, match=r"token id 5[0-9], the target has 20"):
        load_training_rows([path], tokenizer, vocab_size=20)


def test_a_folder_of_another_template_is_refused(tmp_path):
    from fspad_hf.training.selfplay import SelfplayConfig, selfplay

    model, tokenizer = talker()
    selfplay(model, tokenizer, tmp_path, SelfplayConfig(rows=3, row_length=160, batch_rows=6))
    rows = load_training_rows([tmp_path], tokenizer)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert len(rows.ids) == manifest["totals"]["rows"] and rows.segments is None
    assert int(rows.mask.sum()) == manifest["totals"]["assistant_tokens"]
    for other in (chat_tokenizer("gemma"), chat_tokenizer("chatml", CHATML.replace("nice", "kind"))):
        with pytest.raises(ValueError, match="another chat template"):
            load_training_rows([tmp_path], other)


# the command


def test_preview_colours_what_is_trained():
    tokenizer = chat_tokenizer("chatml")
    ids, mask = (torch.tensor(x) for x in tokenize(tokenizer, CHAT))
    text = preview(tokenizer, ids, mask)
    assert text.plain == TRUTH["chatml"]
    coloured = [text.plain[span.start : span.end] for span in text.spans if span.style == TRAINED]
    assert coloured == ["[[yes?<|im_end|>]]", "[[so \n.  so<|im_end|>]]"]
    assert len(preview(tokenizer, ids, mask, most=9).plain) < len(text.plain)


def test_the_command_trains_on_conversations(tmp_path, capsys):
    saved_target(tmp_path / "target", chat_tokenizer("gemma"))
    write_chats(tmp_path / "a.jsonl", 80)
    arguments = f"train --target {tmp_path}/target --data {tmp_path}/a.jsonl --output {tmp_path}/draft --steps 2"
    arguments = [*arguments.split(), "--row-length", "128", "--batch-rows", "4", "--micro-rows", "2"]
    assert main([*arguments, "--draft-vocab-size", "20"]) == 0
    printed = capsys.readouterr().out
    assert "<start_of_turn>model" in printed and "step 2/2" in printed
    draft = FSPADDraftModel.from_pretrained(tmp_path / "draft")
    assert chat_tokenizer("gemma").eos_token_id not in draft.draft_vocab_ids  # padding is not counted
    (tmp_path / "a.jsonl").write_text('{"question": "x"}')
    assert main(arguments) == 2 and "['question']" in capsys.readouterr().err
