import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fspad_hf import FSPADDraftModel
from fspad_hf.cli import main
from fspad_hf.training.conversations import conversation, load_conversations, tokenize
from fspad_hf.training.data import load_training_rows, span_mask
from fspad_hf.training.packing import pack, segment_mask, segment_positions
from fspad_hf.training.preview import TRAINED, preview
from fspad_hf.training.regenerate import regenerate
from fspad_hf.training.templates import TemplateProblem, assistant_span
from fspad_hf.training.trainer import TargetFeatures, TrainingConfig, draft_loss, train, warm_start

from .. import tiny
from ..conftest import fresh_draft
from .chat import CHATML, chat_tokenizer

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "so \n.  so"},
]
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


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(8, 24))
@settings(max_examples=80, deadline=None)
def test_packing_keeps_every_document_whole_and_apart(lengths, row_length):
    documents = [([number + 1] * n, [(number + i) % 3 == 0 for i in range(n)]) for number, n in enumerate(lengths)]
    ids, mask, segments = pack(documents, row_length, padding=0)
    assert ids.shape == mask.shape == segments.shape and ids.shape[1] == row_length
    seen = {}
    for row in range(len(ids)):
        last = int(segments[row].max())
        inside = segments[row][segments[row] > 0].tolist()
        assert inside == sorted(inside) and set(inside) == set(range(1, last + 1))  # in order, padding after them
        assert not segments[row, len(inside) :].any() and not mask[row, len(inside) :].any()
        assert not ids[row, len(inside) :].any()
        for segment in range(1, last + 1):
            here = segments[row] == segment
            (number,) = set(ids[row, here].tolist())
            assert number not in seen
            seen[number] = mask[row, here].tolist()
    assert seen == {number + 1: document[1][:row_length] for number, document in enumerate(documents)}
    used = sum(min(n, row_length) for n in lengths)
    assert len(ids) <= max(1, 2 * used / row_length + 1)  # two rows at most half full would have been one


def test_positions_and_masks_of_segments():
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 3, 3]])
    assert segment_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]]
    seen = segment_mask(segments, torch.float32) == 0
    assert seen.shape == (2, 1, 6, 6)
    for row in range(2):
        for query in range(6):
            for key in range(6):
                same = segments[row, query] == segments[row, key]
                assert seen[row, 0, query, key] == (same and key <= query)
    assert (segment_mask(segments, torch.float32, 2) == 0)[0, 0, 2].tolist() == [
        False,
        True,
        True,
        False,
        False,
        False,
    ]


