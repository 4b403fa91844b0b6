"""The files of a checkpoint, in a local folder or on the Hub: one tensor, or some of its rows, at a time."""

import json
import pickle
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


class StoredWeights:
    """
    The tensors of a checkpoint by name; nothing is read before it is asked for.

    Args:
        repo: a local folder or a Hub id.
        allow_pickle: also take `pytorch_model.bin`, read with `torch.load(weights_only=True)`, if there is no
            safetensors file.

    Raises:
        ValueError: no safetensors file, without `allow_pickle`.
        FileNotFoundError: no weights at all, with it.
        OSError: a file is damaged, or the Hub cannot be reached.
    """

    def __init__(self, repo: str, allow_pickle: bool = False):
        self.repo = repo
        self._loaded: dict[str, dict[str, torch.Tensor]] = {}  # what pickles hold: they cannot be read in part
        for single in (SAFETENSORS, PICKLE) if allow_pickle else (SAFETENSORS,):
            if index := find_file(repo, f"{single}.index.json"):
                self._files = read_json(index)["weight_map"]
                return
            if find_file(repo, single):
                self._files = dict.fromkeys(self._names_in(single), single)
                return
        if allow_pickle:
            raise FileNotFoundError(f"{repo!r} has no weights: expected {SAFETENSORS} or {PICKLE}, whole or sharded.")
        raise ValueError(
            f"{repo!r} has no {SAFETENSORS}, whole or sharded. If it has {PICKLE}, a pickle, reading that needs your "
            "consent: pass allow_pickle=True (--allow-pickle), and it is read with torch.load(weights_only=True)."
        )

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        if self._files[name].endswith(".safetensors"):
            with self._open(self._files[name]) as file:
                return tuple(file.get_slice(name).get_shape())
        return tuple(self._unpickled(self._files[name])[name].shape)

    def tensor(self, name: str) -> torch.Tensor:
        if self._files[name].endswith(".safetensors"):
            with self._open(self._files[name]) as file:
                return file.get_tensor(name)
        return self._unpickled(self._files[name])[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a matrix; of a safetensors file no other byte is read."""
        if self._files[name].endswith(".safetensors"):
            with self._open(self._files[name]) as file:
                return file.get_slice(name)[start:stop]
        return self._unpickled(self._files[name])[name][start:stop]

    def _names_in(self, file_name: str) -> list[str]:
        if file_name.endswith(".safetensors"):
            with self._open(file_name) as file:
                return list(file.keys())
        return list(self._unpickled(file_name))

    @contextmanager
    def _open(self, file_name: str):
        path = self._path(file_name)
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise OSError(f"{str(path)!r} is damaged or incomplete ({error}): get it again.") from error

    def _unpickled(self, file_name: str) -> dict[str, torch.Tensor]:
        if file_name not in self._loaded:
            path = self._path(file_name)
            try:
                found = torch.load(path, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
                # torch's first line tells how to run the code that may be in there
                told = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
                reason = told[0].strip() if told else type(error).__name__
                raise OSError(
                    f"{str(path)!r} cannot be read as plain tensors ({reason}): it is damaged, or holds Python "
                    "objects, which are never loaded here; save the checkpoint's state dict as safetensors."
                ) from error
            if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
                raise ValueError(f"{str(path)!r} holds no state dict: expected names and tensors, nothing else.")
            self._loaded[file_name] = found
        return self._loaded[file_name]

    def _path(self, file_name: str) -> Path:
        path = find_file(self.repo, file_name)
        if path is None:
            raise FileNotFoundError(f"{self.repo!r} lacks {file_name}, which its index names: get it again.")
        return path


def find_file(repo: str, name: str) -> Path | None:
    """A file of a local folder or of a Hub repository (downloaded if need be); `None` if it has no such file."""
    if Path(repo).is_dir():
        return path if (path := Path(repo) / name).is_file() else None
    try:
        return Path(hf_hub_download(repo, name))
    except LocalEntryNotFoundError as error:
        raise OSError(f"{repo!r} is no folder here, and the Hub cannot be reached for {name}.") from error
    except EntryNotFoundError:
        return None
    except (HFValidationError, HfHubHTTPError) as error:
        raise OSError(f"{repo!r} is neither a folder here nor a Hub id that can be read ({error}).") from error


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}): get it again.") from error
