"""Token rows and loss masks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


def load_token_rows(paths: Sequence[str | Path]) -> np.ndarray:
    """
    Rows of token ids, `[rows, length]`, from .npy files (or folders of them, in name order).

    Raises:
        ValueError: nothing there, or arrays that are not two-dimensional integers of one length.
    """
    files = [f for p in map(Path, paths) for f in (sorted(p.glob("*.npy")) if p.is_dir() else [p]) if f.is_file()]
    if not files:
        raise ValueError(f"No .npy files in {[str(p) for p in paths]}: expected arrays of token ids, [rows, length].")
    arrays = [np.load(f, mmap_mode="r", allow_pickle=False) for f in files]
    for file, array in zip(files, arrays, strict=True):
        if array.ndim != 2 or array.dtype.kind not in "iu" or array.shape[1] != arrays[0].shape[1]:
            raise ValueError(
                f"{file} holds {array.dtype} of shape {array.shape}: expected integer token ids [rows, length], "
                f"with the length of {files[0]} ({arrays[0].shape[-1]})."
            )
    return np.concatenate(arrays)


def span_mask(ids: torch.LongTensor, opening: Sequence[int], closing: Sequence[int]) -> torch.BoolTensor:
    """
    True on the tokens after each `opening` up to and including the next `closing` (or the row's end).

    Args:
        ids (`[rows, length]`): token ids.
        opening: the ids that start an assistant turn, such as those of `<|im_start|>assistant\\n`.
        closing: the ids that end it, such as that of `<|im_end|>`.
    """
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, row_mask in zip(ids.tolist(), mask, strict=True):
        at = 0
        while (start := _find(row, opening, at)) >= 0:
            start += len(opening)
            end = _find(row, closing, start)
            at = len(row) if end < 0 else end + len(closing)
            row_mask[start:at] = True
    return mask


def _find(row: list[int], pattern: Sequence[int], start: int) -> int:
    pattern = list(pattern)
    return next((i for i in range(start, len(row) - len(pattern) + 1) if row[i : i + len(pattern)] == pattern), -1)
