"""Checkpoints: weights, AdamW's moments and the run's progress, one safetensors file a checkpoint.

A file appears whole under its name or not at all. The last two are kept, so that one damaged on disk costs no more
than the steps between them, and the best validated one. The main process reads and writes; the others are told, so
that machines need not share a disk.
"""

import contextlib
import json
import os
import warnings
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..modeling_fspad import FSPADDraftModel
from ..runtime import changed_settings

MOMENTS = ("exp_avg", "exp_avg_sq")
KEPT = 2


@dataclass
class Progress:
    """
    How far a run has come.

    Args:
        step: optimiser steps done.
        seconds: wall time spent on them, over all sittings.
        record: the last step's losses.
        best: the best validation's numbers and its `step`; empty before the first.
    """

    step: int = 0
    seconds: float = 0.0
    record: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)


class DamagedCheckpoint(OSError):
    """A checkpoint that is not what was written."""


class Checkpoints:
    """
    The checkpoints of one run.

    Args:
        folder: step-00000100.safetensors, ...
        settings: what the curve of losses is a function of: JSON values by name. A checkpoint of other ones is
            refused.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict):
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))
        self.state = PartialState()

    def save(self, draft: FSPADDraftModel, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """
        Writes a checkpoint and drops those no longer needed; on the main process, the others wait.

        Raises:
            OSError: it cannot be written, as on a full disk; the ones before stand.
        """
        if self.state.is_main_process:
            tensors = {f"weights.{name}": tensor for name, tensor in draft.state_dict().items()}
            for name, parameter in draft.named_parameters():
                tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            about = {"progress": asdict(progress), "settings": self.settings}
            try:
                _write(self._path(progress.step), tensors, about)
            except (OSError, SafetensorError) as error:
                before = self._steps()
                stands = f"that of step {before[0]} stands" if before else "there is none before it"
                raise OSError(
                    f"The checkpoint of step {progress.step} cannot be written to {str(self.folder)!r} "
                    f"({getattr(error, 'strerror', None) or error}); {stands}. Make room there and run the same "
                    "command again: it goes on from the last checkpoint."
                ) from error
            self._prune()
        self.state.wait_for_everyone()

    def load(self, draft: FSPADDraftModel, optimizer: torch.optim.Optimizer) -> Progress:
        """
        The state of the newest sound checkpoint into `draft` and `optimizer`, the same on every process; without a
        checkpoint the main process's draft is everybody's.

        Raises:
            ValueError: the checkpoint is of other settings, which the message names, or all are damaged.
        """
        tensors, told = {}, {"error": None, "progress": None}
        if self.state.is_main_process:
            try:
                tensors, told["progress"] = self._newest()
            except ValueError as error:
                told["error"] = str(error)
        told = broadcast_object_list([told])[0]
        if told["error"]:
            raise ValueError(told["error"])
        weights, device = draft.state_dict(), draft.device
        progress = Progress(**(told["progress"] or {}))
        parameters = dict(draft.named_parameters())
        if not self.state.is_main_process and progress.step:
            tensors = {f"{moment}.{name}": torch.zeros_like(p) for name, p in parameters.items() for moment in MOMENTS}
        for name, tensor in weights.items():
            if f"weights.{name}" in tensors:
                tensor.copy_(tensors.pop(f"weights.{name}"))
            broadcast(tensor)
        if progress.step:
            state = [
                {"step": torch.tensor(float(progress.step))}
                | {moment: broadcast(tensors.pop(f"{moment}.{name}").to(device)) for moment in MOMENTS}
                for name in parameters
            ]
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": dict(enumerate(state)), "param_groups": groups})
        return progress

    def load_weights(self, draft: FSPADDraftModel, step: int) -> bool:
        """The weights of a checkpoint that is kept, the same on every process; whether they could be read."""
        tensors, sound = {}, False
        if self.state.is_main_process:
            try:
                tensors, _ = _read(self._path(step))
                sound = True
            except DamagedCheckpoint as error:
                warnings.warn(f"{error}; the last step's weights are taken instead.")
        sound = broadcast_object_list([sound])[0]
        if sound:
            for name, tensor in draft.state_dict().items():
                if tensors:
                    tensor.copy_(tensors[f"weights.{name}"])
                broadcast(tensor)
        return sound

    def _newest(self) -> tuple[dict[str, torch.Tensor], dict | None]:
        for path in self.folder.glob(".step-*"):
            path.unlink()  # left by a writer that was killed
        damaged = []
        for step in self._steps():
            try:
                tensors, about = _read(self._path(step))
            except DamagedCheckpoint as error:
                damaged.append(str(error))
                continue
            self._check(about["settings"])
            for message in damaged:
                warnings.warn(f"{message}; going on from step {step} instead.")
            return tensors, about["progress"]
        if damaged:
            raise ValueError(
                f"{damaged[0]}, and there is no sound one before it: delete {str(self.folder)!r} to begin again."
            )
        return {}, None

    def _check(self, theirs: dict) -> None:
        if changes := changed_settings(theirs, self.settings):
            raise ValueError(
                f"The checkpoint in {str(self.folder)!r} is of other settings ({changes}): repeat the first ones to "
                "go on, delete it to begin again, or name another output."
            )

    def _prune(self) -> None:
        kept = self._steps()[:KEPT]
        needed = set(kept)
        for step in kept:
            with contextlib.suppress(DamagedCheckpoint):
                needed.add(_about(self._path(step))["progress"]["best"].get("step"))
        for step in set(self._steps()) - needed:
            self._path(step).unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def _steps(self) -> list[int]:
        """Of the checkpoints there are, the newest first."""
        return sorted((int(path.stem[5:]) for path in self.folder.glob("step-*.safetensors")), reverse=True)


def has_checkpoint(folder: str | os.PathLike) -> bool:
    return any(Path(folder).glob("step-*.safetensors"))


def _write(path: Path, tensors: dict[str, torch.Tensor], about: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, partial, {"fspad": json.dumps(about), "crc32": str(_crc(tensors))})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _about(path: Path) -> dict:
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["fspad"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"The checkpoint {str(path)!r} is damaged ({error})") from error


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    about = _about(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        expected = file.metadata().get("crc32")
    if str(_crc(tensors)) != expected:
        raise DamagedCheckpoint(f"The checkpoint {str(path)!r} is damaged (its checksum is not the one written)")
    return tensors, about


def _crc(tensors: dict[str, torch.Tensor]) -> int:
    """safetensors notices a file cut short, but no bit that flipped."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), crc)
    return crc
