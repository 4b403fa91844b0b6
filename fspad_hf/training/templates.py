"""What a chat template puts around the turns, as token ids, and which tokens of a conversation are the assistant's."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

USER_WORDS = ("zebrafinch", "walnutgrove", "harbourlight")  # stand-ins for turns: no template contains them
ASSISTANT_WORDS = ("lanternfish", "meadowlark")


class TemplateProblem(ValueError):
    """A chat template, or a conversation it will not render; the message says which and what to do."""


@dataclass(frozen=True)
class ChatGlue:
    """
    The ids between the turns of a chat, the same after every turn.

    Args:
        opening: all before the first user turn, a default system turn included.
        to_assistant: from the end of a user turn to the start of the answer.
        to_user: from the end of an answer to the start of the next user turn.
        ends_user, ends_assistant: whether the first id of the glue after a turn is a special token, so that whoever
            writes it has ended the turn.
    """

    opening: tuple[int, ...]
    to_assistant: tuple[int, ...]
    to_user: tuple[int, ...]
    ends_user: bool
    ends_assistant: bool

    @property
    def closing(self) -> tuple[int, ...]:
        """The ids that close an answer."""
        return self.to_user[:1] if self.ends_assistant else self.to_user

    def turns(self, row: Sequence[int]) -> list[tuple[str, int, int, bool]]:
        """(role, start, end, finished) of each turn's content in a row; the last turn may be cut by the row's end."""
        row, found, start, role = list(row), [], len(self.opening), "user"
        while start < len(row):
            glue = list(self.to_assistant if role == "user" else self.to_user)
            end = _find(row, glue, start)
            cut = end < 0
            if cut:  # the row may end within the glue
                end = next(
                    i for i in range(max(start, len(row) - len(glue) + 1), len(row) + 1) if _starts(glue, row[i:])
                )
            found.append((role, start, end, not cut))
            start, role = end + len(glue), "assistant" if role == "user" else "user"
        return found


def _find(row: list[int], pattern: list[int], start: int) -> int:
    return next((i for i in range(start, len(row) - len(pattern) + 1) if row[i : i + len(pattern)] == pattern), -1)


def _starts(pattern: list[int], tail: list[int]) -> bool:
    return pattern[: len(tail)] == tail


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that no text of a user should contain."""
    return {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the chat template that renders conversations."""
    return hashlib.sha256(_template(tokenizer).encode("utf-8")).hexdigest()


def has_generation_tags(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template itself says, by `{% generation %}`, what is the assistant's."""
    return "endgeneration" in _template(tokenizer)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], prompt: bool = False, unfinished: bool = False
) -> str:
    """
    The text of a conversation, ending in the assistant's opening if `prompt`, in its last message if `unfinished`.

    Raises:
        TemplateProblem: there is no chat template, or it refuses the conversation.
    """
    _template(tokenizer)
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, continue_final_message=unfinished
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        roles = [message.get("role") for message in messages]
        raise TemplateProblem(
            f"The chat template refuses a conversation with the roles {roles} ({error}): expected turns that it can "
            "render; drop or rename the turns that it does not know."
        ) from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a rendered conversation, and each token's (start, end) in `text`."""
    if not getattr(tokenizer, "is_fast", False):
        raise TemplateProblem(
            f"{type(tokenizer).__name__} does not tell where its tokens stand in a text: expected a fast tokenizer "
            "(one with a tokenizer.json); save the target with one."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]


def derive_glue(tokenizer: PreTrainedTokenizerBase) -> ChatGlue:
    """
    The glue of a tokenizer's chat template, from a conversation of three user turns and two answers.

    White space that the template puts next to a turn and the tokenizer joins with it counts as the turn's own: the
    model writes it.

    Raises:
        TemplateProblem: the template alters what is said, or does not put the same ids around every turn.
    """
    words = [w for pair in zip(USER_WORDS, (*ASSISTANT_WORDS, ""), strict=True) for w in pair][:-1]
    messages = [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]
    text = render(tokenizer, messages, prompt=True)
    counts = [text.count(word) for word in words]
    starts = [text.find(word) for word in words]
    if counts != [1] * len(words) or starts != sorted(starts):
        raise _underivable(f"five turns of one word each appear {counts} times in what it renders", text)
    special = special_ids(tokenizer)
    pieces = _pieces(tokenizer, text, [(start, start + len(word)) for start, word in zip(starts, words, strict=True)])
    pieces[1:] = [_without_leading_space(tokenizer, piece, special) for piece in pieces[1:]]
    opening, to_user, to_assistant = pieces[0], pieces[2], pieces[5]  # the last as a prompt ends
    spaces = [tokenizer.decode(piece[len(to_assistant) :]) for piece in (pieces[1], pieces[3])]
    same = all(piece[: len(to_assistant)] == to_assistant for piece in (pieces[1], pieces[3]))
    if not same or any(space.strip() for space in spaces) or pieces[4] != to_user:
        raise _underivable("the turns are not all set apart in the same way", text)
    if not (opening and to_assistant and to_user):
        raise _underivable("nothing stands before a user's turn, or between two turns", text)
    return ChatGlue(opening, to_assistant, to_user, to_assistant[0] in special, to_user[0] in special)


def assistant_span(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """
    The ids that open an assistant's turn in the tokenizer's chat template, and those that close it.

    Raises:
        TemplateProblem: no chat template, or one whose turns cannot be told apart.
    """
    glue = derive_glue(tokenizer)
    chat = [{"role": "user", "content": USER_WORDS[0]}]
    without, prompted = render(tokenizer, chat), render(tokenizer, chat, prompt=True)
    added = encode(tokenizer, prompted[len(without) :])[0] if prompted.startswith(without) else []
    own = bool(added) and list(glue.to_assistant[-len(added) :]) == added
    return added if own else list(glue.to_assistant), list(glue.closing)


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise TemplateProblem(
            "The target's tokenizer has no chat template: expected one that marks the assistant's turns; use an "
            "instruction-tuned target, or set tokenizer.chat_template and save it."
        )
    return tokenizer.get_chat_template()


def _pieces(tokenizer, text: str, spans: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    """The ids before, between and after the words at `spans`."""
    pieces, number = [[] for _ in range(len(spans) + 1)], 0
    for token, (start, end) in zip(*encode(tokenizer, text), strict=True):
        while number < len(spans) and start >= spans[number][1]:
            number += 1
        if number == len(spans) or end <= spans[number][0]:
            pieces[number].append(token)
            continue
        outside = text[start : spans[number][0]] + text[spans[number][1] : end]
        if outside.strip():
            raise _underivable(f"the tokenizer joins a turn with the {outside!r} next to it", text)
    return [tuple(piece) for piece in pieces]


def _without_leading_space(tokenizer, piece: tuple[int, ...], special: set[int]) -> tuple[int, ...]:
    first = next((i for i, token in enumerate(piece) if token in special), 0)
    return piece if tokenizer.decode(piece[:first]).strip() else piece[first:]


def _underivable(reason: str, text: str) -> TemplateProblem:
    shown = text if len(text) <= 300 else text[:300] + "..."
    return TemplateProblem(
        f"The ids around the turns cannot be derived from the chat template, because {reason}: {shown!r}. Expected a "
        "template that keeps the text of each turn and sets every turn apart in the same way; train on conversations "
        "(--data file.jsonl) rendered by a template with {% generation %} tags instead."
    )
