"""The pictures of `fspad-hf explain` show what a real call did, and watching it changes nothing."""

import random
import threading
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import fspad_hf_cli as cli
from fspad_hf import FSPADDraftModel, tree_drawing
from fspad_hf.evaluation.peers import MODES
from fspad_hf.explain import Explanation, Round, RoundRecorder, explain, run_explain
from fspad_hf.loading import encode_chat
from fspad_hf.tree_drawing import ACCEPTED, BOX, CELL, INK, ROW, html_page, layout, svg_picture, visible

from . import tiny
from .conftest import fresh_draft

SVG = "{http://www.w3.org/2000/svg}"
PROMPT = "Why is the sky blue?"
NASTY = {0: "<&\"'>]]>", 1: " \n\t", 2: "\x00\x1b\x7f", 3: "\u202eabc\u200d", 4: "\ud800", 5: "天空", 6: "", 7: "�"}


@pytest.fixture
def endless(llama):
    """A target whose answers have a known length."""
    before = llama.generation_config.eos_token_id
    llama.generation_config.eos_token_id = None
    yield llama
    llama.generation_config.eos_token_id = before


def plain_answer(target, tokenizer, mode, count, seed=0):
    inputs = encode_chat(tokenizer, [{"role": "user", "content": PROMPT}])
    torch.manual_seed(seed)
    output = target.generate(**inputs, **MODES[mode], max_new_tokens=count)
    return inputs, output, torch.get_rng_state()


def pills(group, kinds):
    """(left, right, top, label) of a round's pills of some kinds."""
    found = []
    for pill in group.iter(f"{SVG}g"):
        if pill.get("class") in kinds:
            rect, text = pill.find(f"{SVG}rect"), pill.find(f"{SVG}text")
            left, width = float(rect.get("x")), float(rect.get("width"))
            found.append((left, left + width, float(rect.get("y")), text.text))
    return sorted(found)


