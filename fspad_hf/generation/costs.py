"""What a round of speculation costs, learned from the rounds themselves: nothing is run only to be timed."""

import time
import weakref
from itertools import pairwise

import torch

from ..modeling_fspad import FSPADDraftModel
from .remembered import Remembered
from .target import Target
from .tree import TreeShape

LATEST = 5  # measurements of a size that are remembered, of which the quickest counts


class RoundCosts:
    """
    Seconds of a forward of the target by its number of rows for each sequence, and of a level of the draft trees.

    The first forward of a number of rows does not count: it also pays for whatever is prepared for that shape. Between
    numbers of rows that have been measured costs are interpolated; more rows than that are taken to cost no more,
    which a round will show.
    """

    def __init__(self):
        self._verify: dict[int, list[float]] = {}
        self._seen: set[int] = set()
        self._level: list[float] = []

    def add_forward(self, rows: int, seconds: float) -> None:
        if rows in self._seen:
            self._verify[rows] = [*self._verify.get(rows, []), seconds][-LATEST:]
        self._seen.add(rows)

    def add_draft(self, levels: int, seconds: float) -> None:
        self._level = [*self._level, seconds / levels][-LATEST:]

    def round(self, shape: TreeShape, reread: int = 0) -> float:
        """Seconds of a round with such a tree, and so many rows besides; 0 before anything is known."""
        level = min(self._level, default=0.0)
        return self._forward(reread + shape.rows) + (level * shape.depth)

    def _forward(self, rows: int) -> float:
        known = sorted((at, min(seconds)) for at, seconds in self._verify.items())
        if not known:
            return 0.0
        for (low, before), (high, after) in pairwise([(0, known[0][1]), *known]):
            if rows <= high:
                return before + (after - before) * (rows - low) / (high - low)
        return known[-1][1]


_known = Remembered()


def costs_of(target: Target, draft: FSPADDraftModel, batch: int, captured: bool) -> RoundCosts:
    """What is known of the rounds of a pair with so many sequences, in this process, on this device."""
    key = weakref.ref(draft), batch, str(target.device), target.model.dtype, torch.get_num_threads(), captured
    return _known.get(target.model, key, RoundCosts)


class Stopwatch:
    """Seconds since it was last read, all work of a device included."""

    def __init__(self, device: torch.device):
        self.device, self._began = device, 0.0
        self.read()

    def read(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        began, self._began = self._began, time.perf_counter()
        return self._began - began
