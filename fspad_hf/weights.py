"""The fingerprint of a draft's weights: config.json carries it, loading checks it."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

INDEX = "model.safetensors.index.json"
_MAIN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_CHUNK = 1 << 20


def weight_files(folder: str | Path) -> list[Path]:
    """model.safetensors in `folder`, or else its shards in the order of their names; empty if it has neither."""
    whole = Path(folder) / "model.safetensors"
    return [whole] if whole.is_file() else sorted(path for path in Path(folder).glob("model-*") if is_weights(path))


def is_weights(path: str | Path) -> bool:
    """Whether a file name is that of a draft's weights or of a shard of them; variants (`model.fp16...`) are not."""
    return _MAIN.fullmatch(Path(path).name) is not None


def fingerprint(files: Iterable[str | Path]) -> str | None:
    """
    The sha256 (64 hexadecimal digits) of the files joined in the order of their names, `None` of no files.

    Of one file it is what `sha256sum model.safetensors` prints, and the Hub's own id of the file; of shards it is what
    `cat model-*.safetensors | sha256sum` prints.
    """
    digest, names = hashlib.sha256(), sorted(files, key=lambda file: Path(file).name)
    for name in names:
        with open(name, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest() if names else None


def check_weights(files: Iterable[str | Path] | None, expected: str | None) -> None:
    """
    Compares weight files with the fingerprint that a configuration carries; without one, or for a variant, no check.

    Raises:
        OSError: the files are not the ones that were saved with the configuration.
    """
    files = list(files or [])
    if expected is None or not files or not all(is_weights(file) for file in files):
        return
    found = fingerprint(files)
    if found != expected:
        size = sum(Path(file).stat().st_size for file in files)
        named = str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        raise OSError(
            f"The draft weights {named} ({size} bytes) are damaged or were changed: their sha256 is {found}, and "
            f"config.json expects weights_sha256={expected}. Download or copy the draft again (from the Hub with "
            "force_download=True); if the change is meant, save the draft with save_pretrained, or set "
            "weights_sha256 to null in its config.json."
        )
