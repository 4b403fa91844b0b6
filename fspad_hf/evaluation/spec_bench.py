"""Questions to generate answers to: Spec-Bench (hemingkx/Spec-Bench, Apache-2.0), or the user's own."""

import hashlib
import http.client
import json
import os
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime import cache_folder, status, write_file

TASKS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
PUBLISHED = "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"
PUBLISHED_SHA256 = "4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04"


@dataclass(frozen=True)
class Question:
    """
    Args:
        number: its line, from 1.
        turns: the user's messages; each is asked after the answer to the one before.
        opening: messages before the first turn.
    """

    number: int
    task: str
    turns: tuple[str, ...]
    opening: tuple[dict[str, str], ...] = field(default=())


def read_questions(
    path: str | Path | None, per_task: int | None = None, tasks: list[str] | None = None
) -> list[Question]:
    """
    Spec-Bench's questions, task by task; the eight MT-bench categories are one task.

    Args:
        path: question.jsonl, one object a line with `category` and `turns`; `None`: the [`published_questions`].
        per_task: so many of each task, spread evenly over the file (MT-bench's categories are sorted in it).
        tasks: only these of `TASKS`.

    Raises:
        ValueError: a line that is not such an object, an unknown category or task, or no question at all.
        OSError: the file cannot be read, or the published one cannot be had.
    """
    if per_task is not None and per_task < 1:
        raise ValueError(f"per_task={per_task} leaves no question: expected 1 or more.")
    unknown = sorted(set(tasks or ()) - set(TASKS))
    if unknown:
        raise ValueError(f"tasks={unknown} are unknown: expected some of {list(TASKS)}.")
    path = published_questions() if path is None else path
    found: dict[str, list[Question]] = {task: [] for task in TASKS}
    for number, record in _lines(path):
        try:
            category, turns = record["category"], record["turns"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with `category` and `turns` ({error!r})."
            ) from error
        task = "mt_bench" if category in MT_BENCH else category
        if task not in found or not _are_texts(turns):
            raise ValueError(
                f"{path}, line {number}: category {category!r} with turns {str(turns)[:60]!r}: expected one of "
                f"{sorted({*TASKS, *MT_BENCH} - {'mt_bench'})} and a list of texts."
            )
        found[task].append(Question(number, task, tuple(turns)))
    chosen = []
    for task, questions in found.items():
        if not tasks or task in tasks:
            step = max(len(questions) // per_task, 1) if per_task else 1
            chosen += questions[::step][:per_task]
    if not chosen:
        raise ValueError(f"{path} holds no question of {list(tasks or TASKS)}.")
    return chosen


def read_prompts(path: str | Path) -> list[Question]:
    """
    The user's own prompts: JSON lines with `prompt` (a text) or `messages` (a chat that ends with the user's turn),
    and optionally `task`, by which tables group them.

    Raises:
        ValueError: a line that is neither, or none at all.
    """
    questions = []
    for number, record in _lines(path):
        task = record.get("task", "prompts") if isinstance(record, dict) else None
        messages = [{"role": "user", "content": record.get("prompt")}] if isinstance(record, dict) else []
        if isinstance(record, dict) and "messages" in record:
            messages = record["messages"]
        whole = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
        if not whole or messages[-1].get("role") != "user" or not _are_texts([m.get("content") for m in messages]):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with `prompt` (a text) or `messages` (a list of "
                '{"role": ..., "content": ...} that ends with the user\'s), ' + f"got {str(record)[:80]!r}."
            )
        questions.append(Question(number, str(task), (messages[-1]["content"],), tuple(messages[:-1])))
    if not questions:
        raise ValueError(f"{path} holds no prompt: expected a JSON object a line.")
    return questions


def published_questions(cache_dir: str | os.PathLike | None = None) -> Path:
    """
    Spec-Bench's question.jsonl, downloaded once.

    Args:
        cache_dir: where it is kept; by default `$FSPAD_HF_CACHE`, else `~/.cache/fspad_hf`.

    Raises:
        OSError: it cannot be had, or is another file than the one that figures here were measured on.
    """
    cache = cache_folder(cache_dir)
    path = cache / "spec_bench_question.jsonl"
    if not path.is_file():
        try:
            with (
                status(f"Downloading Spec-Bench's questions to {path} (0.7 MB, once)"),
                urllib.request.urlopen(PUBLISHED, timeout=60) as answer,
            ):
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:  # of the latter, an answer that is cut short
            raise OSError(
                f"The Spec-Bench questions could not be downloaded from {PUBLISHED} ({error}); go online, or pass a "
                "copy with --questions FILE."
            ) from error
        if (found := hashlib.sha256(content).hexdigest()) != PUBLISHED_SHA256:
            raise OSError(
                f"What came from {PUBLISHED} has the sha256 {found}, expected {PUBLISHED_SHA256}: it is damaged, or "
                "was changed since; to use it all the same, save it and pass it with --questions FILE."
            )
        cache.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    return path


def _lines(path: str | Path):
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or f"byte {getattr(error, 'start', '?')} is no UTF-8"
        raise OSError(
            f"{str(path)!r} cannot be read ({why}): expected a UTF-8 file of a JSON object a line."
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would cut a text at U+2028
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: expected a JSON object ({error}).") from error


def _are_texts(values) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) and v.strip() for v in values)
