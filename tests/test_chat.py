"""The chat, fed through a pipe: its answers are those of plain `generate` on the same conversation."""

import io
import re
import signal
import sys

import pexpect
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, LlamaForCausalLM

import fspad_hf_cli as cli
from fspad_hf.chat import run_chat
from fspad_hf.host import CACHE
from fspad_hf.loading import encode_chat
from fspad_hf.streaming import RunStreamer

from . import tiny
from .conftest import fresh_draft

RECORD = re.compile(r"\[tau (\d\.\d\d), \d+\.\d tok/s, (\d+) tokens\]")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


@pytest.fixture
def say(monkeypatch, pair):
    """`say("line", ..., option=...)`: what the chat prints for these lines."""

    def run(*lines, terminal=False, **options):
        stdin = io.StringIO("".join(f"{line}\n" for line in lines))
        stdin.isatty = lambda: terminal
        monkeypatch.setattr("sys.stdin", stdin)
        console = Console(
            file=io.StringIO(), width=200, force_terminal=terminal, color_system="standard" if terminal else None
        )
        run_chat(**{**pair, "max_new_tokens": 12, "console": console, **options})
        return console.file.getvalue()

    return run


def expected(pair, conversations, seed=0, **kwargs):
    """The answers of plain `generate`: each conversation is a list of the user's messages."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(pair["target"]),
        AutoTokenizer.from_pretrained(pair["target"]),
    )
    torch.manual_seed(seed)
    answers = []
    for opening, messages in conversations:
        history = list(opening)
        for message in messages:
            history.append({"role": "user", "content": message})
            inputs = encode_chat(tokenizer, history)
            output = model.generate(**inputs, **{"max_new_tokens": 12, **kwargs})[0, inputs["input_ids"].shape[1] :]
            answers.append(tokenizer.decode(output, skip_special_tokens=True))
            history.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        ({"greedy": True}, {"do_sample": False}),
        ({}, {}),  # the target's generation_config, which is greedy
        ({"temperature": 0.0}, {"do_sample": False}),
        ({"temperature": 0.8}, {"do_sample": True, "temperature": 0.8}),
        (
            {"top_p": 0.7, "top_k": 0, "temperature": 1.5},
            {"do_sample": True, "top_p": 0.7, "top_k": 0, "temperature": 1.5},
        ),
    ],
    ids=["greedy", "default", "temperature-0", "temperature", "top-p"],
)
def test_answers_are_those_of_plain_generate(say, pair, options, kwargs):
    printed = say("hello", "", "and you?", "/reset", "hello", "/exit", "never", seed=4, system="be nice", **options)
    opening = [{"role": "system", "content": "be nice"}]
    answers = expected(pair, [(opening, ["hello", "and you?"]), (opening, ["hello"])], seed=4, **kwargs)
    shown = RECORD.sub("#", printed)
    assert shown == f"{answers[0]}\n#\n{answers[1]}\n#\nA new conversation.\n{answers[2]}\n#\n"
    assert [(float(tau) >= 1, count) for tau, count in RECORD.findall(printed)] == [(True, "12")] * 3


def test_a_turn_prefills_only_what_is_new(say, pair, monkeypatch):
    """A message, and what the template puts around it; not the conversation before it, also after a `/reset`."""
    read, lengths, prefill = [], [], GenerationMixin._prefill

    def watched(self, input_ids, config, kwargs, *args):
        cached = 0 if kwargs.get(CACHE) is None else kwargs[CACHE].get_seq_length()
        lengths.append(input_ids.shape[1]), read.append(input_ids.shape[1] - cached)
        return prefill(self, input_ids, config, kwargs, *args)

    monkeypatch.setattr(LlamaForCausalLM, "_prefill", watched)
    printed = say("hello", "and you?", "well", "/reset", "other words", "yes", system="be nice")
    assert len(RECORD.findall(printed)) == 5
    assert lengths[0] < lengths[1] < lengths[2] > lengths[3] < lengths[4]
    assert read[0] == lengths[0] and max(read[1:]) < 30 < lengths[2]


@pytest.mark.parametrize("name", ["lfm2", "mamba2", "qwen3_5_text"])
def test_recurrent_targets(say, tmp_path, tokenizer, name):
    """A turn goes on from the last one's states; where these alone cannot say how far they are, all is read again."""
    model = tiny.build(name, "eager")
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "target"), tokenizer.save_pretrained(tmp_path / "target")
    fresh_draft(model).save_pretrained(tmp_path / "draft", tokenizer=tokenizer)
    own = {"target": str(tmp_path / "target"), "draft": str(tmp_path / "draft")}
    printed = say("hello", "and you?", "once more", greedy=True, **own)
    answers = expected(own, [([], ["hello", "and you?", "once more"])], do_sample=False)
    assert all(answers) and all(answer in printed for answer in answers)
    assert printed.count("tok/s, 12 tokens]") == 3


