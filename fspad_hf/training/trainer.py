"""The training loop: the target's features online, the two losses, one AdamW step after another (accelerate)."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel

from ..modeling_fspad import FSPADDraftModel
from .checkpoints import Checkpoints
from .config import TrainingConfig
from .coupling import fit_coupling
from .data import TrainingRows
from .frozen import FrozenTarget, TargetFeatures
from .interrupt import TrainingInterrupted, noticed_interrupts
from .losses import draft_loss
from .packing import continues
from .provenance import make_provenance, run_settings, save_draft
from .schedule import learning_rate_at, noise_seeds, step_rows
from .tracking import check_trackers, trackers
from .validation import documents, validate

CHECKPOINTS = "checkpoint"  # in the output folder
COUPLING_ROWS = 48
SUMS = ("feature", "logit", "top1")


def train(
    draft: FSPADDraftModel,
    target: PreTrainedModel,
    rows: torch.LongTensor,
    masks: torch.BoolTensor,
    config: TrainingConfig,
    features: Callable[[list[int], torch.LongTensor], torch.Tensor] | None = None,
    report: Callable[[dict], None] = lambda record: None,
    tokenizer=None,
    segments: torch.LongTensor | None = None,
    held_out: TrainingRows | None = None,
    about: dict[str, object] | None = None,
) -> FSPADDraftModel:
    """
    Trains `draft` in place and saves it under `config.output_dir`; picks an interrupted run up where it stood.

    Under `accelerate launch` every process calls it with the same arguments, and each step's rows are shared out. The
    main process's draft is everybody's, and it alone writes files and reports.

    Args:
        draft: fp32 weights; it is moved to accelerate's device.
        target: frozen, wherever and however it runs: on another device, split by a device map, quantised.
        rows (`[rows, length]`), masks (`[rows, length]`): token ids, and True on the assistant's tokens.
        features: as [`TargetFeatures`], which is the default.
        tokenizer: the target's, saved with the draft.
        segments (`[rows, length]`): of packed rows, see [`pack`]; `features` is then called with the batch's, too.
        held_out: rows to validate on (see [`validate`]) and to fit coupled drafting to. With them, the weights that
            validated best are the ones saved; without them, the last.
        report: called with a record (step, loss, feature, logit, top1, tokens, learning_rate) after each step; where a
            validation took place its numbers are in it, too, as validation_loss and so on.
        about: what else training.json should say, or say otherwise: scalars and lists of them.

    Raises:
        ValueError: nothing to train on, masks that keep nothing, settings that do not fit, a checkpoint of another
            run.
        FloatingPointError: the loss is not a number; the last checkpoint stands.
        OSError: a checkpoint cannot be written; the last one stands.
        TrainingInterrupted: Ctrl-C (or SIGTERM) came; a checkpoint was written first.
    """
    data = _counted(TrainingRows(rows, masks, segments))
    held_out = held_out if held_out is not None and len(held_out.ids) else None
    check_trackers(config.report_to)
    accelerator = Accelerator(
        mixed_precision="no",  # autocast is ours: accelerate's cannot change between two runs of one process
        log_with=list(config.report_to) or None,
        project_dir=str(Path(config.output_dir) / "runs"),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    _check(draft, data, config, accelerator)
    settings = run_settings(draft, target, data, held_out, config)
    _check_agreement(settings, accelerator)
    draft.to(accelerator.device).train()
    target = target.eval().requires_grad_(False)
    frozen, features = FrozenTarget(target, accelerator.device), features or TargetFeatures(target)
    frozen.check_sampling(config.head_sample)
    frequent = _frequent(data, target)
    optimizer = torch.optim.AdamW(draft.parameters(), betas=config.betas, weight_decay=config.weight_decay, fused=True)
    checkpoints = Checkpoints(Path(config.output_dir) / CHECKPOINTS, settings)
    progress = checkpoints.load(draft, optimizer)
    model = accelerator.prepare(draft)

    with noticed_interrupts() as interrupts, trackers(accelerator, config) as track:
        for step in range(progress.step, config.steps):
            began = time.perf_counter()
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            head = frozen.head
            if config.head_sample:
                head = frozen.sampled_head(frequent[: config.head_sample], config.head_extra, generator)
            sums, positions, tokens = _gradients(model, frozen, head, features, data, step, config, accelerator)
            *sums, stopped = accelerator.reduce(
                torch.cat((sums, sums.new_tensor([float(interrupts.came)]))), reduction="sum"
            ).tolist()
            record = {"step": step + 1, **_means(sums, positions, config), "tokens": tokens}
            _check_finite(record, config)
            accelerator.clip_grad_value_(draft.parameters(), config.clip_value)
            record["learning_rate"] = learning_rate_at(step, config)
            for group in optimizer.param_groups:
                group["lr"] = record["learning_rate"]
            optimizer.step()
            optimizer.zero_grad()

            progress.step, last = step + 1, step + 1 == config.steps
            progress.record = {name: record[name] for name in ("loss", *SUMS)}
            due = held_out is not None and (
                last or (config.validate_every and (step + 1) % config.validate_every == 0)
            )
            if due:
                measured = _validate(draft, target, held_out, config, accelerator)
                record |= {f"validation_{name}": value for name, value in measured.items()}
                if _better(measured, progress.best, config):
                    progress.best = {"step": step + 1, **measured}
            progress.seconds += time.perf_counter() - began
            if due or last or stopped or _every(config.checkpoint_every, step + 1):
                checkpoints.save(draft, optimizer, progress)
            if accelerator.is_main_process:
                report(record)
            track(record)
            if stopped:
                raise TrainingInterrupted(step + 1, config)

    draft.eval()
    best = progress.best.get("step", config.steps)
    saved = best if best != config.steps and checkpoints.load_weights(draft, best) else config.steps
    fitted = _fit_coupling(draft, target, held_out, config, accelerator)
    if accelerator.is_main_process:
        told = make_provenance(
            draft, settings, data, held_out, config, progress, accelerator.num_processes, accelerator.device
        )
        save_draft(
            draft, Path(config.output_dir), tokenizer, {**told, "weights_of_step": saved, **fitted, **(about or {})}
        )
    accelerator.wait_for_everyone()
    return draft


def _gradients(
    model: nn.Module, frozen: FrozenTarget, head: Callable, features: Callable, data: TrainingRows, step: int,
    config: TrainingConfig, accelerator: Accelerator,
) -> tuple[torch.Tensor, int, int]:  # fmt: skip
    """
    The step's gradients, micro-batch by micro-batch.

    Returns:
        This process's sums (`[3]`), and of all processes the masked positions and the tokens.
    """
    torch.manual_seed(config.seed * 1_000_003 + step)  # nothing draws from it unless the draft has dropout
    everyones = step_rows(len(data.ids), step, config)
    positions = max(int(data.mask[everyones][:, 1:].sum()), 1)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    chosen, seeds = everyones[mine], noise_seeds(step, config)[mine]
    device, sums = accelerator.device, torch.zeros(3, device=accelerator.device)
    for start in range(0, len(chosen), config.micro_rows):
        micro = slice(start, start + config.micro_rows)
        numbers, batch = chosen[micro], data[chosen[micro]]
        ids, mask = batch.ids.to(device).long(), batch.mask.to(device)
        parts = None if batch.segments is None else batch.segments.to(device)
        known = features(numbers, ids) if parts is None else features(numbers, ids, parts)
        last = start + config.micro_rows >= len(chosen)
        with nullcontext() if last else accelerator.no_sync(model):  # gradients cross processes once a step
            with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                part = draft_loss(model, frozen.embed, head, ids, known, mask, config.noise, parts, seeds[micro])
                loss = (config.feature_weight * part.feature + config.logit_weight * part.logit) / positions
            accelerator.backward(loss * accelerator.num_processes)  # DDP averages over processes
        sums += torch.stack([getattr(part, name).detach().to(sums) for name in SUMS])
    return sums, positions, data.ids[everyones].numel()


def _means(sums: list[float], positions: int, config: TrainingConfig) -> dict[str, float]:
    means = {name: value / positions for name, value in zip(SUMS, sums, strict=True)}
    return {"loss": config.feature_weight * means["feature"] + config.logit_weight * means["logit"], **means}


def _every(steps: int, step: int) -> bool:
    return steps > 0 and step % steps == 0


def _validate(draft, target, held_out, config, accelerator) -> dict[str, float]:
    def reduce(sums: torch.Tensor) -> torch.Tensor:
        alone = accelerator.num_processes == 1
        return sums if alone else accelerator.reduce(sums.to(accelerator.device), reduction="sum")

    return validate(draft, target, held_out, config, accelerator.process_index, accelerator.num_processes, reduce)


def _better(measured: dict[str, float], best: dict[str, float], config: TrainingConfig) -> bool:
    """By tau, and by the loss where that is asked for, tau ties or there was nothing to simulate."""

    def rank(found: dict[str, float]) -> tuple[float, float]:
        tau = found.get("tau", 0.0) if config.best_by == "tau" else 0.0
        return tau, -found.get("loss", math.inf)

    return not best or rank(measured) > rank(best)


def _fit_coupling(draft, target, held_out, config, accelerator) -> dict[str, float]:
    """[`fit_coupling`] on the main process; its outcome is everybody's. What to record of it."""
    if held_out is None or not config.coupling_positions:
        return {}
    fitted = [{}]
    if accelerator.is_main_process:
        texts = [(ids, mask) for ids, mask in documents(held_out[:COUPLING_ROWS]) if mask[2:].any()]
        if texts:
            ids, masks = (
                nn.utils.rnn.pad_sequence(list(parts), batch_first=True) for parts in zip(*texts, strict=True)
            )
            fitted = [fit_coupling(draft, target, ids, masks, config.coupling_positions, config.seed)]
    fitted = broadcast_object_list(fitted)[0]
    if fitted:
        draft.config.coupling_sharpness, draft.config.coupling_kappa = fitted["sharpness"], fitted["kappa"]
    return {f"coupling_{name}": value for name, value in fitted.items()}


