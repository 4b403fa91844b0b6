"""A folder of shards and its manifest.json: written whole, shard by shard, and taken up again where a run stopped."""

import hashlib
import json
from pathlib import Path

import torch
import transformers

from ..runtime import changed_settings, write_file, write_json

MANIFEST = "manifest.json"


class ShardFolder:
    """
    Shards 0, 1, ... of one run. A shard counts once the manifest names it, which is written after it.

    Args:
        path: the folder; made if need be.
        settings: what the shards are a function of; a folder begun with other settings is refused.
        suffix: of the shard files.

    Raises:
        ValueError: the folder holds something else, other settings, or a shard that is not what was written.
    """

    def __init__(self, path: str | Path, settings: dict, prefix: str, suffix: str):
        self.path, self.prefix, self.suffix = Path(path), prefix, suffix
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output={str(path)!r} is a file: expected a folder to write in.")
        self.path.mkdir(parents=True, exist_ok=True)
        self.manifest = {"settings": json.loads(json.dumps(settings)), "versions": [], "totals": {}, "shards": []}
        if (self.path / MANIFEST).exists():
            self._take_up()
        elif found := sorted(self.path.glob(f"*{suffix}")):
            stray = [file.name for file in found if file.name != self.name(0)]  # the first may lack its manifest
            if stray:
                raise ValueError(
                    f"output={str(path)!r} holds {stray[0]!r} and no {MANIFEST}: expected an empty folder, or one "
                    "that this command began."
                )
        versions = _versions()
        if versions not in self.manifest["versions"]:
            self.manifest["versions"].append(versions)

    @property
    def shards(self) -> list[dict]:
        return self.manifest["shards"]

    @property
    def totals(self) -> dict[str, int]:
        return self.manifest["totals"]

    def name(self, number: int) -> str:
        return f"{self.prefix}-{number:05d}{self.suffix}"

    def add(self, content: bytes, counts: dict[str, int], **about) -> None:
        """Writes the next shard and then the manifest, each whole or not at all; `about` is told of the shard."""
        name = self.name(len(self.shards))
        write_file(self.path / name, content)
        self.shards.append({"file": name, "sha256": hashlib.sha256(content).hexdigest(), **counts, **about})
        for key, count in counts.items():
            self.totals[key] = self.totals.get(key, 0) + count
        write_json(self.path / MANIFEST, self.manifest)

    def read(self, number: int) -> bytes:
        """A shard's content, checked against the manifest."""
        shard = self.shards[number]
        file = self.path / shard["file"]
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != shard["sha256"]:
            state = "was changed" if content else "is missing"
            raise ValueError(
                f"{file} {state} since {MANIFEST} named it: restore it, or name another folder and begin again."
            )
        return content

    def _take_up(self):
        begun = read_manifest(self.path)
        if changes := changed_settings(begun["settings"], self.manifest["settings"]):
            raise ValueError(
                f"output={str(self.path)!r} was begun with other settings ({changes}): repeat the first ones, or name "
                "another folder."
            )
        self.manifest = begun


def read_manifest(path: str | Path) -> dict:
    """The manifest of a folder. `ValueError` if it is not one of ours."""
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(manifest["settings"], dict) and isinstance(manifest["shards"], list)
        assert isinstance(manifest["versions"], list) and isinstance(manifest["totals"], dict)
    except (json.JSONDecodeError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{file} is not a manifest that this command wrote: name another folder.") from error
    return manifest


def _versions() -> dict[str, str]:
    from .. import __version__

    return {"fspad_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
