"""Prompts that training data must not contain: those a draft is measured on.

Spec-Bench's own are always kept out: `spec_bench_prompts.txt` holds the [`fingerprint`] of every turn of its
question.jsonl, a line each, sorted.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path


def normalised(text: str) -> str:
    """Lower case, and single spaces in place of any white space."""
    return " ".join(text.split()).casefold()


def load_excluded(paths: Sequence[str | Path]) -> list[str]:
    """
    The prompts to keep out, normalised.

    Args:
        paths: JSONL files of objects with `turns` (Spec-Bench's question.jsonl), every turn a prompt; or, with any
            other suffix, text files of one prompt a line.

    Raises:
        ValueError: a file without prompts, or a line that is no such object.
    """
    prompts: dict[str, None] = {}
    for path in map(Path, paths):
        found = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                found += _turns(path, number, line) if path.suffix == ".jsonl" else [line]
        found = [prompt for prompt in map(normalised, found) if prompt]
        if not found:
            raise ValueError(f"exclude={str(path)!r} holds no prompts: expected question.jsonl, or one prompt a line.")
        prompts.update(dict.fromkeys(found))
    return list(prompts)


def is_excluded(user_turns: Iterable[str], prompts: Sequence[str]) -> bool:
    """Whether one of the user's turns contains one of the (normalised) prompts, or is one of Spec-Bench's."""
    return any(
        fingerprint(text) in spec_bench_fingerprints() or any(prompt in text for prompt in prompts)
        for text in map(normalised, user_turns)
    )


def fingerprint(prompt: str) -> str:
    """The first 16 hexadecimal digits of the sha256 of a normalised prompt."""
    return sha256(prompt.encode("utf-8")).hexdigest()[:16]


@cache
def spec_bench_fingerprints() -> frozenset[str]:
    return frozenset((files(__package__) / "spec_bench_prompts.txt").read_text(encoding="ascii").split())


def _turns(path: Path, number: int, line: str) -> list[str]:
    try:
        turns = json.loads(line)["turns"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}, line {number}: expected a JSON object with `turns` ({error!r}).") from error
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(f"{path}, line {number}: `turns` is {str(turns)[:60]!r}: expected a list of texts.")
    return turns