def _counted(rows: TrainingRows) -> TrainingRows:
    """The rows with a mask that is off where no draft of the document could have guessed the token."""
    if rows.segments is None:
        return rows
    return TrainingRows(rows.ids, rows.mask & continues(rows.segments), rows.segments)


def _frequent(rows: TrainingRows, target: PreTrainedModel) -> torch.LongTensor:
    used = rows.ids.flatten() if rows.segments is None else rows.ids[rows.segments > 0]
    return used.bincount(minlength=target.config.get_text_config().vocab_size).argsort(descending=True, stable=True)


def _check(draft: FSPADDraftModel, rows: TrainingRows, config: TrainingConfig, accelerator: Accelerator) -> None:
    if len(rows.ids) == 0 or not rows.mask[:, 1:].any():
        raise ValueError(
            f"Nothing to train on: {len(rows.ids)} rows, {int(rows.mask.sum())} of their tokens in the loss."
        )
    if draft.dtype != torch.float32:
        raise ValueError(f"The draft is in {draft.dtype}: expected float32 weights; call draft.float() first.")
    if config.batch_rows % accelerator.num_processes:
        raise ValueError(
            f"batch_rows={config.batch_rows} cannot be shared by {accelerator.num_processes} processes: expected a "
            "multiple of them."
        )


def _check_agreement(settings: dict[str, object], accelerator: Accelerator) -> None:
    theirs = broadcast_object_list([settings])[0]
    if differing := [name for name, value in settings.items() if theirs[name] != value]:
        raise ValueError(
            f"Process {accelerator.process_index} and the main process differ in {differing}: expected the same "
            "command and files on every machine; with --regenerate, an output folder that all of them share."
        )


def _check_finite(record: dict, config: TrainingConfig) -> None:
    if not math.isfinite(record["loss"]):
        raise FloatingPointError(
            f"The loss is {record['loss']} at step {record['step']}: lower learning_rate={config.learning_rate}; the "
            f"last good checkpoint stands in {Path(config.output_dir) / CHECKPOINTS}."
        )