def round_groups(picture):
    """The groups of an SVG's rounds: the ones that were put into a place, each around a tree."""
    return [group for group in ET.fromstring(picture).findall(f"{SVG}g") if group.get("transform")]


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_what_is_drawn_as_accepted_is_what_the_target_emitted(endless, llama_draft, tokenizer, oracle, mode):
    inputs, plain, state = plain_answer(endless, tokenizer, mode, 25, seed=4)
    oracle(plain.tolist(), 0.8, 64)
    made = explain(endless, tokenizer, llama_draft, PROMPT, 25, mode == "sampled", seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    answer = plain[0, inputs["input_ids"].shape[1] :].tolist()
    assert [token for one in made.rounds for token in one.emitted] == answer[1:]
    assert any(len(one.path) > 1 for one in made.rounds) and any(one.bonus is not None for one in made.rounds)
    for one in made.rounds:
        assert (
            tuple(one.tokens[node] for node in one.path) + (() if one.bonus is None else (one.bonus,)) == one.emitted
        )
        assert [one.parents[node] for node in one.path] == [0, *one.path[:-1]][: len(one.path)]
    assert made.texts[-1] == tokenizer.decode(answer) and made.start(len(made.rounds)) == len(answer)
    groups = round_groups(svg_picture(made, len(made.rounds)))
    assert len(groups) == len(made.rounds)
    for one, group in zip(made.rounds, groups, strict=True):
        line = pills(group, ("root", "accepted", "bonus"))
        assert [label for *_, label in line] == [
            visible(tokenizer.decode(t)) or "∅" for t in (one.tokens[0], *one.emitted)
        ]
        assert len({top for _, _, top, _ in line}) == 1
        assert len(pills(group, ("rejected",))) == len(one.tokens) - 1 - len(one.path)


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_a_watched_call_is_the_same_call(endless, tokenizer, mode):
    draft = fresh_draft(endless, tree_total_nodes=6, tree_top_k=3)
    inputs, plain, _ = plain_answer(endless, tokenizer, mode, 20)
    records, states = [], []
    for streamer in (None, RoundRecorder()):
        torch.manual_seed(0)
        output = endless.generate(
            **inputs, **MODES[mode], max_new_tokens=20, assistant_model=draft, streamer=streamer,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert torch.equal(output.sequences, plain)
        records.append(output.speculation.accepted_lengths)
        states.append(torch.get_rng_state())
    assert records[0] == records[1] == [len(one.emitted) for one in streamer.rounds]
    assert torch.equal(*states)


def test_two_threads_watch_two_calls_of_one_draft(endless, tokenizer):
    draft, made = fresh_draft(endless, tree_total_nodes=6, tree_top_k=3), {}
    prompts = ["One, two", "A whale sings."]

    def work(prompt):
        made[prompt] = explain(endless, tokenizer, draft, prompt, 16)

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt in prompts:
        assert made[prompt] == explain(endless, tokenizer, draft, prompt, 16)


def test_a_streamer_without_on_round_is_left_alone(endless, llama_draft, prompt):
    class Counter(BaseStreamer):
        puts = 0

        def put(self, value):
            self.puts += 1

        def end(self):
            pass

    endless.generate(prompt, assistant_model=llama_draft, max_new_tokens=7, streamer=(streamer := Counter()))
    assert streamer.puts == 8


def test_paths_when_a_child_repeats_the_root_and_when_the_text_ends_on_a_guess():
    made = Round(tokens=(5, 5, 6, 5), parents=(0, 0, 0, 1), emitted=(5, 5, 7))
    assert (made.path, made.bonus) == ((1, 3), 7)
    made = Round(tokens=(5, 5, 6, 5), parents=(0, 0, 0, 1), emitted=(6,))
    assert (made.path, made.bonus) == ((2,), None)
    assert [box.kind for box in layout(made)] == ["root", "accepted", "rejected", "rejected"]


def random_round(seed, nodes=59, vocabulary=8):
    choose = random.Random(seed)
    depths, parents, tokens = [0], [0], [choose.randrange(vocabulary)]
    while len(tokens) < nodes:
        parent = choose.choice([i for i, depth in enumerate(depths) if depth < 6])
        parents.append(parent), depths.append(depths[parent] + 1), tokens.append(choose.randrange(vocabulary))
    return Round(tuple(tokens), tuple(parents), (tokens[1], 7))


@pytest.mark.parametrize("seed", range(8))
def test_no_pill_touches_another_and_no_label_leaves_its_pill(seed):
    long = {i: ("w" * (seed * 3 + i) + "天" * (seed % 3)) or "x" for i in range(8)}
    made = Explanation("t", "p", ("",) * 4, long, (random_round(seed),))
    (group,) = round_groups(picture := svg_picture(made, 1))
    boxes = pills(group, ("root", "accepted", "bonus", "rejected"))
    root = ET.fromstring(picture)
    assert float(root.get("width")) == 900  # long labels are cut rather than the picture made wider
    for left, right, top, label in boxes:
        assert left >= 0 and right <= 900 and top + BOX <= float(root.get("height"))
        assert len(label) * CELL < right - left
        for other in boxes:
            apart = right + 4 <= other[0] or other[1] + 4 <= left or abs(top - other[2]) >= ROW
            assert apart or other == (left, right, top, label)


class Reader(HTMLParser):
    """Collects the text of a page, and checks that what is opened is closed."""

    def __init__(self):
        super().__init__()
        self.text, self.open = "", []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_special_characters_are_shown_and_break_nothing():
    texts = tuple("".join(NASTY[i] for i in range(count)) for count in range(5))
    tree = Round(tuple(NASTY), (0, 0, 0, 0, 1, 2, 2, 4), (1, 4, 3))
    made = Explanation("<title>", "</svg><script>\x00", texts, NASTY, (tree,))
    picture, page = svg_picture(made, 1), html_page(made, 1)
    labels = {label for *_, label in pills(round_groups(picture)[0], ("root", "accepted", "bonus", "rejected"))}
    assert labels == {
        "<&\"'>]]>", "␣⏎⇥", "<U+0000><U+001B><U+007F>"[:21] + "…", "<U+202E>abc<U+200D>", "<U+D800>", "天空", "∅", "�",
    }  # fmt: skip
    reader = Reader()
    reader.feed(page)
    assert reader.open == [] and "</svg><script><U+0000>" in reader.text and "<script>" not in page
    assert "prefers-color-scheme" in page
    for text in (picture, page):
        text.encode("utf-8")


def test_the_html_page_shows_the_text_growing(pair, tmp_path):
    made = run_explain(PROMPT, tmp_path / "tree.html", **pair, max_new_tokens=12)
    page = (tmp_path / "tree.html").read_text(encoding="utf-8")
    assert page.count("<section") == len(made.rounds) > 1 and list(tmp_path.iterdir()) == [tmp_path / "tree.html"]
    texts = [part.split("</p>")[0] for part in page.split('<p class="text">')[2:]]
    strip = str.maketrans({"\n": None})
    for number, text in enumerate(texts, start=1):
        reader = Reader()
        reader.feed(text)
        assert reader.text.translate(strip) == made.texts[made.start(number)].translate(strip)
    run_explain(PROMPT, tmp_path / "tree.html", 1, **pair, max_new_tokens=12)
    assert (tmp_path / "tree.html").read_text(encoding="utf-8").count("<section") == 1


def test_the_command_writes_the_first_rounds(pair, tmp_path, capsys):
    arguments = ["explain", PROMPT, "--max-new-tokens", "12", "--tree-depth", "2"]
    arguments += [x for name, value in pair.items() for x in (f"--{name}", value)]
    for options, count in (([], 3), (["--rounds", "2"], 2), (["--sampled", "--seed", "3"], 3)):
        assert cli.main([*arguments, "--output", str(tmp_path / "a.svg"), *options]) == 0
        picture = (tmp_path / "a.svg").read_text(encoding="utf-8")
        assert len(round_groups(picture)) == count
        assert ("T = 1, seed 3" in picture) == ("--sampled" in options)
        assert "rounds for 11 tokens (tau" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--output", str(tmp_path / "a.svg"), "--sampled", "--greedy"])


def test_a_failed_drawing_leaves_the_old_file(pair, tmp_path, monkeypatch):
    (tmp_path / "a.svg").write_text("old")
    monkeypatch.setattr(tree_drawing, "layout", lambda made: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_explain(PROMPT, tmp_path / "a.svg", **pair, max_new_tokens=6)
    assert (tmp_path / "a.svg").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "tree.png"}, "output='tree.png' ends in '.png': expected .* .svg or .html"),
        ({"output": "no/such/folder/a.svg"}, "output='no/such/folder/a.svg' cannot be written"),
        ({"rounds": 0}, "rounds=0 leaves nothing"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 leaves nothing"),
        ({"prompt": " "}, "prompt=' ' is empty"),
        ({"tree_depth": 0}, "tree_depth=0"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(options, message, tmp_path, monkeypatch, pair):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FSPADDraftModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("loads a model"))
    with pytest.raises((ValueError, OSError), match=message):
        run_explain(**{"prompt": PROMPT, "output": "a.svg", **pair, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_call_without_rounds_says_why(llama, llama_draft, tokenizer):
    with pytest.raises(ValueError, match="no round to draw: the answer ended with its first token"):
        explain(llama, tokenizer, llama_draft, PROMPT, max_new_tokens=1)
    mamba = tiny.build("mamba", attention="eager")
    with pytest.raises(ValueError, match="no round to draw: it cannot speculate, because"):
        explain(mamba, tokenizer, fresh_draft(mamba), PROMPT, max_new_tokens=4)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(w * (p / 12.92 if p < 0.04 else ((p + 0.055) / 1.055) ** 2.4)
               for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True))  # fmt: skip


@pytest.mark.parametrize("colour", [INK, ACCEPTED, tree_drawing.BONUS])
def test_colours_read_on_light_and_dark_pages(colour):
    for page in ("#ffffff", "#0d1117"):
        low, high = sorted((luminance(colour), luminance(page)))
        assert (high + 0.05) / (low + 0.05) > 4


def test_titles_and_spaces_are_plain_text():
    """A screen reader says the title; no-break spaces are dropped by some renderers."""
    texts = ("", "one", "one two", "one two\N{NO-BREAK SPACE}")
    made = Explanation("a target, greedy", "Why is\nit so?", texts, {0: "one", 1: " two"}, (Round((0,), (0,), (1,)),))
    picture, page = svg_picture(made, 1), html_page(made, 1)
    (title, *_), lines = ET.fromstring(picture), [t for t in ET.fromstring(picture).iter(f"{SVG}text") if len(t)]
    assert title.tag == f"{SVG}title" and title.text == "a target, greedy: Why is it so?"
    assert all(line.get("{http://www.w3.org/XML/1998/namespace}space") == "preserve" for line in lines)
    assert ["".join(line.itertext()) for line in lines] == ["one two"]
    assert page.count("<svg") == page.count("<title>The") == 2
    assert "\N{NO-BREAK SPACE}" not in picture + page
