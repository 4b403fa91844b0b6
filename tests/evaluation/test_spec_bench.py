import hashlib
import importlib
import json
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

import fspad_hf_cli as cli
from fspad_hf.evaluation import spec_bench
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


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The published questions, on a server of this machine; the paths that were asked of it."""
    (tmp_path / "site").mkdir()
    lines = [{"category": category, "turns": ["Why?", "And?"]} for category in ("qa", "rag")]
    content = write(tmp_path / "site" / "question.jsonl", lines).read_bytes()
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "site")

        def log_message(self, *args):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(spec_bench, "PUBLISHED", f"http://127.0.0.1:{server.server_port}/question.jsonl")
        monkeypatch.setattr(spec_bench, "PUBLISHED_SHA256", hashlib.sha256(content).hexdigest())
        monkeypatch.setenv("FSPAD_HF_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "*")
        yield asked
        server.shutdown()


def test_the_published_file_is_fetched_once(published, tmp_path, monkeypatch):
    path = published_questions()
    assert path.parent == tmp_path / "cache" and [q.task for q in read_questions(None)] == ["qa", "rag"]
    assert published_questions() == path and len(published) == 1
    monkeypatch.setattr(spec_bench, "PUBLISHED", spec_bench.PUBLISHED + ".gone")
    with pytest.raises(OSError, match=r"could not be downloaded .*--questions FILE"):
        published_questions(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_another_file_than_the_published_one_is_refused(published, tmp_path, monkeypatch):
    monkeypatch.setattr(spec_bench, "PUBLISHED_SHA256", "0" * 64)
    with pytest.raises(OSError, match=r"has the sha256 .*, expected 000.*--questions FILE"):
        published_questions()
    assert not (tmp_path / "cache").exists()


def test_every_command_with_questions_fetches_them(published, pair, tmp_path, monkeypatch):
    """Of each command only that it asks what was published, and that the next one asks the cache."""

    class Asked(Exception):
        pass

    def read(path, *args, **kwargs):
        raise Asked([question.turns for question in read_questions(path, *args, **kwargs)])

    for module in ("evaluation.run", "training.acceptance", "training.ablation"):
        monkeypatch.setattr(f"fspad_hf.{module}.read_questions", read)
    takers = []
    for name in cli.COMMANDS:
        module = importlib.import_module(f"fspad_hf_cli.commands.{name.replace('-', '_')}")
        if "add_questions_argument" not in vars(module):
            continue
        takers.append(name)
        needed = {"acceptance": "", "ablate": f"--target {pair['target']} --data d", "bench": ""}[name]
        output = "" if name == "acceptance" else f"--output {tmp_path / name}"
        with pytest.raises(Asked, match="Why"):
            cli.main([name, *needed.split(), *output.split(), "--per-task", "1"])
    assert takers == ["bench", "acceptance", "ablate"] and len(published) == 1
