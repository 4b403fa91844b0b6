"""Conversations whose answers are the target's own: the user's turns stay, the assistant's are written anew."""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conversations import UNFINISHED, user_turns
from .exclusion import is_excluded
from .selfplay import SEED_STRIDE, eos_ids, target_identity
from .shards import ShardFolder
from .templates import encode, render

Conversation = list[dict[str, str | bool]]


@torch.no_grad()
def regenerate(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Conversation],
    output: str | os.PathLike,
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    row_length: int = 1024,
    batch_rows: int = 16,
    seed: int = 0,
    excluded: list[str] | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """
    Answers every user's turn of every conversation by the target's `generate`, and saves batch by batch.

    Each answer is given to the conversation as regenerated so far. A conversation ends with an answer that
    `max_new_tokens` cut short (marked unfinished, so that nothing the target did not write is trained on), or before a
    prompt of `row_length` tokens. An interrupted run goes on with the next batch.

    Args:
        target: in eval mode, on its device.
        output: the folder of answers-00000.jsonl, ... (`messages`) and manifest.json.
        temperature: of the answers; 0 is greedy.
        excluded: normalised prompts; a conversation with one of them is dropped.
        report: called with the number of conversations done, after each batch.

    Returns:
        The files, for [`load_conversations`].

    Raises:
        ValueError: settings that make no sense, or a folder begun with other ones.
    """
    if temperature < 0 or max_new_tokens < 1 or batch_rows < 1:
        raise ValueError(
            f"temperature={temperature}, max_new_tokens={max_new_tokens}, batch_rows={batch_rows}: expected 0 or "
            "more, 1 or more and 1 or more."
        )
    asked = [c for c in conversations if not is_excluded(user_turns(c), excluded or ())]
    if not asked:
        raise ValueError(f"None of {len(conversations)} conversations is left to answer: all hold excluded prompts.")
    settings = {
        "kind": "regenerated",
        **target_identity(target, tokenizer),
        "conversations_sha256": sha256(json.dumps(asked).encode("utf-8")).hexdigest(),
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "row_length": row_length,
        "batch_rows": batch_rows,
        "seed": seed,
    }
    folder = ShardFolder(output, settings, "answers", ".jsonl")
    for number in range(len(folder.shards)):
        folder.read(number)
    for start in range(len(folder.shards) * batch_rows, len(asked), batch_rows):
        report(start)
        batch = asked[start : start + batch_rows]
        answerer = _Answerer(target, tokenizer, temperature, max_new_tokens, row_length)
        with torch.random.fork_rng(devices=[target.device] if target.device.type == "cuda" else []):
            torch.manual_seed(seed * SEED_STRIDE + start // batch_rows)
            answered = answerer.answer(batch)
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in answered if messages]
        answers = sum(message["role"] == "assistant" for messages in answered for message in messages)
        counts = {"conversations": len(lines), "answers": answers, "dropped_too_long": len(batch) - len(lines)}
        folder.add("".join(lines).encode("utf-8"), counts)
    report(len(asked))
    return [folder.path / shard["file"] for shard in folder.shards if shard["conversations"]]


class _Answerer:
    """One batch: round r answers the r-th time the assistant is asked, in all conversations that come so far."""

    def __init__(self, target, tokenizer, temperature: float, max_new_tokens: int, row_length: int):
        self.target, self.tokenizer, self.row_length = target, tokenizer, row_length
        self.stop_ids = eos_ids(target, tokenizer)
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(self.stop_ids), 0)
        self.padding = padding
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        self.options = {
            "max_new_tokens": max_new_tokens, "do_sample": bool(temperature), "num_beams": 1, "pad_token_id": padding,
            "eos_token_id": sorted(self.stop_ids) or None, **sampling,
        }  # fmt: skip

    def answer(self, batch: list[Conversation]) -> list[Conversation]:
        """The conversations with the target's answers, each up to its last one; empty where there is none."""
        answered: list[Conversation] = [[] for _ in batch]
        left = [list(messages) for messages in batch]
        while True:
            prompts = {}
            for number, rest in enumerate(left):
                while rest and rest[0]["role"] != "assistant":
                    answered[number].append(rest.pop(0))
                if rest:
                    rest.pop(0)
                    prompt = encode(self.tokenizer, render(self.tokenizer, answered[number], prompt=True))[0]
                    if len(prompt) < self.row_length:
                        prompts[number] = prompt
                    else:
                        rest.clear()
            if not prompts:
                return [_up_to_last_answer(messages) for messages in answered]
            for number, (text, finished) in zip(prompts, self._generate(list(prompts.values())), strict=True):
                message = {"role": "assistant", "content": text}
                if not finished:
                    left[number].clear()
                    message |= {"content": text.rstrip("\ufffd"), UNFINISHED: True}  # half of a character's bytes
                if finished or message["content"].strip():
                    answered[number].append(message)

    def _generate(self, prompts: list[list[int]]) -> list[tuple[str, bool]]:
        """(text, whether it ended by itself) of each answer."""
        longest, device = max(map(len, prompts)), self.target.device
        ids = torch.tensor([[self.padding] * (longest - len(p)) + p for p in prompts], device=device)
        seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        made = self.target.generate(ids, attention_mask=seen, **self.options)[:, longest:].tolist()
        found = []
        for tokens in made:
            end = next((i for i, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
            found.append((self.tokenizer.decode(tokens[:end], skip_special_tokens=True), end < len(tokens)))
        return found


def _up_to_last_answer(messages: Conversation) -> Conversation:
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    return messages
