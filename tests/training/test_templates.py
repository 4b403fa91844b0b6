import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fspad_hf.training import templates
from fspad_hf.training.templates import TemplateProblem, assistant_span, derive_glue

from .chat import TEMPLATES, chat_tokenizer


@pytest.mark.parametrize("family", TEMPLATES)
def test_glue_is_what_the_template_puts_between_the_turns(family):
    tokenizer = chat_tokenizer(family)
    glue = derive_glue(tokenizer)
    said = ["hi", "yes", "why", "so", "ok"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = list(glue.opening)
    for number, text in enumerate(said):
        space = " " if family == "mistral" and number % 2 else ""  # the answer's own, by that template
        ids += tokenizer.encode(space + text, add_special_tokens=False)
        ids += glue.to_user if number % 2 else glue.to_assistant
    assert tokenizer.decode(ids) == rendered
    assert glue.ends_user and glue.ends_assistant
    opening, closing = assistant_span(tokenizer)
    assert tokenizer.decode(closing) in ("<|im_end|>", "<|eot|>", "<end_of_turn>", "</s>")
    assert tokenizer.decode(opening) in rendered and opening == list(glue.to_assistant[-len(opening) :])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['content'] | upper }}|{% endfor %}", "appear"),
        ("{% for m in messages %}{{ loop.index }}:{{ m['content'] }}\n{% endfor %}", "not all set apart"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "nothing stands before"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_templates_without_glue_are_refused(template, said):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(TemplateProblem, match=said):
        derive_glue(tokenizer)


def test_a_token_across_a_turn_is_refused(monkeypatch):
    tokenizer = chat_tokenizer("chatml")
    real = templates.encode

    def joined(tokenizer, text):
        ids, offsets = real(tokenizer, text)
        at = text.index("zebrafinch")
        return ids, [(start - 5, end) if start == at else (start, end) for start, end in offsets]

    monkeypatch.setattr(templates, "encode", joined)
    with pytest.raises(TemplateProblem, match="joins a turn"):
        derive_glue(tokenizer)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_turns_are_found_wherever_a_row_ends(data):
    tokenizer = chat_tokenizer("chatml")
    glue = derive_glue(tokenizer)
    row, expected, role = list(glue.opening), [], "user"
    for text in data.draw(st.lists(st.lists(st.integers(0, 40), max_size=5), min_size=1, max_size=5)):
        between = glue.to_assistant if role == "user" else glue.to_user
        expected.append((role, len(row), len(row) + len(text)))
        row += [*text, *between]
        role = "assistant" if role == "user" else "user"
    cut = data.draw(st.integers(len(glue.opening) + 1, len(row)))
    lengths = {"user": len(glue.to_assistant), "assistant": len(glue.to_user)}
    assert glue.turns(row[:cut]) == [
        (role, a, min(b, cut), b + lengths[role] <= cut) for role, a, b in expected if a < cut
    ]
