"""`fspad-hf train`: a draft for a target, from rows of token ids or from conversations."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..modeling_fspad import FSPADDraftModel
from .data import TrainingRows, load_training_rows
from .trainer import TargetFeatures, TrainingConfig, train, warm_start

WARM_START_ROWS = 128


@dataclass
class DataConfig:
    """Which data, and how conversations become rows."""

    data: Sequence[str]  # see [`load_training_rows`]
    row_length: int = 1024  # of packed conversations
    split: str = "train"  # of a Hub data set
    exclude: Sequence[str] = ()  # files of prompts; conversations that hold one are dropped
    regenerate: bool = False  # replace the answers of conversations by the target's own ...
    regenerate_temperature: float = 0.0  # ... drawn so
    regenerate_tokens: int = 512  # ... and at most so long
    regenerate_rows: int = 16  # ... and so many at once


def run_training(
    target: str,
    data: DataConfig | Sequence[str],
    config: TrainingConfig,
    rows: int | None = None,
    keep_features: bool = False,
    linear_start: bool = True,
    draft_vocab_size: int | None = None,
    draft_overrides: dict | None = None,
    target_name: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> FSPADDraftModel:
    """
    Trains a draft for `target` and saves it, with the target's tokenizer, in `config.output_dir`.

    Args:
        target: path or Hub id; its chat template tells which tokens are the assistant's.
        data: a [`DataConfig`], or what its `data` takes.
        rows: train on so many, chosen by `config.seed`; default all but the held-out last ones.
        keep_features: hold the target's features in memory (2 h bytes a token) for later epochs.
        linear_start: begin at the best linear guess, see [`warm_start`].
        draft_vocab_size: draft only the most frequent ids of the data.
        draft_overrides: other fields of [`FSPADConfig`].
        target_name: what the draft's config names as its target, if not `target`.
    """
    from rich.console import Console

    console = Console()
    data = data if isinstance(data, DataConfig) else DataConfig(data)
    tokenizer = AutoTokenizer.from_pretrained(target)
    vocab_size = AutoConfig.from_pretrained(target).get_text_config().vocab_size
    model = None
    if data.regenerate:
        model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval()
        data = DataConfig(regenerated(model, tokenizer, data, config), data.row_length)
    found = load_training_rows(data.data, tokenizer, data.row_length, data.split, data.exclude, vocab_size)
    trained = found[: len(found.ids) - found.held_out]
    available = len(trained.ids)
    if rows is not None and not 0 < rows <= available:
        raise ValueError(f"rows={rows}, but the data has {available} (and {found.held_out} held out).")
    chosen = trained[torch.from_numpy(np.random.default_rng(config.seed).permutation(available)[:rows])]
    model = model or AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
    torch.manual_seed(config.seed)
    draft = FSPADDraftModel.from_target(model, **(draft_overrides or {}), draft_vocab_size=draft_vocab_size).float()
    if draft.config.draft_vocab_size is not None:
        draft.draft_vocab_ids = frequent_ids(_documents(trained).numpy(), draft.config.draft_vocab_size)
    if target_name:
        draft.config.target_name_or_path = target_name
    features = TargetFeatures(model, keep=keep_features)
    if linear_start and not (Path(config.output_dir) / "checkpoint").exists():
        warm_start(draft, model.get_input_embeddings(), _warm_start_batches(chosen, features))

    def report(record: dict):
        values = "  ".join(f"{k} {record[k]:.3f}" for k in ("loss", "feature", "logit", "top1"))
        console.print(f"step {record['step']}/{config.steps}  {values}", highlight=False)

    _describe(chosen, tokenizer, config, console)
    return train(draft, model, chosen.ids, chosen.mask, config, features, report, tokenizer, chosen.segments)


def _describe(rows: TrainingRows, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig, console):
    """What is trained on, for human eyes: a loss mask gone wrong shows here and nowhere else."""
    from .preview import preview

    answered = rows.mask.any(1).nonzero()
    console.print("A row of the data, what is trained on in green:")
    console.print(preview(tokenizer, *rows.row(int(answered[0]) if len(answered) else 0)))
    console.print(
        f"{len(rows.ids)} rows of {rows.ids.shape[1]}, {float(rows.mask.float().mean()):.0%} in the loss; "
        f"{asdict(config)}",
        highlight=False, markup=False,
    )  # fmt: skip


def regenerated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataConfig, config: TrainingConfig
) -> list[str]:
    """The conversations of `data` answered by the target itself, as files under `config.output_dir`."""
    from rich.console import Console
    from rich.progress import Progress

    from .conversations import load_conversations
    from .data import is_token_rows
    from .exclusion import load_excluded
    from .regenerate import regenerate

    if rows := [source for source in data.data if is_token_rows(source)]:
        raise ValueError(f"data={rows} are rows of tokens: only conversations can be regenerated.")
    excluded = load_excluded(data.exclude)
    conversations = [c for source in data.data for c in load_conversations(str(source), data.split)]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("regenerating", total=len(conversations))
        files = regenerate(
            model, tokenizer, conversations, Path(config.output_dir) / "regenerated", data.regenerate_temperature,
            data.regenerate_tokens, data.row_length, data.regenerate_rows, config.seed, excluded,
            lambda done: progress.update(task, completed=done),
        )  # fmt: skip
    if not files:
        raise ValueError(f"data={list(data.data)}: no conversation's first prompt fits in {data.row_length} tokens.")
    return [str(file) for file in files]


def _documents(rows: TrainingRows) -> torch.LongTensor:
    """The ids of the rows in one line, without padding."""
    return rows.ids.flatten() if rows.segments is None else rows.ids[rows.segments > 0]


def _warm_start_batches(rows: TrainingRows, features: TargetFeatures):
    for start in range(0, min(WARM_START_ROWS, len(rows.ids)), 8):
        numbers = list(range(start, min(start + 8, len(rows.ids))))
        some = rows[numbers]
        yield some.ids, features(numbers, some.ids, some.segments), some.segments


def frequent_ids(tokens: np.ndarray, count: int) -> torch.LongTensor:
    """The `count` most frequent ids of `tokens`, ascending; ties and ids never seen go to the smaller id."""
    counts = np.bincount(tokens.ravel(), minlength=count)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:count]))
