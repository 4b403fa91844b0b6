"""Where a round's time goes, read from a trace of torch.profiler: the steps label themselves, `fspad: ...`."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from ..runtime import LABELS

PARTS = {
    "read": "draft: masks of what is read",
    "network": "draft: network",
    "head": "draft: head, children",
    "draft": "draft: masks, best nodes, or its graph",
    "noise": "noise of the coming draws",
    "forward": "verification forward",
    "verify": "verification: masks, or its graph",
    "emit": "walk: processors, draw, criteria",
    "keep": "compaction",
    "host": "host, the rest",
}
TRACED_ROUNDS = 12


@dataclass(frozen=True)
class Round:
    """
    Args:
        parts: seconds by the keys of [`PARTS`]; every moment of the round belongs to exactly one of them.
        levels: of the trees, as far as the host has grown them.
        busy: seconds in which a GPU executed something; `None` without one.
    """

    parts: dict[str, float]
    levels: int = 0
    busy: float | None = None

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


class Tracer:
    """Traces the rounds of one call between its first tree and one some rounds later, whole rounds only."""

    def __init__(self, device: torch.device, rounds: int = TRACED_ROUNDS):
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self.profiler = torch.profiler.profile(activities=kinds)
        self.rounds, self.seen, self.running = rounds, 0, False

    def on_round(self, tree=None) -> None:
        self.seen += 1
        if self.seen == 1:
            self.profiler.start()
            self.running = True
        elif self.seen == 2 + self.rounds:
            self.stop()

    def stop(self) -> None:
        if self.running:
            self.profiler.stop()
            self.running = False

    def read(self) -> list[Round]:
        self.stop()
        return read_rounds(self.profiler.events())[: self.rounds] if self.seen else []  # the next was cut off


def read_rounds(events: Iterable) -> list[Round]:
    """
    The whole rounds among a profiler's events. With a GPU a part has the time of what it launched, on the device's own
    time line, and the host what is left; else a part has the time of its label, less that of the labels within.
    """
    events = list(events)
    labels = [event for event in events if event.name.startswith(LABELS)]
    there = [event for event in events if event.device_type == DeviceType.CUDA]
    own = [event for event in labels if event.device_type != DeviceType.CUDA]
    rounds = []
    for whole in sorted((e.time_range for e in own if e.name == LABELS + "round"), key=lambda span: span.start):
        within, busy = _inside(own, whole), None
        levels, seconds = sum(e.name == LABELS + "head" for e in within), (whole.end - whole.start) / 1e6
        parts = _own_times(within)
        if there:
            within = _inside(there, whole)
            parts = _own_times([event for event in within if event in labels])
            busy = covered((e.time_range.start, e.time_range.end) for e in within if not e.is_user_annotation) / 1e6
        parts = {part: parts.get(part, 0.0) for part in PARTS}
        parts["host"] = max(seconds - sum(parts.values()), 0.0)
        rounds.append(Round(parts, levels, busy))
    return rounds


def _inside(events: list, whole) -> list:
    return [e for e in events if whole.start <= e.time_range.start and e.time_range.end <= whole.end]


def _own_times(events: list) -> dict[str, float]:
    """Seconds of each label, less those of the labels that lie within it."""
    own: dict[str, float] = {}
    open_ones: list[tuple[str, float]] = []
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        name, (start, end) = event.name.removeprefix(LABELS), (event.time_range.start, event.time_range.end)
        while open_ones and open_ones[-1][1] <= start:
            open_ones.pop()
        own[name] = own.get(name, 0.0) + (end - start) / 1e6
        if open_ones:
            own[open_ones[-1][0]] -= (end - start) / 1e6
        open_ones.append((name, end))
    return own


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals: kernels may run side by side."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def middle_half(rounds: Iterable[Round]) -> list[Round]:
    """Without the fastest and the slowest quarter: what else the machine did shall not weigh on the means."""
    ordered = sorted(rounds, key=lambda one: one.seconds)
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut]