def test_the_command_on_a_pipe_is_plain_text(monkeypatch, pair, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/frobnicate now\nagain"))  # ends without a newline
    monkeypatch.setenv("FORCE_COLOR", "1")
    arguments = ["chat", "--target", pair["target"], "--draft", pair["draft"], "--max-new-tokens", "5", "--greedy"]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and ">" not in out and len(RECORD.findall(out)) == 2
    assert out.count("Unknown command /frobnicate: /help lists them.") == 1


def test_help_lists_every_command(say):
    printed = say("/help", "/exit")
    assert all(re.search(f"^{command} +[a-z]", printed, re.M) for command in ("/help", "/reset", "/exit"))


def test_a_terminal_has_a_prompt_and_colours(say, capsys):
    printed = say("hello", terminal=True)
    assert capsys.readouterr().out == "> > "  # by input(), which edits lines
    assert "\x1b[33m[tau" in printed


@pytest.mark.parametrize(
    ("options", "answers", "trees"),
    [
        ({"greedy": True}, "greedy, up to 12 tokens", "fixed, depth 6, top-k 3, 6 nodes, 0 of them looked up"),
        ({"temperature": 0.8, "top_k": 5, "tree": "auto", "tree_depth": 2, "tree_lookup": 1},
         "sampled, temperature 0.8, top_k 5, up to 12 tokens",
         "auto, at most depth 2, top-k 3, 6 nodes, 1 of them looked up"),
    ],
)  # fmt: skip
def test_the_banner_of_a_terminal(say, pair, options, answers, trees):
    banner = re.sub(r"\x1b\[[\d;]*m", "", say("/exit", terminal=True, **options)).splitlines()
    assert banner[:4] == [
        f"target  {pair['target']} (float32 on cpu)", f"draft   {pair['draft']}", f"answers {answers}",
        f"trees   {trees}",
    ]  # fmt: skip
    assert any("/help" in line for line in banner[4:])


@pytest.fixture
def press(monkeypatch):
    """`press(times)`: Ctrl-C, so often, when the first answer's first round begins."""

    def arrange(times):
        def on_round(self, tree):
            for _ in range(left.pop() if left else 0):
                signal.raise_signal(signal.SIGINT)
            shown(self, tree)

        left, shown = [times], RunStreamer.on_round
        monkeypatch.setattr(RunStreamer, "on_round", on_round)

    return arrange


def test_ctrl_c_stops_the_answer_and_what_was_said_stays(say, pair, press):
    press(1)
    handler = signal.getsignal(signal.SIGINT)
    printed = say("hello", "and you?", terminal=True, greedy=True)
    assert re.findall(r"(\d+) tokens(.*?)]", printed) == [("2", ", stopped"), ("12", "")]
    (said,) = expected(pair, [([], ["hello"])], max_new_tokens=2)
    history = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said}]
    (answer,) = expected(pair, [(history, ["and you?"])])
    (wrong,) = expected(pair, [([], ["and you?"])])
    assert answer != wrong and answer in re.sub(r"\x1b\[[\d;]*m", "", printed)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_takes_the_message_back(say, pair, press):
    press(2)
    handler = signal.getsignal(signal.SIGINT)
    printed = say("hello", "and you?", terminal=True, greedy=True)
    (answer,) = expected(pair, [([], ["and you?"])])
    assert printed.count("no part of the conversation") == 1 and len(RECORD.findall(printed)) == 1
    assert answer in re.sub(r"\x1b\[[\d;]*m", "", printed)
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_prompt_edits_lines_and_remembers_them(pair):
    """In a terminal of its own: arrow up brings the last line back, arrow left goes back in it, Ctrl-C ends."""
    options = [x for name, value in pair.items() for x in (f"--{name}", value)]
    arguments = ["-m", "fspad_hf", "chat", *options, "--max-new-tokens", "2", "--greedy"]
    terminal = pexpect.spawn(sys.executable, arguments, encoding="utf-8", timeout=100, dimensions=(24, 200))
    for typed in ("/hlp\x1b[D\x1b[De\r", "\x1b[A\x1b[D\x1b[Dx\r"):  # /help, then /hexlp
        terminal.expect("> ")
        terminal.send(typed)
    terminal.expect("Unknown command /hexlp")
    terminal.expect("> ")
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def test_a_message_too_long_is_not_sent_and_the_conversation_goes_on(say, pair):
    printed = say("x" * 249, "hello", greedy=True)
    (answer,) = expected(pair, [([], ["hello"])], do_sample=False)
    refusal, rest = printed.split("\n", 1)
    assert refusal == (
        f"Not sent: with this message the conversation has 256 tokens, and the context of {pair['target']} holds 256 "
        "with the answer. /reset starts a new one."
    )
    assert RECORD.sub("#", rest) == f"{answer}\n#\n"


