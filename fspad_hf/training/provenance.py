"""Where a draft comes from: what a checkpoint must agree with, and the training.json beside the weights."""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import accelerate
import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..configuration_fspad import FSPADConfig
from ..modeling_fspad import FSPADDraftModel
from ..runtime import quiet_transformers, write_json
from .arguments import FSPADTrainingArguments
from .data import TrainingRows

PROVENANCE = "training.json"
SETTINGS = "settings.json"  # of the run, in each of its checkpoints
START = "start_sha256"  # of the weights that a run begins with
LEARNT = ("weights_sha256", "target_name_or_path")  # no settings of a run
CURVE = (  # the arguments that the curve of losses is a function of
    "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "adam_beta1",
    "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "clip_grad_value", "feature_weight", "logit_weight",
    "noise", "self_steps", "self_step_decay", "top_k_weight", "top_k", "target_top_k", "bf16", "fp16", "seed",
    "eval_rows", "eval_tokens", "metric_for_best_model",
)  # fmt: skip


def run_settings(
    args: FSPADTrainingArguments, draft: FSPADDraftModel, target: PreTrainedModel, rows: TrainingRows,
    held_out: TrainingRows | None,
) -> dict[str, object]:  # fmt: skip
    """What the curve of losses is a function of: JSON values by name."""
    shape = {name: getattr(draft.config, name) for name in FSPADConfig.__annotations__}
    shape |= asdict(draft.speculation_config)
    found = {name: getattr(args, name) for name in CURVE} | {
        "batch_rows": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "target": target.name_or_path or type(target).__name__,
        "target_revision": getattr(target.config, "_commit_hash", None),
        "target_dtype": str(target.dtype).removeprefix("torch."),
        "data_sha256": rows.sha256(),
        "held_out_sha256": held_out.sha256() if held_out is not None else None,
        **{f"draft_{name.removeprefix('draft_')}": value for name, value in shape.items() if name not in LEARNT},
    }
    return json.loads(json.dumps(found, default=str))


def make_provenance(trainer, seconds: float) -> dict[str, object]:
    """
    How the draft of an [`FSPADTrainer`] was trained: a flat mapping of scalars and lists of scalars.

    Args:
        seconds: of all sittings.
    """
    from .. import __version__

    rows, held_out, state, device = trainer.rows, trainer.held_out, trainer.state, trainer.args.device
    best = state.best_global_step
    ended = best is not None and trainer.args.load_best_model_at_end and not trainer.is_in_train
    made = {
        "rows": len(rows),
        "row_length": rows.ids.shape[1],
        "tokens": len(rows.tokens),
        "tokens_in_the_loss": int(rows.mask[:, 1:].sum()),
        "held_out_rows": 0 if held_out is None else len(held_out),
        **{name: value for name, value in trainer.settings.items() if not name.startswith("draft_")},  # config.json
        "steps": state.global_step,
        "weights_of_step": best if ended else state.global_step,
        "tokens_seen": state.num_input_tokens_seen,
        "epochs": round(state.epoch or 0, 2),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}",
        "processes": trainer.args.world_size,
        "seconds": round(seconds, 1),
        "fspad_hf": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
    }
    last = next((log for log in reversed(state.log_history) if "loss" in log), {})
    made |= {f"final_{name}": last[name] for name in ("loss", "feature", "logit", "top1") if name in last}
    if best is not None:
        found = next(log for log in state.log_history if log["step"] == best and "eval_loss" in log)
        made |= {f"validation_{name[5:]}": value for name, value in found.items() if name.startswith("eval_")}
        made["best_step"] = best
    return made


def read_provenance(folder: Path) -> dict:
    """A draft's training.json; empty if it has none."""
    path = folder / PROVENANCE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save_draft(
    draft: FSPADDraftModel, folder: Path, tokenizer, provenance: dict[str, object], state_dict: dict | None = None
) -> None:
    """
    The draft and its training.json, which is gone for as long as the weights are being replaced.

    Raises:
        OSError: they cannot be written, as on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROVENANCE).unlink(missing_ok=True)
    try:
        with quiet_transformers():
            draft.save_pretrained(folder, tokenizer=tokenizer, state_dict=state_dict)
        write_json(folder / PROVENANCE, provenance | {"weights_sha256": draft.config.weights_sha256})
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The draft cannot be written to {str(folder)!r} ({getattr(error, 'strerror', None) or error}): make room "
            "there and run the same command again; the last checkpoint stands."
        ) from error
