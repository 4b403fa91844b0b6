"""`fspad-hf train --plan`: the run as it would be, from configurations and data alone."""

import math
from dataclasses import dataclass

import torch
from transformers import AutoConfig

from ..host import target_class
from ..modeling_fspad import FSPADDraftModel, config_for_target
from .arguments import FSPADTrainingArguments
from .data import DataConfig, TrainingRows
from .provenance import CURVE
from .targets import TOP_K

DRAFTED = 16_384  # ids, of a larger vocabulary
SHOWN = (*CURVE, "per_device_train_batch_size", "gradient_accumulation_steps", "eval_strategy", "eval_steps")
SHOWN += ("save_steps", "save_total_limit", "linear_start", "report_to")


@dataclass(frozen=True)
class Plan:
    """
    What the target's configuration tells before its weights are read.

    Args:
        hidden_size: of the features.
        draft_vocab_size: the ids that are drafted; `None` is all.
        parameters: of the draft.
        keep_features: whether the target is read once, and where that is kept.
        start_from: the draft whose weights are the first ones.
    """

    vocab_size: int
    hidden_size: int
    draft_vocab_size: int | None
    parameters: int
    keep_features: str | bool
    start_from: str | None


def make_plan(
    target: str, draft_fields: dict, keep_features: str | bool = False, start: FSPADDraftModel | None = None
) -> Plan:
    """
    Builds target and draft without memory for their weights.

    Args:
        draft_fields: of [`FSPADConfig`]; a `draft_vocab_size` of `None` is `DRAFTED` where the target has more, and 0
            is all.
        start: the draft to start from.

    Raises:
        ValueError: a draft of these fields does not fit the target, or `start` is for other ones.
    """
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(target)
        model = target_class(config).from_config(config)
        if start is not None:
            fresh = config_for_target(model)
            for name in ("hidden_size", "vocab_size"):
                if getattr(start.config, name) != getattr(fresh, name):
                    raise ValueError(
                        f"start_from={start.name_or_path!r} has {name}={getattr(start.config, name)}, a draft for "
                        f"{target!r} has {getattr(fresh, name)}: expected a draft of this target, or of the model "
                        "that it was fine-tuned from."
                    )
        drafted, vocab_size = draft_fields.get("draft_vocab_size"), config.get_text_config().vocab_size
        if drafted is None and vocab_size > DRAFTED:
            drafted = DRAFTED
        draft = FSPADDraftModel.from_target(model, **{**draft_fields, "draft_vocab_size": drafted or None})
    parameters = sum(parameter.numel() for parameter in draft.parameters())
    began = None if start is None else start.name_or_path
    return Plan(
        draft.config.vocab_size, draft.config.hidden_size, draft.config.draft_vocab_size, parameters, keep_features,
        began,
    )  # fmt: skip


def print_plan(
    plan: Plan, target: str, data: DataConfig, args: FSPADTrainingArguments, rows: TrainingRows,
    held_out: TrainingRows, console,
) -> None:  # fmt: skip
    """Every setting, and what follows from them, a line each."""
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps
    if steps < 1:
        steps = math.ceil(args.num_train_epochs * math.ceil(len(rows) / batch))
    kept = rows.ids.numel() * (plan.hidden_size * 2 + TOP_K * 6) / 2**30
    lines = {
        "target": target,
        **vars(data),
        **{name: getattr(args, name) for name in SHOWN},
        "rows": f"{len(rows)} of {rows.ids.shape[1]} tokens, {len(held_out)} more held out",
        "tokens": f"{len(rows.tokens):,}, {int(rows.mask[:, 1:].sum()):,} of them in the loss",
        "steps": f"{steps} of {batch} rows, {steps * batch / len(rows):.2f} epochs",
        "draft": f"{plan.parameters:,} parameters, {plan.parameters * 16 / 2**30:.2f} GiB with gradients and moments",
        "draft_vocab_size": plan.draft_vocab_size or "all",
        "start_from": plan.start_from,
        "keep_features": f"{plan.keep_features}; kept, they take {kept:.2f} GiB",
        "output": args.output_dir,
    }
    if data.regenerate:
        lines["rows"] += " (of the answers as they are; they will be regenerated)"
    for name, value in lines.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        console.print(f"{name:<27} {shown}", highlight=False, markup=False, soft_wrap=True)
