"""`fspad-hf train`: a draft for a target, from rows of token ids or from conversations."""

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .. import host
from ..configuration_fspad import FSPADConfig
from ..host import note_commit
from ..modeling_fspad import FSPADDraftModel
from ..runtime import check_reachable, quiet_transformers
from .checkpoints import has_checkpoint
from .config import DataConfig, TrainingConfig
from .data import HELD_OUT_SHARE, TrainingRows, load_training_rows
from .frozen import FrozenTarget, TargetFeatures
from .interrupt import TrainingInterrupted
from .plan import make_plan, print_plan
from .tracking import TrainingDisplay, check_trackers
from .trainer import CHECKPOINTS, START, train
from .warm_start import warm_start

WARM_START_ROWS = 128
NOT_TAKEN_OVER = (  # of the configuration of the draft to start from: what is its target's, and its weights'
    "vocab_size", "max_position_embeddings", "target_name_or_path", "target_model_type", "pad_token_id",
    "bos_token_id", "eos_token_id", "weights_sha256",
)  # fmt: skip


def run_training(
    target: str,
    data: DataConfig | Sequence[str],
    config: TrainingConfig,
    rows: int | None = None,
    keep_features: bool = False,
    linear_start: bool = True,
    draft_vocab_size: int | None = None,
    draft_overrides: dict | None = None,
    start_from: str | None = None,
    target_name: str | None = None,
    dtype: torch.dtype = torch.float32,
    device_map: str | dict | None = None,
    plan: bool = False,
) -> FSPADDraftModel | None:
    """
    Trains a draft for `target` and saves it, with the target's tokenizer, in `config.output_dir`.

    Under `accelerate launch` every process calls it. The main one goes first where files are made (`regenerate`,
    caches of data sets), and its fresh draft is everybody's.

    Args:
        target: path or Hub id; its chat template tells which tokens are the assistant's.
        data: a [`DataConfig`], or what its `data` takes.
        rows: train on so many, chosen by `config.seed`; default all but the held-out last ones, which validate.
        keep_features: hold the target's features in memory (2 h bytes a token) for later epochs.
        linear_start: begin at the best linear guess, see [`warm_start`].
        draft_vocab_size: draft only the most frequent ids of the data; default all, or those of `start_from`.
        draft_overrides: other fields of [`FSPADConfig`].
        start_from: path or Hub id of a draft whose weights and configuration to begin with: one of the model that
            `target` was fine-tuned from, or one to train further.
        target_name: what the draft's config names as its target, if not `target`.
        dtype: of the target, if it is not quantised.
        device_map: of the target, as `from_pretrained` takes it; default each process's own device.
        plan: print what would be done, and do nothing.

    Raises:
        ValueError, OSError, FloatingPointError: as [`load_training_rows`] and [`train`].
    """
    from rich.console import Console

    state = patient_accelerator()
    console = Console(quiet=not state.is_main_process)
    data = data if isinstance(data, DataConfig) else DataConfig(data)
    check_trackers(config.report_to)
    check_reachable(target, "target")
    draft_fields = {**(draft_overrides or {}), "draft_vocab_size": draft_vocab_size}
    start = None
    if start_from:
        check_reachable(start_from, "start_from")
        with quiet_transformers():
            start = FSPADDraftModel.from_pretrained(start_from, dtype=torch.float32)
        draft_fields = _started_fields(start.config, draft_fields)
    tokenizer = AutoTokenizer.from_pretrained(target)
    planned = make_plan(target, draft_fields, keep_features, start)
    with state.main_process_first():
        model, sources = None, data.data
        if data.regenerate and not plan:
            model = load_target(target, dtype, device_map, state.device)
            sources = regenerated(model, tokenizer, data, config)
        found = load_training_rows(
            sources, tokenizer, data.row_length, data.split, () if model else data.exclude, planned.vocab_size
        )
    chosen, held_out = _choose(found, rows, config.seed)
    if plan:
        print_plan(planned, target, data, config, chosen, held_out, console)
        return None
    model = model or load_target(target, dtype, device_map, state.device)
    draft = _make_draft(model, draft_fields, config.seed, start)
    if draft_vocab_size is not None:
        trained = found[: len(found.ids) - found.held_out]
        draft.draft_vocab_ids = frequent_ids(trained.tokens.numpy(), draft_vocab_size)
    if target_name:
        draft.config.target_name_or_path = target_name
    draft.to(state.device)
    features = TargetFeatures(model, keep=keep_features)
    linear_start = linear_start and start is None
    if linear_start and state.is_main_process and not has_checkpoint(Path(config.output_dir) / CHECKPOINTS):
        embedding = FrozenTarget(model, state.device).embed
        warm_start(draft, embedding, _warm_start_batches(chosen, features, state.device))
    _describe(chosen, held_out, tokenizer, console)
    about = {"target": target_name or public_name(target), "data": [public_name(source) for source in data.data]}
    about |= {"linear_start": linear_start, "regenerated": data.regenerate}
    if start is not None:
        about |= {"start_from": public_name(start_from), START: start.config.weights_sha256}
    try:
        with TrainingDisplay(config, console) as display:
            return train(
                draft, model, chosen.ids, chosen.mask, config, features, display, tokenizer, chosen.segments,
                held_out, about,
            )  # fmt: skip
    except TrainingInterrupted as interrupted:
        if state.is_main_process:
            print(interrupted, file=sys.stderr)
        raise


