"""Conversations from files and data sets, as token ids and loss masks."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .templates import TemplateProblem, encode, has_generation_tags, render

ROLES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant", "tool": "tool",
}  # fmt: skip
UNFINISHED = "unfinished"  # true on an answer that was cut: what would close it was never written
EXPECTED = "`messages` (role, content), ShareGPT's `conversations` (from, value), or `prompt` and `completion`"


def load_conversations(source: str, split: str = "train") -> list[list[dict[str, str]]]:
    """
    The conversations of a source, each a list of {"role", "content"}; an answer that was cut has "unfinished", too.

    Args:
        source: a .jsonl file, read as it is; a .json or .parquet file or a Hub data set id, read by `datasets`.
        split: of a Hub data set.

    Raises:
        ValueError: nothing there, or a record that is no conversation; the message names the line.
        ModuleNotFoundError: `datasets` is needed and not installed.
    """
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        records: Iterable = _json_lines(path)
    else:
        records = _dataset(source, split)
    found = [conversation(record, f"{source}, record {number}") for number, record in enumerate(records, start=1)]
    if not found:
        raise ValueError(f"{source} is empty: expected conversations, each with {EXPECTED}.")
    return found


def conversation(record, where: str) -> list[dict[str, str]]:
    """A record in one of the known forms as messages; `ValueError`, naming `where`, if it is in none."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {_shown(record)}: expected a JSON object with {EXPECTED}.")
    for turns, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if isinstance(record.get(turns), list):
            return [_message(turn, role, content, where) for turn in record[turns]]
    prompt, completion = record.get("prompt"), record.get("completion")
    if prompt is not None and completion is not None:
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        given = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        if isinstance(asked, list) and isinstance(given, list):
            return [_message(turn, "role", "content", where) for turn in (*asked, *given)]
    raise ValueError(f"{where} has the keys {sorted(record)}: expected {EXPECTED}.")


def user_turns(messages: list[dict[str, str]]) -> list[str]:
    """What the user says."""
    return [message["content"] for message in messages if message["role"] == "user"]


def tokenize(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """
    Ids of a conversation, and True on the tokens that the assistant writes: each answer and what closes it. If the
    last message is unfinished, the ids end with it.

    A template with `{% generation %}` says itself which they are. For any other one, answer i is what rendering the
    first i messages and it adds to rendering those before it with the assistant's opening.

    Raises:
        TemplateProblem: a rendered beginning is not the beginning of the rendered whole, or the mask is all True or,
            although there are answers, all False.
    """
    if has_generation_tags(tokenizer):
        made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(made["input_ids"]), [bool(inside) for inside in made["assistant_masks"]]
    else:
        text = render(tokenizer, messages)
        ids, offsets = encode(tokenizer, text)
        spans = _answer_spans(tokenizer, messages, text)
        mask = [any(start >= a and start < b for a, b in spans) for start, _ in offsets]
    if all(mask) or (not any(mask) and any(message["role"] == "assistant" for message in messages)):
        kind = "every token" if all(mask) else "no token"
        raise TemplateProblem(
            f"By the chat template {kind} of a conversation of {len(messages)} messages is the assistant's: expected "
            "some. Mark the assistant's turns in the template by {% generation %} ... {% endgeneration %}."
        )
    if messages and messages[-1].get(UNFINISHED):
        until = encode(tokenizer, render(tokenizer, messages, unfinished=True))[0]
        kept = next((i for i, pair in enumerate(zip(ids, until, strict=False)) if pair[0] != pair[1]), len(until))
        ids, mask = ids[:kept], mask[:kept]
    return ids, mask


def _answer_spans(tokenizer, messages: list[dict[str, str]], text: str) -> list[tuple[int, int]]:
    """(start, end) in `text` of each answer with what closes it; white space after that is the template's."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:number], prompt=True) if number else ""
        until = render(tokenizer, messages[: number + 1])
        if not (text.startswith(before) and text.startswith(until) and len(before) < len(until)):
            raise TemplateProblem(
                f"The chat template renders the beginning of a conversation (its first {number + 1} messages) "
                "otherwise than within the whole, so that the assistant's tokens cannot be told. Mark them "
                "in the template by {% generation %} ... {% endgeneration %}."
            )
        answer = until[len(before) :]
        closed = answer.rstrip()
        if closed.strip() == message["content"].strip():  # nothing but white space closes it
            closed = answer
        spans.append((len(before), len(before) + len(closed)))
    return spans


def _message(turn, role: str, content: str, where: str) -> dict[str, str]:
    if not isinstance(turn, dict) or role not in turn or content not in turn:
        raise ValueError(f"{where} has the turn {_shown(turn)}: expected an object with `{role}` and `{content}`.")
    if turn[role] not in ROLES:
        raise ValueError(f"{where} has a turn of {turn[role]!r}: expected one of {sorted(ROLES)}.")
    said = turn[content]
    if isinstance(said, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in said):
        said = "".join(part["text"] for part in said)
    seen = {part.get("type") for part in said if isinstance(part, dict)} if isinstance(said, list) else set()
    if seen & {"image", "image_url", "video", "audio"}:
        raise ValueError(
            f"{where} has the turn {_shown(turn)}: a draft cannot be trained on images or sound yet, only on text; "
            "leave such conversations out. A draft trained on text speculates behind images all the same."
        )
    if not isinstance(said, str):
        raise ValueError(f"{where} has the turn {_shown(turn)}: expected a text in `{content}`.")
    cut = {UNFINISHED: True} if turn.get(UNFINISHED) is True else {}
    return {"role": ROLES[turn[role]], "content": said, **cut}


def _json_lines(path: Path) -> Iterator:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number} is not JSON ({error}): expected an object a line."
                    ) from error


def _dataset(source: str, split: str):
    path, options = Path(source), {}
    if path.suffix in (".jsonl", ".json", ".parquet") or path.exists():
        if not path.is_file() or path.suffix not in (".json", ".parquet"):
            raise ValueError(
                f"data={source!r} is no data to train on: expected a .jsonl, .json, .parquet or .npy file, a folder "
                "of .npy files, or a Hub data set id."
            )
        source, split, options = path.suffix[1:], "train", {"data_files": str(path)}
    from datasets import exceptions, load_dataset

    try:
        return load_dataset(source, split=split, **options)
    except (exceptions.DatasetsError, ValueError) as error:  # pyarrow's are ValueErrors
        raise ValueError(f"data={options.get('data_files', source)!r} cannot be read: {error}") from error


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