def write_chats(path, count=30):
    words = ["hi", "why", "so what", "and then?", "a long one, not too long", "ok"]
    chats = [
        [{"role": ("user", "assistant")[i % 2], "content": f"{words[(n + i) % 6]} {n}"} for i in range(2 + n % 3)]
        for n in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return chats


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

    from .test_selfplay import talker

    model, tokenizer = talker()
    selfplay(model, tokenizer, tmp_path, SelfplayConfig(rows=3, row_length=160, batch_rows=6))
    rows = load_training_rows([tmp_path], tokenizer)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert len(rows.ids) == manifest["totals"]["rows"] and rows.segments is None
    assert int(rows.mask.sum()) == manifest["totals"]["assistant_tokens"]
    for other in (chat_tokenizer("gemma"), chat_tokenizer("chatml", CHATML.replace("nice", "kind"))):
        with pytest.raises(ValueError, match="another chat template"):
            load_training_rows([tmp_path], other)


# the trainer on packed rows


def packed_rows(tokenizer):
    documents = [tokenize(tokenizer, chat) for chat in (CHAT, CHAT[:2], CHAT[2:], CHAT[2:] + CHAT[:2])]
    return documents, *pack(documents, 200, tokenizer.eos_token_id)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt"])
def test_a_packed_row_has_the_loss_of_its_documents_apart(name):
    tokenizer, model = chat_tokenizer("gemma"), tiny.build(name)
    draft, embedding, head = fresh_draft(model), model.get_input_embeddings(), model.get_output_embeddings()
    documents, ids, mask, segments = packed_rows(tokenizer)
    assert len(ids) < len(documents)
    features = TargetFeatures(model)
    torch.manual_seed(0)
    for weight in draft.layer.self_attn.parameters():  # a fresh draft hardly attends to anything
        torch.nn.init.normal_(weight, std=0.5)
    with torch.no_grad():
        made = features(list(range(len(ids))), ids, segments)
        packed = draft_loss(draft, embedding, head, ids, made, mask, segments=segments)
        apart = []
        for tokens, kept in documents:
            tokens, kept = torch.tensor([tokens]), torch.tensor([kept])
            apart.append(draft_loss(draft, embedding, head, tokens, features([0], tokens), kept))
    for part in ("feature", "logit", "top1", "positions"):
        torch.testing.assert_close(
            getattr(packed, part).float(), sum(getattr(sums, part) for sums in apart).float(), rtol=1e-4, atol=1e-3
        )
    with torch.no_grad():
        leaky = draft_loss(draft, embedding, head, ids, features([0], ids), mask)
        half = draft_loss(draft, embedding, head, ids, made, mask)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = draft_loss(draft, embedding, head, ids, made, mask, segments=segments)
    for sums in (leaky, half):  # neither the target nor the draft may see across
        assert abs(float(sums.logit - packed.logit)) > 0.02
    torch.testing.assert_close(rounded.logit, packed.logit, rtol=0.02, atol=0)


def test_noise_is_scaled_by_each_document_s_own_length(llama, monkeypatch):
    seen = []
    segments = torch.tensor([[1] * 4 + [2] * 10 + [0] * 2])
    ids, features = torch.ones_like(segments), torch.zeros(1, 16, 32)
    draft = fresh_draft(llama)
    monkeypatch.setattr(draft, "forward", lambda **kwargs: seen.append(kwargs["features"]) or real(**kwargs))
    real = type(draft).forward.__get__(draft)
    draft_loss(draft, llama.get_input_embeddings(), llama.lm_head, ids, features, segments > 0, 0.1, segments)
    widths = seen[0][0].abs().amax(-1)
    assert (widths[:4] <= 12.8).all() and (widths[:4] > 10).all()
    assert (widths[4:14] <= 5.12).all() and (widths[4:14] > 4).all()


def test_warm_start_does_not_see_across_documents(llama):
    tokenizer = chat_tokenizer("gemma")
    documents, ids, _, segments = packed_rows(tokenizer)
    embedding, features = llama.get_input_embeddings(), TargetFeatures(llama)
    drafts = [fresh_draft(llama), fresh_draft(llama)]
    warm_start(drafts[0], embedding, [(ids, features([0], ids, segments), segments)])
    apart = [torch.tensor([tokens]) for tokens, _ in documents]
    warm_start(drafts[1], embedding, [(tokens, features([0], tokens)) for tokens in apart])
    a, b = (draft.feature_sampler.fc.weight for draft in drafts)
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_training_on_packed_rows(llama, tmp_path):
    _, ids, mask, segments = packed_rows(chat_tokenizer("gemma"))
    ids, mask, segments = (x.repeat(4, 1) for x in (ids, mask, segments))
    records = []
    config = TrainingConfig(str(tmp_path), steps=12, batch_rows=2, micro_rows=2, warmup_steps=2)
    kept = TargetFeatures(llama, keep=True)
    train(fresh_draft(llama), llama, ids, mask, config, kept, records.append, segments=segments)
    assert records[-1]["loss"] < records[0]["loss"]
    torch.testing.assert_close(
        kept([0], ids[:1], segments[:1]), TargetFeatures(llama)([0], ids[:1], segments[:1]), atol=5e-3, rtol=5e-3
    )


# the command


def test_preview_colours_what_is_trained():
    tokenizer = chat_tokenizer("chatml")
    ids, mask = (torch.tensor(x) for x in tokenize(tokenizer, CHAT))
    text = preview(tokenizer, ids, mask)
    assert text.plain == TRUTH["chatml"].replace("[[", "").replace("]]", "")
    coloured = [text.plain[span.start : span.end] for span in text.spans if span.style == TRAINED]
    assert coloured == ["yes?<|im_end|>", "so \n.  so<|im_end|>"]
    assert len(preview(tokenizer, ids, mask, most=9).plain) < len(text.plain)


def saved_target(path, tokenizer):
    model = tiny.build("llama")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = 0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


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


# regenerated answers


@pytest.fixture
def answering(llama):
    from .test_selfplay import talker

    return talker(family="gemma")


def chats():
    return [CHAT, CHAT[:2], [CHAT[2], CHAT[3], CHAT[0], CHAT[1], CHAT[2]], CHAT[2:]]


def test_regenerated_answers_are_those_of_plain_generate(answering, tmp_path):
    model, tokenizer = answering
    files = regenerate(model, tokenizer, chats(), tmp_path, max_new_tokens=40, batch_rows=3, row_length=250)
    made = [messages for file in files for messages in load_conversations(str(file))]
    assert len(made) == len(chats()) and len(files) == 2
    answers = 0
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
            plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False,
                                   pad_token_id=0, eos_token_id=stop)[0, prompt.shape[1] :]  # fmt: skip
            assert message["content"] == tokenizer.decode(plain, skip_special_tokens=True)
            assert len(plain) < 40 or number == len(messages) - 1  # an answer cut short is the last
            answers += 1
        assert messages[-1]["role"] == "assistant"
    assert answers > len(made)
    tokenized = [tokenize(tokenizer, messages) for messages in made]
    assert all(any(mask) for _, mask in tokenized)


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


def test_the_command_regenerates_once(tmp_path, capsys, monkeypatch):
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
