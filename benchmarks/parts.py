"""
Splits a large file into parts that can be sent one by one, and joins them again, checked by hash.

    python benchmarks/parts.py split model.safetensors            # model.safetensors.part00, ..., .parts.json
    python benchmarks/parts.py join model.safetensors.parts.json  # model.safetensors
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

MIB = 2**20
LIMIT = 59  # MiB a part: under the 60 that many upload limits allow


def split(file: Path, mib: int = LIMIT, folder: Path | None = None) -> Path:
    """
    Writes `file` as parts of at most `mib` MiB into `folder` (by default beside it), and last a manifest of them.

    Returns:
        The manifest, `<name>.parts.json`: name, size and sha256 of the whole and of each part.

    Raises:
        ValueError: `mib` is below 1.
        OSError: `file` cannot be read, or a part not written.
    """
    if mib < 1:
        raise ValueError(f"mib={mib} makes no parts: expected 1 or more.")
    folder = folder or file.parent
    folder.mkdir(parents=True, exist_ok=True)
    whole, parts, size = hashlib.sha256(), [], 0
    with file.open("rb") as source:
        while content := source.read(mib * MIB):
            name = f"{file.name}.part{len(parts):02d}"
            _write(folder / name, content)
            whole.update(content)
            size += len(content)
            parts.append({"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    manifest = folder / f"{file.name}.parts.json"
    told = {"name": file.name, "bytes": size, "sha256": whole.hexdigest(), "parts": parts}
    _write(manifest, json.dumps(told, indent=2).encode())
    return manifest


def join(manifest: Path, file: Path | None = None) -> Path:
    """
    Puts the parts of a manifest, which lie beside it, together as `file` (by default beside them too).

    Raises:
        ValueError: a part, or the whole, is not what was split.
        OSError: a part is missing, or the file cannot be written.
    """
    told = json.loads(manifest.read_text())
    file = file or manifest.parent / told["name"]
    whole, partial = hashlib.sha256(), file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as target:
            for part in told["parts"]:
                content = (manifest.parent / part["name"]).read_bytes()
                _check(part["name"], content, part["sha256"])
                whole.update(content)
                target.write(content)
        if whole.hexdigest() != told["sha256"]:
            raise ValueError(f"{manifest}: the parts are whole, but not those of {told['name']}: split it again.")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def _check(name: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{name} is damaged (sha256 {found[:12]}..., expected {expected[:12]}...): send it again.")


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Split a file into parts, or join them.")
    commands = parser.add_subparsers(dest="command", required=True)
    splitting = commands.add_parser("split", help="write the parts of a file and their manifest")
    splitting.add_argument("file", type=Path)
    splitting.add_argument("--mib", type=int, default=LIMIT, help=f"size of a part in MiB (default {LIMIT})")
    splitting.add_argument("--out", type=Path, help="folder for the parts (default: beside the file)")
    joining = commands.add_parser("join", help="put the parts together")
    joining.add_argument("manifest", type=Path, help="the .parts.json that lies beside the parts")
    joining.add_argument("--out", type=Path, help="the file to write (default: beside the parts)")
    given = parser.parse_args(arguments)
    try:
        if given.command == "split":
            print(split(given.file, given.mib, given.out))
        else:
            print(join(given.manifest, given.out))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
