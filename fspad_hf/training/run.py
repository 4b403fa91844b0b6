"""`fspad-hf train`: a draft for a target, from rows of token ids or from conversations."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from .. import host
from ..configuration_fspad import FSPADConfig
from ..host import note_commit
from ..modeling_fspad import FSPADDraftModel
from ..runtime import check_reachable, quiet_transformers
from .arguments import FSPADTrainingArguments
from .callbacks import LogLines, TrainingInterrupted
from .curve import write_curve
from .data import HELD_OUT_SHARE, DataConfig, TrainingRows, load_training_rows
from .plan import make_plan, print_plan
from .provenance import START
from .targets import shard_layers
from .trainer import FSPADTrainer, last_checkpoint

NOT_TAKEN_OVER = (  # of the configuration of the draft to start from: what is its target's, and its weights'
    "vocab_size", "max_position_embeddings", "target_name_or_path", "target_model_type", "pad_token_id",
    "bos_token_id", "eos_token_id", "weights_sha256",
)  # fmt: skip


def run_training(
    target: str,
    data: DataConfig | Sequence[str],
    args: FSPADTrainingArguments,
    rows: int | None = None,
    draft_vocab_size: int | None = None,
    draft_overrides: dict | None = None,
    start_from: str | None = None,
    target_name: str | None = None,
    dtype: torch.dtype = torch.float32,
    device_map: str | dict | None = None,
    plan: bool = False,
) -> FSPADDraftModel | None:
    """
    Trains a draft for `target` and saves it, with the target's tokenizer, in `args.output_dir`; a run that was
    interrupted goes on where it stood.

    Under `accelerate launch` every process calls it. The main one goes first where files are made (`regenerate`,
    caches of data sets), and its fresh draft is everybody's.

    Args:
        target: path or Hub id; its chat template tells which tokens are the assistant's.
        data: a [`DataConfig`], or what its `data` takes.
        rows: train on so many, the same ones whatever the seed; default all that hold an answer, but for the held-out
            last ones.
        draft_vocab_size: draft only the most frequent ids of the answers; default 16,384, or those of `start_from`;
            0 is all.
        draft_overrides: other fields of [`FSPADConfig`].
        start_from: path or Hub id of a draft whose weights and configuration to begin with: one of the model that
            `target` was fine-tuned from, or one to train further.
        target_name: what the draft's config names as its target, if not `target`.
        dtype: of the target, if it is not quantised.
        device_map: of the target, as `from_pretrained` takes it; default each process's own device.
        plan: print what would be done, and do nothing.

    Raises:
        ValueError, OSError, FloatingPointError: as [`load_training_rows`] and [`FSPADTrainer`].
    """
    from rich.console import Console

    console = Console(quiet=args.process_index > 0)
    data = data if isinstance(data, DataConfig) else DataConfig(data)
    check_trackers(args.report_to)
    check_reachable(target, "target")
    draft_fields, start = {**(draft_overrides or {}), "draft_vocab_size": draft_vocab_size}, None
    if start_from:
        check_reachable(start_from, "start_from")
        with quiet_transformers():
            start = FSPADDraftModel.from_pretrained(start_from, dtype=torch.float32)
        draft_fields = _started_fields(start.config, draft_fields)
        args = replace(args, linear_start=False)
    tokenizer = AutoTokenizer.from_pretrained(target)
    planned = make_plan(target, draft_fields, args.keep_features, start)
    draft_fields["draft_vocab_size"] = planned.draft_vocab_size
    with args.main_process_first():
        model, sources = None, data.data
        if data.regenerate and not plan:
            model = _load(target, dtype, device_map, args)
            sources = regenerated(model, tokenizer, data, args)
        found = load_training_rows(
            sources, tokenizer, data.row_length, data.split, () if model else data.exclude, planned.vocab_size
        )
    chosen, held_out, dropped = choose_rows(found, rows)
    if plan:
        print_plan(planned, target, data, args, chosen, held_out, console)
        _describe(chosen, held_out, dropped, tokenizer, console)
        return None
    model = model or _load(target, dtype, device_map, args)
    if args.shard_target and args.world_size > 1:
        model = shard_layers(model, args.device)
    draft = _make_draft(model, draft_fields, args.seed, start)
    if draft.draft_vocab_ids is not None and (start is None or draft_vocab_size):
        answers = found[: len(found) - found.held_out]
        draft.draft_vocab_ids = frequent_ids(answers.ids[answers.mask].numpy(), len(draft.draft_vocab_ids))
    if target_name:
        draft.config.target_name_or_path = target_name
    _describe(chosen, held_out, dropped, tokenizer, console)
    about = {"target": target_name or public_name(target), "data": [public_name(source) for source in data.data]}
    about |= {"linear_start": args.linear_start, "regenerated": data.regenerate}
    if start is not None:
        about |= {"start_from": public_name(start_from), START: start.config.weights_sha256}
    trainer = FSPADTrainer(draft, model, args, chosen, held_out, tokenizer, about)
    if not sys.stdout.isatty() or args.disable_tqdm:
        for bar in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            trainer.remove_callback(bar)
        trainer.add_callback(LogLines())
    try:
        with quiet_transformers():
            trainer.train(last_checkpoint(args.output_dir))
    except TrainingInterrupted as interrupted:
        if args.process_index == 0:
            print(interrupted, file=sys.stderr)
        raise
    trainer.save_model()
    if args.process_index == 0:
        console.print(trainer.throughput(), highlight=False, soft_wrap=True)
        write_curve(Path(args.output_dir) / "loss.svg", trainer.state.log_history)
    return draft.eval()


def check_trackers(names: list[str]) -> None:
    """`ValueError` for a tracker that transformers does not know, or whose package is not installed."""
    for kind in get_reporting_integration_callbacks(names):
        try:
            kind()
        except RuntimeError as error:
            raise ValueError(f"report_to={names}: {error}") from error


def public_name(name: str) -> str:
    """The name of something for a model card: a Hub id as it is, of a path the last part."""
    return Path(name).resolve().name if Path(name).exists() else name


def load_target(target: str, dtype: torch.dtype, device_map, device: torch.device) -> PreTrainedModel:
    device_map = device_map or (None if device.type == "cpu" else {"": device})
    with quiet_transformers():
        return note_commit(host.load_target(target, dtype=dtype, device_map=device_map)).eval()


def _load(target: str, dtype: torch.dtype, device_map, args: FSPADTrainingArguments) -> PreTrainedModel:
    """In the CPU's memory if it is to be split: no device need hold all of it."""
    device = torch.device("cpu") if args.shard_target and args.world_size > 1 else args.device
    return load_target(target, dtype, device_map, device)


