"""How a draft is trained: transformers' own arguments, with our defaults, and what the method adds."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

import torch
from accelerate import PartialState
from transformers import HfArgumentParser, TrainingArguments

AT_LEAST = {
    "noise": 0, "feature_weight": 0, "logit_weight": 0, "self_steps": 1, "top_k_weight": 0, "top_k": 1,
    "target_top_k": 1, "eval_rows": 1, "eval_tokens": 1,
}  # fmt: skip
ABOVE = {"clip_grad_value": 0, "learning_rate": 0, "self_step_decay": 0}


@dataclass
class FSPADTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] for [`FSPADTrainer`].

    The defaults follow our own runs: AdamW at 1e-3, betas (0.9, 0.95), a cosine after 30 steps, gradients clipped by
    value. The paper's are 5e-5, 2,000 warm-up steps and 20 epochs of batches of 16. A row in a batch is a row of the
    data set; the target's features and losses are fp32, or bf16 with `bf16=True`.

    Raises:
        ValueError: a value that makes no sense; the message names it.
    """

    num_train_epochs: float = field(default=10, metadata={"help": "Epochs, unless max_steps says how many steps."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows a forward, on each device."})
    learning_rate: float = field(default=1e-3, metadata={"help": "The highest one."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "After the warm-up: cosine, linear, ..."})
    warmup_steps: float = field(default=30, metadata={"help": "Steps, or below 1 a share of them."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip by norm; 0: by clip_grad_value alone."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A loss that is no number ends the run."})
    eval_strategy: str = field(default="steps", metadata={"help": "steps, epoch, or no: at the end alone."})
    eval_steps: float | None = field(default=250, metadata={"help": "Steps between two evaluations."})
    save_steps: float = field(default=100, metadata={"help": "Steps between two checkpoints; evaluations save, too."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best among them."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Save the best draft, not the last."})
    metric_for_best_model: str | None = field(default="tau", metadata={"help": "tau, coupled_tau, loss, top1, ..."})
    seed: int = field(default=0, metadata={"help": "Of the order of rows, of the noise, and of a fresh draft."})
    report_to: str | list[str] = field(default="none", metadata={"help": "tensorboard, wandb, trackio, ..."})
    include_num_input_tokens_seen: str | bool = field(default="all", metadata={"help": "Log tokens a second."})
    ddp_timeout: int = field(default=86_400, metadata={"help": "Seconds that processes wait for the main one."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "A draft has none."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "A draft's never change."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Columns are read by name."})

    feature_weight: float = field(default=1.0, metadata={"help": "Of the regressed feature in the loss."})
    logit_weight: float = field(default=0.1, metadata={"help": "Of the tokens in the loss."})
    noise: float = field(default=0.1, metadata={"help": "U(-noise, noise) * 512 / row length, on the input features."})
    clip_grad_value: float = field(default=0.5, metadata={"help": "The largest gradient of a weight."})
    self_steps: int = field(default=1, metadata={"help": "Runs of the draft, after the first on its own features."})
    self_step_decay: float = field(default=1.0, metadata={"help": "Run j weighs decay^(j-1) in their mean."})
    top_k_weight: float = field(default=0.0, metadata={"help": "Of the target's first tokens, once more (HASS)."})
    top_k: int = field(default=10, metadata={"help": "How many tokens those are."})
    target_top_k: int = field(default=64, metadata={"help": "The target's likeliest tokens that are learnt from."})
    keep_features: str | bool = field(
        default=False, metadata={"help": "Read the target once: into this folder, or (True) into memory."}
    )
    shard_target: bool = field(default=False, metadata={"help": "Split the target's layers over the processes."})
    linear_start: bool = field(default=False, metadata={"help": "Begin at the best linear guess, see [`warm_start`]."})
    eval_rows: int = field(default=32, metadata={"help": "Held-out rows that are evaluated on, at most."})
    eval_tokens: int = field(default=512, metadata={"help": "Their tokens in simulated rounds, about."})

    def __post_init__(self):
        if self.eval_steps == 0:
            self.eval_strategy, self.eval_steps = "no", None
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "feature", "logit"))
        # Every evaluation is followed by a checkpoint (StepChecks), so their steps need not be multiples.
        best, self.load_best_model_at_end = self.load_best_model_at_end and self.eval_strategy != "no", False
        self.use_cpu |= not torch.accelerator.is_available()  # else bf16 is refused there
        super().__post_init__()
        self.load_best_model_at_end = best
        self.dataloader_pin_memory &= self.device.type != "cpu"
        for name, least in AT_LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small: expected {least} or more.")
        for name, bound in ABOVE.items():
            if not getattr(self, name) > bound:
                raise ValueError(f"{name}={getattr(self, name)}: expected more than {bound}.")
        if self.self_step_decay > 1:
            raise ValueError(f"self_step_decay={self.self_step_decay}: expected more than 0, at most 1.")

    def with_batch(self, rows: int | None) -> "FSPADTrainingArguments":
        """With optimiser steps of so many rows over all processes, in as few forwards as fit; `None`: as it is."""
        if rows is None:
            return self
        own, processes = rows, self.world_size
        if rows < 1 or rows % processes:
            raise ValueError(f"batch_rows={rows} cannot be shared by {processes} processes: expected a multiple.")
        own //= processes
        most = min(self.per_device_train_batch_size, own)
        forward = next(size for size in range(most, 0, -1) if own % size == 0)
        return replace(self, per_device_train_batch_size=forward, gradient_accumulation_steps=own // forward)


def started(args: TrainingArguments) -> PartialState:
    """The processes of a launch, which a first look at the device sets up."""
    assert args.device is not None
    return args.distributed_state


OTHER_OPTIONS = {  # of a file for fspad-hf train, beside the arguments and those of the data
    "target", "rows", "target_name", "dtype", "device_map", "draft_vocab_size", "draft_overrides", "start_from",
    "batch_rows", "mixed_precision",
}  # fmt: skip
OLD_NAMES = {
    "output": "output_dir", "steps": "max_steps", "micro_rows": "per_device_train_batch_size",
    "schedule": "lr_scheduler_type", "clip_value": "clip_grad_value", "validate_every": "eval_steps",
    "checkpoint_every": "save_steps", "validate_rows": "eval_rows", "validate_tokens": "eval_tokens",
    "best_by": "metric_for_best_model", "log_every": "logging_steps",
}  # fmt: skip


def given_arguments(words: Sequence[str]) -> dict[str, object]:
    """The fields of [`FSPADTrainingArguments`] that a command line gives; others end the program, as in argparse."""
    parser = HfArgumentParser(FSPADTrainingArguments, prog="fspad-hf train", add_help=False, allow_abbrev=False)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return vars(parser.parse_args(list(words)))


def read_arguments_file(path: str | Path) -> dict[str, object]:
    """
    The options in a YAML or JSON file: a mapping of names, spelt with - or _, to values.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, or a name that is not known.
    """
    import yaml

    from .data import DataConfig

    kinds = {f.name: f.type for f in (*fields(FSPADTrainingArguments), *fields(DataConfig))}
    known, text = sorted(OTHER_OPTIONS | OLD_NAMES.keys() | kinds.keys()), Path(path).read_text(encoding="utf-8")
    try:
        found = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"config={str(path)!r} is neither YAML nor JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"config={str(path)!r} holds a {type(found).__name__}: expected names and values.")
    options = {str(name).replace("-", "_"): value for name, value in found.items()}
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"config={str(path)!r} has the unknown keys {unknown}: expected any of {known}.")
    options = {OLD_NAMES.get(name, name): value for name, value in options.items()}
    return {name: _typed(name, value, kinds.get(name)) for name, value in options.items()}


def _typed(name: str, value, kind):
    """As the field wants it: YAML reads `1e-3` as text, and JSON has no integers."""
    kinds = get_args(kind) or (kind,)
    if bool in kinds and str not in kinds and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected true or false.")
    if value is None or str in kinds or not {int, float} & set(kinds):
        return value
    return as_number(name, value, float if float in kinds else int)


def as_number(name: str, value, kind: type) -> int | float:
    """What is meant is taken, anything else refused."""
    try:
        found = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found) or (kind is int and not found.is_integer()):
        expected = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name}={value!r}: expected {expected}.")
    return kind(found)
