"""What a draft is trained on: rows of token ids, their loss masks, and where documents share a row their segments."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .arguments import as_number
from .conversations import load_conversations, tokenize, user_turns
from .exclusion import is_excluded, load_excluded
from .packing import continues, pack
from .shards import MANIFEST, read_manifest
from .templates import TemplateProblem, assistant_span, template_sha256

HELD_OUT_ROWS = 512  # the last rows of the data are never trained on ...
HELD_OUT_SHARE = 20  # ... but no more than one row in so many


@dataclass
class TrainingRows:
    """
    Args:
        ids (`[rows, length]`): token ids.
        mask (`[rows, length]`): True on the assistant's tokens.
        segments (`[rows, length]`): the number of the document within its row, 0 on padding; `None`: a row is one.
    """

    ids: torch.LongTensor
    mask: torch.BoolTensor
    segments: torch.LongTensor | None

    @classmethod
    def of(cls, dataset) -> "TrainingRows":
        """
        The rows of a data set, all in memory; those of other lengths than the longest are padded.

        Args:
            dataset: `TrainingRows`, or a sequence of mappings, such as a `datasets.Dataset`: `input_ids`; `labels`,
                -100 where the loss does not count a token, or `assistant_masks`, 0 there; and, of rows of several
                documents, `position_ids`, 0 where one begins.

        Raises:
            ValueError: other columns, or columns of different lengths.
        """
        if isinstance(dataset, cls):
            return dataset
        items = [{name: torch.as_tensor(value) for name, value in item.items()} for item in dataset]
        for number, item in enumerate(items):
            marks = [item[name] for name in ("labels", "assistant_masks", "position_ids") if name in item]
            if "input_ids" not in item or not ({"labels", "assistant_masks"} & item.keys()):
                raise ValueError(
                    f"Row {number} has the columns {sorted(item)}: expected input_ids and labels (or assistant_masks)."
                )
            if any(mark.shape != item["input_ids"].shape or mark.dim() != 1 for mark in marks):
                raise ValueError(f"Row {number} has columns of different shapes: expected one value a token in each.")
        ids = [item["input_ids"].long() for item in items]
        masks = [item["labels"] >= 0 if "labels" in item else item["assistant_masks"].bool() for item in items]
        begins = [item.get("position_ids", torch.arange(len(row))) == 0 for item, row in zip(items, ids, strict=True)]
        segments = pad_sequence([begin.cumsum(0) for begin in begins], batch_first=True)
        one = bool((segments == 1).all())
        ids, masks = pad_sequence(ids, batch_first=True), pad_sequence(masks, batch_first=True)
        return cls(ids, masks, None if one else segments)

    def counted(self) -> "TrainingRows":
        """With a mask that is off where no draft of the document could have guessed the token, or learnt from it."""
        mask = self.mask.clone()
        mask[:, 0] = False
        if self.segments is not None:
            mask &= continues(self.segments)
        return TrainingRows(self.ids, mask, self.segments)

    @property
    def held_out(self) -> int:
        """So many of the last rows are never trained on."""
        return min(HELD_OUT_ROWS, len(self.ids) // HELD_OUT_SHARE)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows) -> "TrainingRows":
        """Some of the rows."""
        segments = None if self.segments is None else self.segments[rows]
        return TrainingRows(self.ids[rows], self.mask[rows], segments)

    @property
    def tokens(self) -> torch.LongTensor:
        """All ids in one line (`[tokens]`), without padding."""
        return self.ids.flatten() if self.segments is None else self.ids[self.segments > 0]

    def sha256(self) -> str:
        """The fingerprint of ids, mask and segments."""
        digest = sha256(str(tuple(self.ids.shape)).encode())
        for tensor, dtype in ((self.ids, torch.int32), (self.mask, torch.uint8), (self.segments, torch.int16)):
            if tensor is not None:
                digest.update(tensor.to("cpu", dtype).contiguous().numpy())
        return digest.hexdigest()

    def row(self, number: int) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """Ids and mask (`[tokens]`) of a row without its padding."""
        used = slice(None) if self.segments is None else self.segments[number] > 0
        return self.ids[number][used], self.mask[number][used]


@dataclass
class DataConfig:
    """Which data, and how conversations become rows."""

    data: Sequence[str]  # see [`load_training_rows`]
    row_length: int = 1024  # of packed conversations
    split: str = "train"  # of a Hub data set
    exclude: Sequence[str] = ()  # files of prompts; conversations that hold one are dropped
    regenerate: bool = False  # replace the answers of conversations by the target's own ...
    regenerate_temperature: float = 0.0  # ... drawn so
    regenerate_tokens: int = 512  # ... and at most so long
    regenerate_rows: int = 16  # ... and so many at once

    def __post_init__(self):
        self.data, self.exclude = ([str(x) for x in _sequence(n, getattr(self, n))] for n in ("data", "exclude"))
        for field in fields(self):
            if field.type in (int, float):
                setattr(self, field.name, as_number(field.name, getattr(self, field.name), field.type))
        if not self.data:
            raise ValueError("data=[] names nothing to train on: expected files, folders or Hub data set ids.")


def load_training_rows(
    data: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, row_length: int = 1024, split: str = "train",
    exclude: Sequence[str | Path] = (), vocab_size: int | None = None,
) -> TrainingRows:  # fmt: skip
    """
    Rows to train on, from whatever `--data` names.

    Args:
        data: .npy files of token ids or folders of them (a self-play folder is one); or conversations, see
            [`load_conversations`]. Not both.
        tokenizer: the target's; its chat template tells which tokens are the assistant's.
        row_length: of packed conversations; .npy rows have their own.
        split: of a Hub data set.
        exclude: files of prompts, see [`load_excluded`]; conversations that hold one are dropped.
        vocab_size: the target's; no id may reach it.

    Raises:
        ValueError: nothing there, both kinds at once, data of another tokenizer or template, or a mask that is all
            True or all False.
    """
    kinds = {bool(is_token_rows(source)) for source in data}
    if len(kinds) != 1:
        raise ValueError(f"data={[str(source) for source in data]}: expected token rows or conversations, not both.")
    excluded = load_excluded(exclude)
    if kinds.pop():
        rows = _token_rows(data, tokenizer, excluded)
    else:
        rows = _packed(data, tokenizer, row_length, split, excluded)
    highest = int(rows.ids.max())
    if vocab_size is not None and highest >= vocab_size:
        raise ValueError(
            f"The data holds token id {highest}, the target has {vocab_size}: it was made with another target's "
            "tokenizer; write rows with fspad-hf selfplay, or pass conversations."
        )
    if rows.mask.all() or not rows.mask.any():
        share = "every" if rows.mask.any() else "no"
        raise ValueError(
            f"By the chat template {share} token of data={[str(source) for source in data]} is the assistant's: "
            "expected some; the rows may be of another target's template."
        )
    return rows


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
    for row, row_mask in zip(ids, mask, strict=True):
        openings, closings, at = _places(row, opening), _places(row, closing), 0
        for start in openings:
            if start >= at:
                start += len(opening)
                end = next((end for end in closings if end >= start), None)
                at = len(row) if end is None else end + len(closing)
                row_mask[start:at] = True
    return mask


def _places(row: torch.LongTensor, pattern: Sequence[int]) -> list[int]:
    if len(row) < len(pattern):
        return []
    return (row.unfold(0, len(pattern), 1) == torch.tensor(list(pattern))).all(-1).nonzero()[:, 0].tolist()


def is_token_rows(source: str | Path) -> bool:
    """Whether `--data` names rows of token ids, not conversations."""
    path = Path(source)
    return path.is_dir() or path.suffix == ".npy"


def _token_rows(data: Sequence[str | Path], tokenizer, excluded: list[str]) -> TrainingRows:
    if excluded:
        raise ValueError(
            "exclude works on conversations: write token rows without those prompts by fspad-hf selfplay."
        )
    for folder in map(Path, data):
        if (folder / MANIFEST).exists():
            made = read_manifest(folder)["settings"]
            if made.get("chat_template_sha256") != template_sha256(tokenizer):
                raise ValueError(
                    f"data={str(folder)!r} was written by {made.get('target')!r} in another chat template than this "
                    "target's: expected rows of the same target; write them with fspad-hf selfplay."
                )
    ids = torch.from_numpy(load_token_rows(data).astype(np.int64))
    if ids.numel() == 0:
        raise ValueError(f"data={[str(source) for source in data]} holds no rows: expected token ids, [rows, length].")
    return TrainingRows(ids, span_mask(ids, *assistant_span(tokenizer)), None)


def _packed(data: Sequence[str | Path], tokenizer, row_length: int, split: str, excluded: list[str]) -> TrainingRows:
    if row_length < 8:
        raise ValueError(f"row_length={row_length} is too short for a conversation: expected 8 or more.")
    documents = []
    for source in data:
        for number, messages in enumerate(load_conversations(str(source), split), start=1):
            while messages and messages[-1]["role"] != "assistant":
                messages = messages[:-1]  # what no answer follows trains nothing
            if not messages or is_excluded(user_turns(messages), excluded):
                continue
            try:
                ids, mask = tokenize(tokenizer, messages)
            except TemplateProblem as error:
                raise TemplateProblem(f"{source}, record {number}: {error}") from error
            if any(mask[:row_length]):
                documents.append((ids, mask))
    if not documents:
        raise ValueError(
            f"data={[str(source) for source in data]} holds no answer within {row_length} tokens: expected "
            "conversations with turns of the assistant, or a longer row_length."
        )
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids, mask, segments = pack(documents, row_length, padding)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))  # packing sorts by length
    return TrainingRows(ids[order], mask[order], segments[order])


def _sequence(name: str, value) -> Sequence:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence):
        raise ValueError(f"{name}={value!r}: expected a list.")
    return value