def patient_accelerator() -> Accelerator:
    """One whose processes wait for the main one for as long as it regenerates, or measures."""
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=1))
    return Accelerator(mixed_precision="no", kwargs_handlers=[waiting])


def public_name(name: str) -> str:
    """The name of something for a model card: a Hub id as it is, of a path the last part."""
    return Path(name).resolve().name if Path(name).exists() else name


def load_target(target: str, dtype: torch.dtype, device_map, device: torch.device) -> PreTrainedModel:
    device_map = device_map or (None if device.type == "cpu" else {"": device})
    with quiet_transformers():
        return note_commit(host.load_target(target, dtype=dtype, device_map=device_map)).eval()


def _choose(found: TrainingRows, rows: int | None, seed: int) -> tuple[TrainingRows, TrainingRows]:
    """What is trained on, and what is held out."""
    available = len(found.ids) - found.held_out
    if rows is not None and not 0 < rows <= available:
        raise ValueError(f"rows={rows}, but the data has {available} (and {found.held_out} held out).")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(available)[:rows])
    return found[order], found[available:]


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


def _describe(rows: TrainingRows, held_out: TrainingRows, tokenizer: PreTrainedTokenizerBase, console):
    """What is trained on, for human eyes: a loss mask gone wrong shows here and nowhere else."""
    from .preview import preview

    answered = rows.mask.any(1).nonzero()
    console.print("A row of the data, what is trained on in green:")
    console.print(preview(tokenizer, *rows.row(int(answered[0]) if len(answered) else 0)))
    share = f"{float(rows.mask.float().mean()):.0%}"
    console.print(
        f"{len(rows.ids)} rows of {rows.ids.shape[1]}, {share} in the loss; {len(held_out.ids)} held out to validate",
        highlight=False,
    )
    if not len(held_out.ids):
        console.print(
            f"Warning: of {len(rows.ids)} rows none is held out, so nothing tells how good the draft gets: its last "
            f"weights are saved, and its coupling is not fitted. Take {HELD_OUT_SHARE} rows or more.",
            style="yellow", highlight=False, soft_wrap=True,
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
    with Progress(console=Console(stderr=True), disable=not PartialState().is_main_process) as progress:
        task = progress.add_task("regenerating", total=len(conversations))
        files = regenerate(
            model, tokenizer, conversations, Path(config.output_dir) / "regenerated", data.regenerate_temperature,
            data.regenerate_tokens, data.row_length, data.regenerate_rows, config.seed, excluded,
            lambda done: progress.update(task, completed=done),
        )  # fmt: skip
    if not files:
        raise ValueError(f"data={list(data.data)}: no conversation's first prompt fits in {data.row_length} tokens.")
    return [str(file) for file in files]


def _warm_start_batches(rows: TrainingRows, features: TargetFeatures, device: torch.device):
    for start in range(0, min(WARM_START_ROWS, len(rows.ids)), 8):
        numbers = list(range(start, min(start + 8, len(rows.ids))))
        some = rows[numbers]
        ids = some.ids.to(device)
        yield ids, features(numbers, ids, some.segments), some.segments


def frequent_ids(tokens: np.ndarray, count: int) -> torch.LongTensor:
    """The `count` most frequent ids of `tokens`, ascending; ties and ids never seen go to the smaller id."""
    counts = np.bincount(tokens.ravel(), minlength=count)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:count]))
