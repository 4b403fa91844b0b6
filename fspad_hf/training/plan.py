"""`fspad-hf train --plan`: the run as it would be, from configurations and data alone."""

from dataclasses import dataclass

import torch
from transformers import AutoConfig

from ..host import target_class
from ..modeling_fspad import FSPADDraftModel, config_for_target
from .config import DataConfig, TrainingConfig
from .data import TrainingRows


@dataclass(frozen=True)
class Plan:
    """
    What the target's configuration tells before its weights are read.

    Args:
        hidden_size: of the features.
        parameters: of the draft.
        keep_features: whether features are to be held in memory.
        start_from: the draft whose weights are the first ones.
    """

    vocab_size: int
    hidden_size: int
    parameters: int
    keep_features: bool
    start_from: str | None


def make_plan(target: str, draft_fields: dict, keep_features: bool, start: FSPADDraftModel | None = None) -> Plan:
    """
    Builds target and draft without memory for their weights.

    Args:
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
        draft = FSPADDraftModel.from_target(model, **draft_fields)
    parameters = sum(parameter.numel() for parameter in draft.parameters())
    began = None if start is None else start.name_or_path
    return Plan(draft.config.vocab_size, draft.config.hidden_size, parameters, keep_features, began)


def print_plan(
    plan: Plan, target: str, data: DataConfig, config: TrainingConfig, rows: TrainingRows, held_out: TrainingRows,
    console,
) -> None:  # fmt: skip
    """Every setting, and what follows from them, a line each."""
    tokens = rows.ids.numel() if rows.segments is None else int((rows.segments > 0).sum())
    kept = rows.ids.numel() * plan.hidden_size * 2 / 2**30
    lines = {
        "target": target,
        **vars(data),
        **vars(config),
        "rows": f"{len(rows.ids)} of {rows.ids.shape[1]} tokens, {len(held_out.ids)} more held out",
        "tokens": f"{tokens:,}, {int(rows.mask[:, 1:].sum()):,} of them in the loss",
        "epochs": f"{config.steps * config.batch_rows / len(rows.ids):.2f}",
        "draft": f"{plan.parameters:,} parameters, {plan.parameters * 16 / 2**30:.2f} GiB with gradients and moments",
        "start_from": plan.start_from,
        "features": f"{kept:.2f} GiB if kept, which they are{'' if plan.keep_features else ' not'}",
        "output": config.output_dir,
    }
    if data.regenerate:
        lines["rows"] += " (of the answers as they are; they will be regenerated)"
    for name, value in lines.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        console.print(f"{name:<22} {shown}", highlight=False, markup=False, soft_wrap=True)
