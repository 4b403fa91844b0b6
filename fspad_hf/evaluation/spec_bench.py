"""The Spec-Bench questions (hemingkx/Spec-Bench, Apache-2.0): six tasks, 80 questions each."""

import json
from pathlib import Path

TASKS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}


def load_questions(path: str | Path, per_task: int | None = None) -> dict[str, list[list[str]]]:
    """
    The turns of each question, by task; the eight MT-bench categories are one task.

    Args:
        path: question.jsonl, one object a line with `category` and `turns`.
        per_task: so many of each task, spread evenly over the file (MT-bench's categories are sorted in it).

    Raises:
        ValueError: a line that is not such an object, or an unknown category.
    """
    questions: dict[str, list[list[str]]] = {task: [] for task in TASKS}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            category, turns = record["category"], record["turns"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with `category` and `turns` ({error!r})."
            ) from error
        task = "mt_bench" if category in MT_BENCH else category
        if task not in questions or not turns or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(
                f"{path}, line {number}: category {category!r} with turns {str(turns)[:60]!r}: expected one of "
                f"{sorted({*TASKS, *MT_BENCH} - {'mt_bench'})} and a list of texts."
            )
        questions[task].append(turns)
    if per_task is not None:
        questions = {task: found[:: max(len(found) // per_task, 1)][:per_task] for task, found in questions.items()}
    return {task: found for task, found in questions.items() if found}
