"""The time that reading the weights alone takes: no round, and no plain token, can take less."""

import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_fspad import FSPADDraftModel

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # far above any cache


@dataclass(frozen=True)
class Traffic:
    """
    Bytes of weights that one forward must read, each weight once; activations and key-value caches come on top.

    Args:
        target: of a target forward: all weights except tables from which only rows are gathered.
        draft: of a draft forward; head: of the LM head's rows that the draft uses.
        depth: levels of a tree: so many draft forwards (one over the accepted tokens, one for each further level), and
            so many of the head.
    """

    target: int
    draft: int
    head: int
    depth: int

    @property
    def round(self) -> int:
        return self.target + self.depth * (self.draft + self.head)


def weight_traffic(target: PreTrainedModel, draft: FSPADDraftModel) -> Traffic:
    """The [`Traffic`] of a pair. All experts of a mixture are counted: no lower bound for one token then."""
    head = target.get_output_embeddings()
    read = {id(weight): weight.nbytes for weight in head.parameters()}
    gathered = {id(m.weight) for m in target.modules() if isinstance(m, nn.Embedding)} - read.keys()
    drafted, vocabulary = draft.config.draft_vocab_size, target.config.get_text_config().vocab_size
    share = drafted / vocabulary if drafted is not None and type(head) is nn.Linear else 1.0
    return Traffic(
        target=sum(weight.nbytes for weight in target.parameters() if id(weight) not in gathered),
        draft=sum(weight.nbytes for weight in draft.parameters()),
        head=round(share * sum(read.values())),
        depth=draft.speculation_settings(draft.device).tree_depth,
    )


def copy_bandwidth(device: torch.device, size: int | None = None, repeats: int = 7) -> float:
    """
    Bytes a second, read and written, of the fastest of `repeats` copies within the device's memory.

    Args:
        size: bytes of the source; by default 1 GiB on CUDA and 256 MiB elsewhere, and no more than a quarter of what
            a GPU has free.
    """
    if size is None:
        size = COPY_BYTES.get(device.type, COPY_BYTES["cpu"])
        if device.type == "cuda":
            size = max(min(size, torch.cuda.mem_get_info(device)[0] // 4), 1 << 20)
    source = torch.ones(max(size // 4, 1), dtype=torch.float32, device=device)  # written to: an untouched page is free
    copy = torch.empty_like(source).copy_(source)
    best = min(_seconds(copy, source) for _ in range(repeats))
    return 2 * source.nbytes / best


def _seconds(copy: torch.Tensor, source: torch.Tensor) -> float:
    if source.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(source.device)
        start.record(stream)
        copy.copy_(source)
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    _wait(source.device)
    begin = time.perf_counter()
    copy.copy_(source)
    _wait(source.device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