def choose_rows(found: TrainingRows, rows: int | None) -> tuple[TrainingRows, TrainingRows, int]:
    """What is trained on, what is held out, and how many rows hold no answer, which are left out."""
    available = len(found) - found.held_out
    answered = found[:available].counted().mask.any(1).nonzero()[:, 0]
    if rows is not None and not 0 < rows <= len(answered):
        raise ValueError(f"rows={rows}, but the data has {len(answered)} (and {found.held_out} held out).")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(answered))[:rows])
    return found[answered[order]], found[available:], available - len(answered)


def _make_draft(model: PreTrainedModel, fields: dict, seed: int, start: FSPADDraftModel | None) -> FSPADDraftModel:
    torch.manual_seed(seed)
    draft = FSPADDraftModel.from_target(model, **fields).float()
    if start is not None:
        weights = start.state_dict()
        if draft.config.draft_vocab_size != start.config.draft_vocab_size:
            weights["draft_vocab_ids"] = draft.draft_vocab_ids
        draft.load_state_dict(weights)
    return draft


def _started_fields(start: FSPADConfig, fields: dict) -> dict:
    """
    The fields of a draft that begins with another's weights: that one's, but for what its target decides.

    Raises:
        ValueError: `fields` would change more than the drafted vocabulary.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if changed := sorted(given.keys() - {"draft_vocab_size"}):
        raise ValueError(f"{changed} cannot be chosen with start_from: the draft keeps the shape it has there.")
    return {name: getattr(start, name) for name in FSPADConfig.__annotations__ if name not in NOT_TAKEN_OVER} | given


def _describe(
    rows: TrainingRows, held_out: TrainingRows, dropped: int, tokenizer: PreTrainedTokenizerBase, console
) -> None:
    """What is trained on, for human eyes: a loss mask gone wrong shows here and nowhere else."""
    from .preview import preview

    console.print("A row of the data, what is trained on in green and between [[ and ]]:")
    console.print(preview(tokenizer, *rows.row(0)))
    told = f"{len(rows)} rows of {rows.ids.shape[1]}, {float(rows.mask.float().mean()):.0%} in the loss"
    told += f"; {len(held_out)} held out to validate"
    if dropped:
        told += f"; {dropped} left out, for they hold no answer"
    console.print(told, highlight=False)
    if not len(held_out):
        console.print(
            f"Warning: of {len(rows)} rows none is held out, so nothing tells how good the draft gets: its last "
            f"weights are saved. Take {HELD_OUT_SHARE} rows or more.",
            style="yellow", highlight=False, soft_wrap=True,
        )  # fmt: skip


def regenerated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataConfig, args: FSPADTrainingArguments
) -> list[str]:
    """The conversations of `data` answered by the target itself, as files under `args.output_dir`."""
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
    with Progress(console=Console(stderr=True), disable=args.process_index > 0) as progress:
        task = progress.add_task("regenerating", total=len(conversations))
        files = regenerate(
            model, tokenizer, conversations, Path(args.output_dir) / "regenerated", data.regenerate_temperature,
            data.regenerate_tokens, data.row_length, data.regenerate_rows, args.seed, excluded,
            lambda done: progress.update(task, completed=done),
        )  # fmt: skip
    if not files:
        raise ValueError(f"data={list(data.data)}: no conversation's first prompt fits in {data.row_length} tokens.")
    return [str(file) for file in files]


def frequent_ids(tokens: np.ndarray, count: int) -> torch.LongTensor:
    """The `count` most frequent ids of `tokens`, ascending; ties and ids never seen go to the smaller id."""
    counts = np.bincount(tokens.ravel(), minlength=count)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:count]))
