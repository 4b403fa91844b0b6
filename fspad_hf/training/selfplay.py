"""On-policy text with no data set: the target asks itself questions and answers them.

From the bare opening of its chat template the target writes a user's turn, answers it, writes the next turn, and so on
until the row is full. A draft trained on such rows sees what it will have to guess: the target's own words.
"""

import contextlib
import io
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..host import load_target, note_commit
from ..runtime import check_reachable, quiet_transformers, resolve_device, resolve_dtype
from .decode_loop import SelfplayDecoder, TurnTables
from .exclusion import is_excluded, load_excluded, normalised
from .shards import ShardFolder
from .templates import ChatGlue, derive_glue, special_ids, template_sha256

SEED_STRIDE = 1_000_003  # as in training: seeds of neighbouring runs share no shard


@dataclass
class SelfplayConfig:
    """How self-play rows are made. Rows are a function of every field but `rows` and `graph`."""

    rows: int = 1024  # at least so many are kept; the last batch is kept whole
    row_length: int = 1024
    batch_rows: int = 32  # rows decoded side by side, and a shard
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)  # of the answers, by row in turn
    user_temperature: float = 1.0
    seed: int = 0
    exclude: tuple[str, ...] = field(default=())  # files of prompts that no row may contain
    graph: bool = True  # a CUDA graph where there is CUDA

    def __post_init__(self):
        self.temperatures, self.exclude = tuple(self.temperatures), tuple(map(str, self.exclude))
        for name, least in (("rows", 1), ("batch_rows", 1), ("row_length", 8)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too few: expected {least} or more.")
        for temperature in (*self.temperatures, self.user_temperature):
            if not (math.isfinite(temperature) and temperature >= 0):
                raise ValueError(f"temperature {temperature} makes no sense: expected 0 (greedy) or more.")
        if not self.temperatures:
            raise ValueError("temperatures=() leaves the answers without one: expected at least one, such as 0.")


class RowFilter:
    """
    Which rows stay: those with an answer, without a row or a finished user's turn seen before (in an earlier kept row,
    or twice in this one), and without an excluded prompt.
    """

    def __init__(self, glue: ChatGlue, tokenizer: PreTrainedTokenizerBase, excluded: Sequence[str]):
        self.glue, self.tokenizer, self.excluded = glue, tokenizer, excluded
        self.rows: set[bytes] = set()
        self.asked: set[str] = set()

    def verdict(self, row: np.ndarray) -> str:
        """Either "kept", and the row is remembered, or why it is dropped."""
        turns = self.glue.turns(row.tolist())
        asked = [(self.tokenizer.decode(row[a:b].tolist()), done) for role, a, b, done in turns if role == "user"]
        questions = [normalised(text) for text, done in asked if done]
        if not any(role == "assistant" and end > start for role, start, end, _ in turns):
            return "dropped_no_answer"
        if is_excluded((text for text, _ in asked), self.excluded):
            return "dropped_excluded"
        if row.tobytes() in self.rows:
            return "dropped_same_row"
        if len(set(questions)) < len(questions) or not self.asked.isdisjoint(questions):
            return "dropped_same_question"
        self.rows.add(row.tobytes())
        self.asked.update(questions)
        return "kept"

    def answer_tokens(self, row: np.ndarray) -> int:
        """The tokens of a row that train a draft: the answers' and what closes them."""
        closing = len(self.glue.closing)
        answers = [(a, b) for role, a, b, _ in self.glue.turns(row.tolist()) if role == "assistant"]
        return sum(min(end + closing, len(row)) - start for start, end in answers)


def selfplay(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: str | os.PathLike,
    config: SelfplayConfig,
    report: Callable[[int, int], None] = lambda rows, tokens: None,
) -> dict:
    """
    Writes shards of token ids, `[rows, row_length]` uint16 (uint32 above 65,536 ids), and manifest.json.

    A shard is one batch, seeded by its number; an interrupted run goes on with the next, and ends as an uninterrupted
    one would have. A run with more `rows` in the same folder goes on likewise.

    Args:
        target: in eval mode, on its device.
        report: called after each step with the rows in the folder and the tokens written since the start of this call.

    Returns:
        The manifest: settings, versions, totals (rows, tokens, assistant_tokens, dropped_...), shards.

    Raises:
        TemplateProblem: what stands between the turns cannot be derived from the chat template.
        ValueError: settings that do not fit the target or the folder, or a batch of which no row can stay.
    """
    glue = derive_glue(tokenizer)
    text_config = target.config.get_text_config()
    _check_length(config.row_length, glue, text_config)
    excluded = load_excluded(config.exclude)
    folder = ShardFolder(output, _settings(target, tokenizer, config, excluded), "ids", ".npy")
    opening = folder.manifest.setdefault("opening", list(glue.opening))  # a template may name the day
    glue = replace(glue, opening=tuple(opening))
    keep = RowFilter(glue, tokenizer, excluded)
    for number in range(len(folder.shards)):
        for row in np.load(io.BytesIO(folder.read(number)), allow_pickle=False):
            keep.verdict(row)
    if folder.totals.get("rows", 0) >= config.rows:
        return folder.manifest
    stops, special = eos_ids(target, tokenizer), special_ids(tokenizer)
    tables = TurnTables(glue, stops, special, text_config.vocab_size, target.device)
    decoder = SelfplayDecoder(
        target, tables, config.batch_rows, config.row_length, config.user_temperature, config.graph
    )
    dtype = np.uint16 if text_config.vocab_size <= 1 << 16 else np.uint32
    written = 0

    def count(tokens: int):
        nonlocal written
        written += tokens
        report(folder.totals.get("rows", 0), written)

    while folder.totals.get("rows", 0) < config.rows:
        number = len(folder.shards)
        first = number * config.batch_rows
        temperatures = [config.temperatures[(first + i) % len(config.temperatures)] for i in range(config.batch_rows)]
        made = decoder.rows(temperatures, config.seed * SEED_STRIDE + number, count).numpy().astype(dtype)
        kept, counts = _sift(made, temperatures, keep, config)
        content = io.BytesIO()
        np.save(content, kept)
        folder.add(content.getvalue(), counts)
    return folder.manifest


def run_selfplay(
    target: str, output: str, config: SelfplayConfig, device: str | None = None, dtype: str | None = None
) -> dict:
    """`fspad-hf selfplay`: [`selfplay`] of a target by its path or Hub id, with a progress bar on stderr."""
    from rich.console import Console
    from transformers import AutoTokenizer

    place, precision = resolve_device(device), resolve_dtype(dtype, device)
    load_excluded(config.exclude)
    check_reachable(target, "target")
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(target)
        derive_glue(tokenizer)
        model = note_commit(load_target(target, dtype=precision)).to(place).eval()
        with _progress(config) as report:
            manifest = selfplay(model, tokenizer, output, config, report)
    totals = manifest["totals"]
    dropped = ", ".join(
        f"{count} {key[8:].replace('_', ' ')}" for key, count in totals.items() if key[:8] == "dropped_"
    )
    following = ["fspad-hf", "train", "--target", target, "--data", output, "--output", f"{Path(output)}-draft"]
    Console(stderr=True).print(
        f"{totals['rows']} rows, {totals['tokens']} tokens, {totals['assistant_tokens'] / totals['tokens']:.0%} of "
        f"them the assistant's; dropped: {dropped}. Train with:\n  {shlex.join(following)}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return manifest


def eos_ids(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids at which `generate` stops, and the tokenizer's own."""
    stops = target.generation_config.eos_token_id
    stops = stops if isinstance(stops, (list, tuple)) else [stops]
    return {token for token in (*stops, tokenizer.eos_token_id) if token is not None}


def target_identity(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict:
    """What a manifest says of the target: other weights, arithmetic or templates write other text."""
    return {
        "target": target.name_or_path or type(target).__name__,
        "revision": getattr(target.config, "_commit_hash", None),
        "chat_template_sha256": template_sha256(tokenizer),
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": target.device.type,
    }


def _sift(made: np.ndarray, temperatures: list[float], keep: RowFilter, config: SelfplayConfig):
    """The rows that stay, and the shard's counts."""
    reasons = ("no_answer", "excluded", "same_row", "same_question")
    counts = {"rows": 0, "tokens": 0, "assistant_tokens": 0} | {f"dropped_{reason}": 0 for reason in reasons}
    counts |= {f"rows_at_temperature_{t:g}": 0 for t in config.temperatures}
    kept = []
    for row, temperature in zip(made, temperatures, strict=True):
        verdict = keep.verdict(row)
        if verdict != "kept":
            counts[verdict] += 1
            continue
        kept.append(row)
        counts["rows"] += 1
        counts["tokens"] += len(row)
        counts["assistant_tokens"] += keep.answer_tokens(row)
        counts[f"rows_at_temperature_{temperature:g}"] += 1
    if not kept:
        dropped = {key: count for key, count in counts.items() if key.startswith("dropped_") and count}
        raise ValueError(
            f"None of {len(made)} rows of {made.shape[1]} tokens can stay ({dropped}): expected the target to end its "
            "user's turns and to vary them; use an instruction-tuned target, longer rows or a higher "
            "user_temperature."
        )
    return np.stack(kept), counts


def _settings(target: PreTrainedModel, tokenizer, config: SelfplayConfig, excluded: list[str]) -> dict:
    """What the rows are a function of."""
    return {
        "kind": "selfplay",
        **target_identity(target, tokenizer),
        "seed": config.seed,
        "row_length": config.row_length,
        "batch_rows": config.batch_rows,
        "temperatures": list(config.temperatures),
        "user_temperature": config.user_temperature,
        "excluded_prompts": len(excluded),
        "excluded_sha256": sha256("\n".join(excluded).encode("utf-8")).hexdigest(),
    }


def _check_length(row_length: int, glue: ChatGlue, text_config):
    least = len(glue.opening) + len(glue.to_assistant) + 2  # a question and an answer of a token each
    most = getattr(text_config, "max_position_embeddings", None) or row_length
    if not least <= row_length <= most:
        raise ValueError(
            f"row_length={row_length} does not fit: expected at least {least} (the template's own tokens and two "
            f"more) and at most {most} (the target's positions)."
        )


@contextlib.contextmanager
def _progress(config: SelfplayConfig) -> Iterator[Callable[[int, int], None]]:
    """A bar of rows on stderr, with tok/s and the time left; gives the `report` to call."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("self-play"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task, began, first = progress.add_task("rows", total=config.rows, speed=""), time.monotonic(), None

        def report(rows: int, tokens: int):
            nonlocal first
            first = rows if first is None else first
            reached = min(first + tokens / config.row_length, config.rows)  # rows in the making count in part
            speed = f"{tokens / max(time.monotonic() - began, 1e-9):.0f} tok/s"
            progress.update(task, completed=reached, speed=speed)

        yield report