def test_an_answer_ends_where_the_context_does(say, pair):
    printed = say("x" * 200, "y", max_new_tokens=100, greedy=True)
    assert [count for _, count in RECORD.findall(printed)] == ["49"]  # 200 and 7 of the template, of 256
    assert f"The context of {pair['target']} (256 tokens) is full: /reset." in printed
    assert printed.splitlines()[-1].startswith("Not sent: with this message the conversation has 26")


@pytest.mark.parametrize("during", ["answer", "input", "loading"])
def test_ctrl_c_ends_it_cleanly(monkeypatch, say, during):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    names = {
        "answer": "fspad_hf.streaming.RunStreamer.on_round",
        "input": "builtins.input",
        "loading": "fspad_hf.chat.load_models",
    }
    monkeypatch.setattr(names[during], interrupt)
    assert say("a", "b", greedy=True).count("tau") == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"greedy": True, "top_p": 0.5, "temperature": 1.0}, "takes no temperature, top_p"),
        ({"temperature": 0.0, "top_p": 0.5}, r"greedy \(temperature 0\) takes no top_p"),
        ({"temperature": -0.1}, "temperature=-0.1 must be finite and 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(monkeypatch, say, options, words):
    monkeypatch.setattr("fspad_hf.chat.load_models", lambda *a, **k: pytest.fail("loads"))
    with pytest.raises(ValueError, match=words):
        say(**options)


@pytest.mark.parametrize(
    ("template", "system", "outcome"),
    [
        (None, None, "has no chat template: each message stands alone."),
        (None, "be nice", ValueError("has no chat template, so it takes no system message")),
        (
            NO_SYSTEM + tiny.CHAT_TEMPLATE,
            "be nice",
            ValueError("refuses a conversation with this opening: no system role"),
        ),
    ],
)
def test_templates(monkeypatch, say, template, system, outcome):
    def load(*args, **kwargs):
        found = from_pretrained(*args, **kwargs)
        found.chat_template = template
        return found

    from_pretrained = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    if isinstance(outcome, str):
        printed = say("hello", "there", greedy=True, system=system)
        assert outcome in printed and len(RECORD.findall(printed)) == 2
    else:
        with pytest.raises(ValueError, match=str(outcome)):
            say("hello", system=system)
