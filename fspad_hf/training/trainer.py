"""Training a draft as transformers trains models; ours are the loss, the target, and how to evaluate."""

import copy
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerState, default_data_collator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..modeling_fspad import FSPADDraftModel
from ..runtime import changed_settings, counted, write_json
from .arguments import FSPADTrainingArguments
from .callbacks import Interrupts, StepChecks, TrainingInterrupted
from .data import TrainingRows
from .losses import Objective, draft_loss
from .provenance import SETTINGS, START, make_provenance, read_provenance, run_settings, save_draft
from .targets import FrozenTarget, KeptOutputs, TargetOutputs, is_sharded
from .validation import validate
from .warm_start import warm_start

AUTOCAST = ("forward", "_original_forward")  # of a module that accelerate has prepared
LINEAR_START_ROWS = 128
IN_MEMORY = ("memory", "true")
SUMS = ("feature", "logit", "top1", "positions")


class FSPADTrainer(Trainer):
    """
    Trains a draft for a frozen target, by all the means of [`~transformers.Trainer`]: callbacks, `report_to`,
    schedules, checkpoints, accelerate's distributed strategies.

        trainer = FSPADTrainer(model=draft, target=target, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        trainer.save_model()

    Under `accelerate launch` every process makes one with the same arguments.

    Args:
        model: the draft, in float32; trained in place.
        target: on one device or on several, quantised, or split over the processes by [`shard_layers`]; it stays as
            it is.
        args: its `keep_features` reads the target once instead of at every step.
        train_dataset: `input_ids`, `labels` (-100 where a token is not the assistant's) and, of packed rows,
            `position_ids` that start again with each document: a `datasets.Dataset`, or anything [`TrainingRows.of`]
            takes.
        eval_dataset: held-out rows of the same kind, to evaluate on. Without them the last weights are kept, with
            them those of the best `metric_for_best_model`: tau, coupled_tau, loss, top1, ... (see [`validate`]).
        processing_class: the target's tokenizer, saved with the draft.
        about: what else training.json should say, or say otherwise: scalars and lists of them.
        kwargs: callbacks, optimizers, ...: as for [`~transformers.Trainer`].

    Raises:
        ValueError: nothing to train on, a draft that is not in float32, arguments that do not fit the rows.
    """

    def __init__(
        self,
        model: FSPADDraftModel,
        target: PreTrainedModel,
        args: FSPADTrainingArguments,
        train_dataset,
        eval_dataset=None,
        processing_class=None,
        about: dict[str, object] | None = None,
        callbacks: Iterable = (),
        **kwargs,
    ):
        self.rows, self.held_out = TrainingRows.of(train_dataset).counted(), None
        if eval_dataset is not None and len(eval_dataset):
            self.held_out = TrainingRows.of(eval_dataset)
        _check(model, self.rows, args)
        args = copy.copy(args)  # the caller's stay as they are
        if self.held_out is None:
            args.eval_strategy, args.load_best_model_at_end = "no", False
        args._n_gpu = min(args.n_gpu, 1)  # several take accelerate launch: torch's DataParallel copies at every step
        self.interrupts = Interrupts()
        dataset = _Numbered(self.rows)
        super().__init__(
            model, args, default_data_collator, dataset, None if self.held_out is None else _Numbered(self.held_out),
            callbacks=[StepChecks(self.held_out is not None), self.interrupts, *callbacks], **kwargs,
        )  # fmt: skip
        if self.is_fsdp_enabled:
            raise ValueError(
                "accelerate's FSDP would split the draft, which is small and is evaluated whole: expected a plain "
                "distributed launch, with shard_target=True (--shard-target) to split the target's layers."
            )
        model.config.__dict__.pop("use_cache", None)  # which Trainer sets, and no draft has
        self.model_accepts_loss_kwargs = True  # the loss is divided by the positions of the whole step
        self.dataset, self.tokenizer, self.about = dataset, processing_class, about or {}
        self.frozen = FrozenTarget(target.eval().requires_grad_(False), args.device, args.target_top_k)
        self.sharded = is_sharded(target)
        self.objective = Objective(args.self_steps, args.self_step_decay, args.top_k_weight, args.top_k)
        self.settings = run_settings(args, model, target, self.rows, self.held_out)
        self.settings |= {name: value for name, value in self.about.items() if name == START}
        _check_agreement(self.settings, args.process_index)
        self.drafted = None if model.draft_vocab_ids is None else model.draft_vocab_ids.clone()
        self.sums = torch.zeros(len(SUMS), device=args.device)
        self.kept: KeptOutputs | None = None
        self.seconds: Counter[str] = Counter()  # of this process, by what they went to
        self.seconds_before = 0.0  # of the sittings before this one
        self.began: float | None = None  # this one, by time.perf_counter ...
        self.sitting = 0.0  # ... and how long it took

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        As [`~transformers.Trainer.train`], with the target read first where its outputs are kept.

        Args:
            resume_from_checkpoint: a folder, or True for the newest whole checkpoint in the output folder; a run that
                was killed goes on along the curve it would have had.

        Raises:
            ValueError: a checkpoint of another run.
            FloatingPointError: the loss or a gradient is not a finite number; the last checkpoint stands.
            OSError: a checkpoint cannot be written; the last one stands.
            TrainingInterrupted: Ctrl-C (or SIGTERM) came; a checkpoint was written first.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        output = None
        if resume_from_checkpoint:
            self.seconds_before = self._check_checkpoint(resume_from_checkpoint)
        if not (resume_from_checkpoint and self._take_up_ended_run(Path(resume_from_checkpoint))):
            self._keep_features()
            if self.args.linear_start and not resume_from_checkpoint:
                warm_start(self.model, self.frozen.embed, self._linear_start_batches())
            self.began = time.perf_counter()
            self.model.main_input_name = "input_ids"  # whose tokens Trainer counts
            try:
                output = super().train(resume_from_checkpoint, **kwargs)
            finally:
                del self.model.main_input_name
                self.interrupts.restore()
                self.sitting, self.began = time.perf_counter() - self.began, None
            if self.interrupts.came:
                raise TrainingInterrupted(self.state, self.args)
        for name in AUTOCAST:
            self.model.__dict__.pop(name, None)
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The step's part of the loss: [`draft_loss`], divided by the positions of the whole step."""
        args, began = self.args, time.perf_counter()
        ids, segments, mask = inputs["input_ids"], inputs.get("segments"), inputs["labels"] >= 0
        if "features" in inputs:
            known = TargetOutputs(inputs["features"], inputs["top_ids"], inputs["top_log_probs"])
        else:
            known = self.frozen(ids, mask, segments).to(args.device)
        self.seconds["the target"] += time.perf_counter() - began
        with self.accelerator.autocast():
            sums = draft_loss(
                model, self.frozen, ids, known, mask, segments, self.drafted, args.noise, self._noise_seeds(inputs),
                self.objective,
            )  # fmt: skip
            loss = args.feature_weight * sums.feature + args.logit_weight * sums.logit
        self.sums += torch.stack([getattr(sums, name).detach().to(self.sums) for name in SUMS])
        everyones = self.accelerator.num_processes if args.average_tokens_across_devices else 1
        return loss / num_items_in_batch.clamp(min=1) * everyones  # gradients are averaged over processes

    def training_step(self, *args, **kwargs):
        began, before = time.perf_counter(), self.seconds["the target"]
        loss = super().training_step(*args, **kwargs)
        self.seconds["the draft"] += time.perf_counter() - began - (self.seconds["the target"] - before)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            feature, logit, top1, positions = self.accelerator.reduce(self.sums, reduction="sum").tolist()
            self.sums.zero_()
            logs |= {name: value / max(positions, 1) for name, value in zip(SUMS, (feature, logit, top1))}  # noqa: B905
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """[`validate`], shared out over the processes."""
        began = time.perf_counter()
        rows = self.held_out if eval_dataset is None else TrainingRows.of(eval_dataset)
        place = self.accelerator.process_index, self.accelerator.num_processes
        if self.sharded:  # then all processes measure everything
            place = 0, 1

        def reduce(sums: torch.Tensor) -> torch.Tensor:
            return self.accelerator.reduce(sums.to(self.args.device), reduction="sum") if place[1] > 1 else sums

        with self._bare_draft() as draft:
            found = validate(draft, self.frozen.model, rows, self.args, *place, reduce)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.seconds["evaluation"] += time.perf_counter() - began
        # Where no text was long enough to simulate, tau is not known, and no evaluation the best by it.
        unknown = {f"{metric_key_prefix}_{name}": math.nan for name in ("tau", "coupled_tau")}
        return unknown | metrics

    def throughput(self) -> str:
        """Tokens a second of this sitting and what its time went to, as "2,104 tokens/s: the draft 61 %, ..."."""
        if not (whole := self.sitting):
            return "nothing was left to train"
        seconds = dict(self.seconds)
        seconds["reading rows, checkpoints and the optimizer"] = whole - sum(seconds.values())
        tokens = self.state.num_input_tokens_seen - self._initial_num_input_tokens_seen
        shares = [f"{name} {value / whole:.0%}" for name, value in sorted(seconds.items(), key=lambda part: -part[1])]
        line = f"{tokens / whole:,.0f} tokens/s: {', '.join(shares)}"
        if self.seconds["the target"] > 0.3 * whole and self.kept is None:
            line += ". The target is read at every step: keep_features reads it once"
        return line

    def _keep_features(self) -> None:
        """[`KeptOutputs`], made by the main process and read by all."""
        keep = self.args.keep_features
        if not keep:
            return
        folder = None if keep is True or str(keep).lower() in IN_MEMORY else keep
        main = self.args.process_index == 0
        kept = KeptOutputs(self.frozen, self.rows, folder) if folder is None or main or self.sharded else None
        first = broadcast_object_list([kept and kept.made])[0]
        if kept is not None:
            with counted("shards of features", len(kept.starts) - first) if main else nullcontext(_nothing) as advance:
                kept.fill(advance, first, write=main or folder is None)
        self.accelerator.wait_for_everyone()
        if folder is not None and not main:  # what the main process has written
            kept = KeptOutputs(self.frozen, self.rows, folder)
        self.kept = self.dataset.kept = kept

    def _linear_start_batches(self):
        for start in range(0, min(LINEAR_START_ROWS, len(self.rows)), self.args.per_device_train_batch_size):
            part = slice(start, start + self.args.per_device_train_batch_size)
            rows = self.rows[part]
            ids = rows.ids.to(self.args.device)
            if self.kept is None:
                features = self.frozen.features(ids, rows.segments)
            else:
                features = torch.stack([self.kept[row]["features"] for row in range(len(self.rows))[part]])
            yield ids, features.to(self.args.device, torch.float32), rows.segments

    def _noise_seeds(self, inputs) -> list[int]:
        """One a row, by the step and the row: the same noise however rows are spread, and in a resumed run."""
        base = (self.args.seed << 40) + (self.state.global_step << 20)
        return [(base + row) % (1 << 63) for row in inputs["row"].tolist()]

    @contextmanager
    def _bare_draft(self):
        """The draft without the autocast that accelerate puts around its forward, which a copy would keep."""
        draft = self.accelerator.unwrap_model(self.model)
        wrapped = {name: draft.__dict__.pop(name) for name in AUTOCAST if name in draft.__dict__}
        try:
            yield draft
        finally:
            draft.__dict__.update(wrapped)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The draft, its tokenizer and training.json, in place of Trainer's pickled arguments."""
        if not self.args.should_save:
            return
        now = time.perf_counter()
        seconds = self.seconds_before + (self.sitting if self.began is None else now - self.began)
        told = make_provenance(self, seconds) | self.about
        with self._bare_draft() as draft:
            save_draft(draft, Path(output_dir or self.args.output_dir), self.tokenizer, told, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / SETTINGS, self.settings)
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            before = last_checkpoint(self.args.output_dir)
            stands = f"{str(before)!r} stands" if before else "there is none before it"
            raise OSError(
                f"The checkpoint {str(folder)!r} cannot be written ({getattr(error, 'strerror', None) or error}); "
                f"{stands}. Make room there and run the same command again: it goes on from the last checkpoint."
            ) from error

    def _check_checkpoint(self, folder: str | os.PathLike) -> float:
        """That a checkpoint is of this run; the seconds it took to get there."""
        path = Path(folder) / SETTINGS
        theirs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if changes := changed_settings(theirs, self.settings):
            raise ValueError(
                f"The checkpoint in {str(folder)!r} is of other settings ({changes}): repeat the first ones to go on, "
                "delete it to begin again, or name another output."
            )
        return read_provenance(Path(folder)).get("seconds", 0.0)

    def _take_up_ended_run(self, folder: Path) -> bool:
        """Whether the checkpoint is of a run's last step, from which Trainer would do one more; if so it is loaded."""
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return False
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or str(folder))
        self.state, self.is_in_train = state, False
        return True


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest whole checkpoint in an output folder: its state is the last file of it to be written."""
    found = []
    for state in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"):
        try:
            found.append((TrainerState.load_from_json(str(state)).global_step, str(state.parent)))
        except (OSError, ValueError, TypeError):
            continue  # it was being written when the run was killed
    return max(found)[1] if found else None


def _nothing() -> None:
    pass


class _Numbered(Dataset):
    """Rows as a batch needs them, with their numbers and, where it is kept, what the target makes of them."""

    def __init__(self, rows: TrainingRows, kept: KeptOutputs | None = None):
        self.rows, self.kept = rows, kept

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids, mask = self.rows.ids[row], self.rows.mask[row]
        item = {"row": torch.tensor(row), "input_ids": ids, "labels": torch.where(mask, ids, -100)}
        if self.rows.segments is not None:
            item["segments"] = self.rows.segments[row]
        return item if self.kept is None else item | self.kept[row]


def _check(draft: FSPADDraftModel, rows: TrainingRows, args: FSPADTrainingArguments) -> None:
    if len(rows) == 0 or not rows.mask[:, 1:].any():
        raise ValueError(f"Nothing to train on: {len(rows)} rows, {int(rows.mask.sum())} of their tokens in the loss.")
    if args.self_steps >= rows.ids.shape[1]:
        raise ValueError(
            f"self_steps={args.self_steps}, but the rows have {rows.ids.shape[1]} tokens: expected fewer steps."
        )
    if draft.dtype != torch.float32:
        raise ValueError(f"The draft is in {draft.dtype}: expected float32 weights; call draft.float() first.")


def _check_agreement(settings: dict[str, object], process: int) -> None:
    theirs = broadcast_object_list([settings])[0]
    if differing := [name for name, value in settings.items() if theirs[name] != value]:
        raise ValueError(
            f"Process {process} and the main process differ in {differing}: expected the same arguments and the same "
            "data on every machine."
        )
