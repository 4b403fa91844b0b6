import json

import pytest

from fspad_hf.evaluation.spec_bench import TASKS, Question, published_questions, read_prompts, read_questions


def write(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_questions(tmp_path):
    lines = [{"category": c, "turns": [f"{c} {i}", "more"]} for i in range(4) for c in ("writing", "qa", "math")]
    path = write(tmp_path / "q.jsonl", lines)
    assert [(q.number, q.task, q.turns[0]) for q in read_questions(path, per_task=2)] == [
        (1, "mt_bench", "writing 0"), (7, "mt_bench", "writing 2"), (2, "qa", "qa 0"), (8, "qa", "qa 2"),
    ]  # fmt: skip
    assert len(read_questions(path)) == 12 and {q.task for q in read_questions(path)} <= set(TASKS)
    assert {q.task for q in read_questions(path, tasks=["qa"])} == {"qa"}


@pytest.mark.parametrize(
    "bad",
    [
        {"category": "cooking", "turns": ["x"]}, {"turns": ["x"]}, "{", {"category": "qa", "turns": []}, [1],
        {"category": "qa", "turns": "x"}, {"category": "qa", "turns": ["x", 3]}, {"category": "qa", "turns": [" "]},
    ],
)  # fmt: skip
def test_a_malformed_question_names_its_line(tmp_path, bad):
    path = write(tmp_path / "q.jsonl", [{"category": "qa", "turns": ["x"]}, bad])
    with pytest.raises(ValueError, match="line 2"):
        read_questions(path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"tasks": ["cooking"]}, "cooking"), ({"per_task": 0}, "per_task=0"), ({"tasks": ["rag"]}, "no question")],
)
def test_a_choice_that_leaves_nothing(tmp_path, arguments, said):
    path = write(tmp_path / "q.jsonl", [{"category": "qa", "turns": ["x"]}])
    with pytest.raises(ValueError, match=said):
        read_questions(path, **arguments)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    for name, why in (("none.jsonl", "No such file"), ("latin.jsonl", "no UTF-8")):
        with pytest.raises(OSError, match=f"{name}' cannot be read .*{why}"):
            read_prompts(tmp_path / name)
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a\u2028b"}', encoding="utf-8")
    assert read_prompts(tmp_path / "odd.jsonl")[0].turns == ("a\u2028b",)


def test_own_prompts(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, "", {"messages": chat, "task": "mine"}])
    assert read_prompts(path) == [Question(1, "prompts", ("a",)), Question(3, "mine", ("u",), (chat[0],))]
    bad = [{"messages": []}, {"messages": chat[:1]}, {"prompt": 1}, {}, 7, {"messages": ["u"]}]
    for line in bad:
        with pytest.raises(ValueError, match="line 1"):
            read_prompts(write(path, [line]))
    with pytest.raises(ValueError, match="no prompt"):
        read_prompts(write(path, []))


def test_the_published_file_is_fetched_once(tmp_path, monkeypatch):
    from fspad_hf.evaluation import spec_bench

    source = write(tmp_path / "source.jsonl", [{"category": "qa", "turns": ["x"]}])
    monkeypatch.setattr(spec_bench, "PUBLISHED", source.as_uri())
    path = published_questions(tmp_path / "cache")
    source.unlink()
    assert published_questions(tmp_path / "cache") == path and len(read_questions(path)) == 1
    with pytest.raises(OSError, match="--questions FILE"):
        published_questions(tmp_path / "other")
    assert not (tmp_path / "other").exists()
