"""The training loop: the target's features online, the two losses, one AdamW step after another (accelerate)."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel

from ..modeling_fspad import FSPADDraftModel
from .checkpoints import Checkpoints, Progress
from .config import TrainingConfig
from .coupling import fit_coupling
from .data import TrainingRows
from .frozen import FrozenTarget, TargetFeatures
from .interrupt import Interrupts, TrainingInterrupted, noticed_interrupts
from .losses import Objective, draft_loss
from .packing import continues
from .provenance import make_provenance, run_settings, save_draft
from .schedule import learning_rate_at, noise_seeds, step_rows
from .tracking import check_trackers, trackers
from .validation import documents, validate

CHECKPOINTS = "checkpoint"  # in the output folder
START = "start_sha256"
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
    Trains `draft` in place and saves it under `config.output_dir`; picks an interrupted run up where it stood. Each
    step's record is a line of losses.jsonl there.

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
        about: what else training.json should say, or say otherwise: scalars and lists of them. A run of another
            `start_sha256`, the weights that the draft begins with, is another run.

    Raises:
        ValueError: nothing to train on, masks that keep nothing, settings that do not fit, a checkpoint of another
            run.
        FloatingPointError: the loss or a gradient is not a finite number; the last checkpoint stands.
        OSError: a checkpoint cannot be written; the last one stands.
        TrainingInterrupted: Ctrl-C (or SIGTERM) came; a checkpoint was written first.
    """
    check_trackers(config.report_to)
    accelerator = Accelerator(
        mixed_precision="no",  # autocast is ours: accelerate's cannot change between two runs of one process
        log_with=list(config.report_to) or None,
        project_dir=str(Path(config.output_dir) / "runs"),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    data = _counted(TrainingRows(rows, masks, segments))
    _check(draft, data, config, accelerator)
    target = target.eval().requires_grad_(False)
    frozen = FrozenTarget(target, accelerator.device)
    frozen.check_sampling(config.head_sample)
    objective = Objective(config.self_steps, config.self_step_decay, config.top_k_weight, config.top_k)
    held_out = held_out if held_out is not None and len(held_out.ids) else None
    features = features or TargetFeatures(target)
    run = _Run(accelerator, config, objective, draft, target, frozen, features, data, held_out)

    settings = run_settings(draft, target, data, held_out, config)
    settings |= {name: value for name, value in (about or {}).items() if name == START}
    _check_agreement(settings, accelerator)
    draft.to(accelerator.device).train()
    optimizer = torch.optim.AdamW(draft.parameters(), betas=config.betas, weight_decay=config.weight_decay, fused=True)
    checkpoints = Checkpoints(Path(config.output_dir) / CHECKPOINTS, settings)
    progress = checkpoints.load(draft, optimizer)
    model = accelerator.prepare(draft)

    with noticed_interrupts() as interrupts, trackers(accelerator, config, progress.step) as track:
        for step in range(progress.step, config.steps):
            began, last = time.perf_counter(), step + 1 == config.steps
            record, stopped = _gradients(run, model, step, interrupts)
            accelerator.clip_grad_value_(draft.parameters(), config.clip_value)
            for group in optimizer.param_groups:
                group["lr"] = record["learning_rate"]
            optimizer.step()
            optimizer.zero_grad()

            progress.step, progress.record = step + 1, {name: record[name] for name in ("loss", *SUMS)}
            validating = held_out is not None and (last or _every(config.validate_every, step + 1))
            if validating:
                record |= _validate(run, progress)
            progress.seconds += time.perf_counter() - began
            track(record)  # before the checkpoint: what a resumed run has lost it also logs again
            if validating or last or stopped or _every(config.checkpoint_every, step + 1):
                checkpoints.save(draft, optimizer, progress)
            if accelerator.is_main_process:
                report(record)
            if stopped:
                raise TrainingInterrupted(step + 1, config)
    return _finish(run, checkpoints, progress, tokenizer, about or {})


@dataclass
class _Run:
    """What does not change from step to step."""

    accelerator: Accelerator
    config: TrainingConfig
    objective: Objective
    draft: FSPADDraftModel
    target: PreTrainedModel
    frozen: FrozenTarget
    features: Callable
    data: TrainingRows
    held_out: TrainingRows | None

    @cached_property
    def frequent(self) -> torch.LongTensor:
        """All ids of the vocabulary, the most frequent in the data first."""
        counts = self.data.tokens.bincount(minlength=self.target.config.get_text_config().vocab_size)
        return counts.argsort(descending=True, stable=True)

    def head(self, step: int) -> Callable:
        config = self.config
        if not config.head_sample:
            return self.frozen.head
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        return self.frozen.sampled_head(self.frequent[: config.head_sample], config.head_extra, generator)


def _gradients(run: _Run, model: nn.Module, step: int, interrupts: Interrupts) -> tuple[dict[str, float], bool]:
    """
    The step's gradients, micro-batch by micro-batch, averaged over the masked positions of all processes.

    Returns:
        The step's record, and whether a process was interrupted; the same on every process.
    """
    config, accelerator, device = run.config, run.accelerator, run.accelerator.device
    torch.manual_seed(config.seed * 1_000_003 + step)  # nothing draws from it unless the draft has dropout
    everyones, head = step_rows(len(run.data.ids), step, config), run.head(step)
    positions = max(int(run.data.mask[everyones][:, 1:].sum()), 1)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    chosen, seeds = everyones[mine], noise_seeds(step, config)[mine]
    sums = torch.zeros(len(SUMS) + 1, device=device)
    for start in range(0, len(chosen), config.micro_rows):
        micro = slice(start, start + config.micro_rows)
        numbers, batch = chosen[micro], run.data[chosen[micro]]
        ids, mask = batch.ids.to(device).long(), batch.mask.to(device)
        parts = None if batch.segments is None else batch.segments.to(device)
        known = run.features(numbers, ids) if parts is None else run.features(numbers, ids, parts)
        last = start + config.micro_rows >= len(chosen)
        with nullcontext() if last else accelerator.no_sync(model):  # gradients cross processes once a step
            with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                part = draft_loss(
                    model, run.frozen.embed, head, ids, known, mask, config.noise, parts, seeds[micro], run.objective
                )
                loss = (config.feature_weight * part.feature + config.logit_weight * part.logit) / positions
            accelerator.backward(loss * accelerator.num_processes)  # DDP averages over processes
        sums[:-1] += torch.stack([getattr(part, name).detach().to(sums) for name in SUMS])
    sums[-1] = interrupts.came
    *totals, stopped = accelerator.reduce(sums, reduction="sum").tolist()
    means = {name: total / positions for name, total in zip(SUMS, totals, strict=True)}
    loss = config.feature_weight * means["feature"] + config.logit_weight * means["logit"]
    largest = torch.nn.utils.get_total_norm([p.grad for p in run.draft.parameters()], math.inf)
    if not (math.isfinite(loss) and largest.isfinite()):  # the weights after such a gradient would be no numbers
        what = f"loss is {loss}" if not math.isfinite(loss) else f"largest gradient is {float(largest)}"
        raise FloatingPointError(
            f"The {what} at step {step + 1}: lower learning_rate={config.learning_rate}; the last good "
            f"checkpoint stands in {Path(config.output_dir) / CHECKPOINTS}."
        )
    record = {"step": step + 1, "loss": loss, **means, "tokens": run.data.ids[everyones].numel()}
    return record | {"learning_rate": learning_rate_at(step, config)}, bool(stopped)


def _validate(run: _Run, progress: Progress) -> dict[str, float]:
    """[`validate`], shared out over the processes; `progress` remembers the best. What to add to the step's record."""
    accelerator = run.accelerator

    def reduce(sums: torch.Tensor) -> torch.Tensor:
        alone = accelerator.num_processes == 1
        return sums if alone else accelerator.reduce(sums.to(accelerator.device), reduction="sum")

    place = accelerator.process_index, accelerator.num_processes
    measured = validate(run.draft, run.target, run.held_out, run.config, *place, reduce)
    if _better(measured, progress.best, run.config):
        progress.best = {"step": progress.step, **measured}
    return {f"validation_{name}": value for name, value in measured.items()}


def _better(measured: dict[str, float], best: dict[str, float], config: TrainingConfig) -> bool:
    """By tau, and by the loss where that is asked for, tau ties or there was nothing to simulate."""

    def rank(found: dict[str, float]) -> tuple[float, float]:
        tau = found.get("tau", 0.0) if config.best_by == "tau" else 0.0
        return tau, -found.get("loss", math.inf)

    return not best or rank(measured) > rank(best)


def _finish(run: _Run, checkpoints: Checkpoints, progress: Progress, tokenizer, about: dict) -> FSPADDraftModel:
    """Saves the best weights, and where they come from."""
    accelerator, config = run.accelerator, run.config
    draft, best = run.draft.eval(), progress.best.get("step", config.steps)
    saved = best if best != config.steps and checkpoints.load_weights(draft, best) else config.steps
    fitted = _fit_coupling(run)
    if accelerator.is_main_process:
        processes, device = accelerator.num_processes, accelerator.device
        told = make_provenance(
            draft, checkpoints.settings, run.data, run.held_out, config, progress, processes, device
        )
        told |= {"weights_of_step": saved, **fitted, **about}
        save_draft(draft, Path(config.output_dir), tokenizer, told)
    accelerator.wait_for_everyone()
    return draft


def _fit_coupling(run: _Run) -> dict[str, float]:
    """[`fit_coupling`] on the main process; its outcome is everybody's. What to record of it."""
    config, draft = run.config, run.draft
    if run.held_out is None or not config.coupling_positions:
        return {}
    fitted = [{}]
    if run.accelerator.is_main_process:
        texts = [(ids, mask) for ids, mask in documents(run.held_out[:COUPLING_ROWS]) if mask[2:].any()]
        if texts:
            padded = [nn.utils.rnn.pad_sequence(list(parts), batch_first=True) for parts in zip(*texts, strict=True)]
            fitted = [fit_coupling(draft, run.target, *padded, config.coupling_positions, config.seed)]
    fitted = broadcast_object_list(fitted)[0]
    if fitted:
        draft.speculation_config.update(coupling_sharpness=fitted["sharpness"], coupling_kappa=fitted["kappa"])
    return {f"coupling_{name}": value for name, value in fitted.items()}


def _every(steps: int, step: int) -> bool:
    return steps > 0 and step % steps == 0


def _counted(rows: TrainingRows) -> TrainingRows:
    """The rows with a mask that is off where no draft of the document could have guessed the token."""
    if rows.segments is None:
        return rows
    return TrainingRows(rows.ids, rows.mask & continues(rows.segments), rows.segments)


def _check(draft: FSPADDraftModel, rows: TrainingRows, config: TrainingConfig, accelerator: Accelerator) -> None:
    if len(rows.ids) == 0 or not rows.mask[:, 1:].any():
        raise ValueError(
            f"Nothing to train on: {len(rows.ids)} rows, {int(rows.mask.sum())} of their tokens in the loss."
        )
    if config.self_steps >= rows.ids.shape[1]:
        raise ValueError(
            f"self_steps={config.self_steps}, but the rows have {rows.ids.shape[1]} tokens: expected fewer steps."
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
