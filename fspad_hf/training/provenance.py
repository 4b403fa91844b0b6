"""Where a draft comes from: what a checkpoint must agree with, and the training.json beside the weights."""

import platform
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import accelerate
import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..configuration_fspad import FSPADConfig
from ..modeling_fspad import FSPADDraftModel
from ..runtime import quiet_transformers, write_json
from .checkpoints import Progress
from .config import MAY_CHANGE, TrainingConfig
from .data import TrainingRows

PROVENANCE = "training.json"
LEARNT = ("weights_sha256", "coupling_sharpness", "coupling_kappa", "target_name_or_path")  # no settings of a run


def rows_sha256(rows: TrainingRows) -> str:
    """The fingerprint of ids, masks and segments."""
    digest = sha256(str(tuple(rows.ids.shape)).encode())
    for tensor, dtype in ((rows.ids, torch.int32), (rows.mask, torch.uint8), (rows.segments, torch.int16)):
        if tensor is not None:
            digest.update(tensor.to("cpu", dtype).contiguous().numpy())
    return digest.hexdigest()


def run_settings(
    draft: FSPADDraftModel, target: PreTrainedModel, rows: TrainingRows, held_out: TrainingRows | None,
    config: TrainingConfig,
) -> dict[str, object]:  # fmt: skip
    """What the curve of losses is a function of, for [`Checkpoints`]."""
    settings = {name: value for name, value in vars(config).items() if name not in MAY_CHANGE}
    fields = {name: getattr(draft.config, name) for name in FSPADConfig.__annotations__}
    fields |= asdict(draft.speculation_config)
    shape = {f"draft_{name.removeprefix('draft_')}": value for name, value in fields.items() if name not in LEARNT}
    return settings | {
        **_target_identity(target),
        "data_sha256": rows_sha256(rows),
        "held_out_sha256": rows_sha256(held_out) if held_out is not None else None,
        **shape,
    }


def _target_identity(target: PreTrainedModel) -> dict[str, object]:
    """Name, revision (if known) and dtype of a target, all scalars."""
    return {
        "target": target.name_or_path or type(target).__name__,
        "target_revision": getattr(target.config, "_commit_hash", None),
        "target_dtype": str(target.dtype).removeprefix("torch."),
    }


def make_provenance(
    draft: FSPADDraftModel, settings: dict[str, object], rows: TrainingRows, held_out: TrainingRows | None,
    config: TrainingConfig, progress: Progress, processes: int, device: torch.device,
) -> dict[str, object]:  # fmt: skip
    """
    How the draft was trained: a flat mapping of scalars and lists of scalars.

    Args:
        settings: those of [`Checkpoints`], see [`run_settings`].
    """
    from .. import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    made = {
        "rows": len(rows.ids),
        "row_length": rows.ids.shape[1],
        "tokens": rows.ids.numel() if rows.segments is None else int((rows.segments > 0).sum()),
        "tokens_in_the_loss": int(rows.mask[:, 1:].sum()),
        "held_out_rows": 0 if held_out is None else len(held_out.ids),
        **{name: value for name, value in settings.items() if not name.startswith("draft_")},  # config.json has them
        "tokens_seen": config.steps * config.batch_rows * rows.ids.shape[1],
        "epochs": round(config.steps * config.batch_rows / len(rows.ids), 2),
        "parameters": sum(parameter.numel() for parameter in draft.parameters()),
        "device": name,
        "processes": processes,
        "seconds": round(progress.seconds, 1),
        "fspad_hf": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
    }
    made |= {f"final_{name}": progress.record[name] for name in ("loss", "feature", "logit", "top1")}
    if progress.best:
        made |= {f"validation_{name}": value for name, value in progress.best.items() if name != "step"}
        made["best_step"] = progress.best["step"]
    return made


def save_draft(draft: FSPADDraftModel, folder: Path, tokenizer, provenance: dict[str, object]) -> None:
    """
    The draft and its training.json, which is gone for as long as the weights are being replaced.

    Raises:
        OSError: they cannot be written, as on a full disk.
    """
    (folder / PROVENANCE).unlink(missing_ok=True)
    try:
        with quiet_transformers():
            draft.save_pretrained(folder, tokenizer=tokenizer)
        write_json(folder / PROVENANCE, provenance | {"weights_sha256": draft.config.weights_sha256})
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The draft cannot be written to {str(folder)!r} ({getattr(error, 'strerror', None) or error}); the "
            "checkpoint of the last step stands. Make room there and run the same command again."
        ) from error
