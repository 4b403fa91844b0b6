"""Where a round's time goes, measured on the very functions that decoding runs.

They are wrapped while a context lasts and are themselves again after it: nothing of this is in the decoding path.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.autograd import DeviceType

from ..generation import rounds
from ..generation.cache import ArenaCache
from ..generation.drafting import Drafter
from ..generation.graphs import GraphRounds
from ..generation.rounds import Rounds
from ..generation.target import Target
from ..generation.tree import GrownTrees
from ..generation.verification import NoiseQueue

PARTS = {
    "accept": "draft accept (true features)",
    "levels": "draft levels (network)",
    "head": "draft head + children",
    "frontier": "draft frontier + its masks",
    "noise": "noise rows drawn ahead",
    "prune": "rerank + prune",
    "masks": "masks + positions",
    "verify": "verify forward",
    "walk": "walk: processors, draw, criteria",
    "compact": "compaction",
    "draft graph": "draft graph (accept, levels, prune)",
    "verify graph": "verify graph (forward, walk)",
    "keep graph": "keep graph (compaction)",
    "host": "host (the rest)",
}
EXCLUDED = "excluded"  # time that a measurement itself adds

# owner, attribute, the part its own time belongs to, and the part that must be running: the draft's cache is kept by
# the same method as the target's, and the draft steps in `accept` as in `grow`
TIMED = (
    (Drafter, "accept", "accept", "host"),
    (Drafter, "grow", "frontier", "host"),
    (Drafter, "_step", "levels", "frontier"),
    (Drafter, "_children", "head", "frontier"),
    (NoiseQueue, "peek", "noise", "frontier"),
    (GrownTrees, "best", "prune", "frontier"),
    (Target, "verify", "masks", "host"),
    (rounds, "walk", "walk", "host"),
    (ArenaCache, "keep", "compact", "host"),
    (NoiseQueue, "peek", "noise", "host"),  # of a round that is captured
)
GRAPHS = {"draft": "draft graph", "walk": "verify graph", "verify": "verify graph", "keep": "keep graph"}


@dataclass(frozen=True)
class Round:
    """
    One round of `tree_decoding`.

    Args:
        parts: seconds by the keys of [`PARTS`]; every moment of the round belongs to exactly one of them.
        first: the first of its call, in which the draft reads the whole prompt.
        levels: of the draft tree.
    """

    parts: dict[str, float]
    first: bool
    levels: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


class RoundClock:
    """
    Takes the time of this thread's rounds on `device`.

    On CUDA the stamps are events in the current stream: nothing waits for them, so host and device overlap as ever,
    and a part's time is what passes on the device's own time line, idle moments included. Other accelerators are
    synchronised at each stamp.

    Args:
        on_round: called with the number of each round as it begins, all calls of `generate` counted through.
    """

    def __init__(self, device: torch.device, on_round: Callable[[int], None] = lambda number: None):
        self.device, self.on_round = device, on_round
        self._thread = threading.get_ident()
        self._running: list[str] = []  # the parts begun, innermost last; empty between calls
        self._rounds: list[tuple[bool, list]] = []  # first, [(part, stamp), ...]: from there on the part runs

    def mine(self) -> bool:
        return threading.get_ident() == self._thread

    def begin_round(self) -> None:
        """Ends the round before it, if that one's call is still running."""
        first = not self._running
        self.on_round(len(self._rounds))
        stamp = self._now()
        if not first:
            self._rounds[-1][1].append((None, stamp))
        self._rounds.append((first, [("host", stamp)]))
        self._running = ["host"]

    def end_round(self) -> None:
        if self._running:
            self._rounds[-1][1].append((None, self._now()))
            self._running = []

    @contextmanager
    def inside(self, part: str, under: str = "host") -> Iterator[None]:
        """The block's time belongs to `part`, if `under` is what runs now; else it stays where it is."""
        if not self.mine() or not self._running or self._running[-1] != under:
            yield
            return
        self._running.append(part)
        self._rounds[-1][1].append((part, self._now()))
        try:
            yield
        finally:
            if self._running:
                self._running.pop()
                self._rounds[-1][1].append((self._running[-1], self._now()))

    def rounds(self) -> list[Round]:
        """All rounds that have ended."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [_round(first, marks) for first, marks in self._rounds if marks[-1][0] is None]

    def _now(self):
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def _round(first: bool, marks: list) -> Round:
    parts = dict.fromkeys(PARTS, 0.0)
    for (part, start), (_, end) in pairwise(marks):
        if part != EXCLUDED:
            parts[part] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
    return Round(parts, first, sum(part == "head" for part, _ in marks))


@contextmanager
def instrumented(clock: RoundClock) -> Iterator[RoundClock]:
    """
    Lets `clock` time the rounds of every speculative `generate` that this thread runs inside the block.

    Tokens are untouched. Other threads' calls run through the wrappers unmeasured.
    """
    with ExitStack() as stack:
        for owner, name, part, under in TIMED:
            stack.enter_context(replaced(owner, name, _timed(vars(owner)[name], clock, part, under)))
        stack.enter_context(replaced(Rounds, "run", _starting(clock)))
        stack.enter_context(replaced(Target, "_armed", _armed(clock)))
        stack.enter_context(replaced(ArenaCache, "append_to", _ending(clock)))
        stack.enter_context(replaced(GraphRounds, "_replayed", _replaying(clock)))
        yield clock


@contextmanager
def replaced(owner, name: str, value) -> Iterator[None]:
    """`owner.name` is `value` inside the block."""
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _timed(function: Callable, clock: RoundClock, part: str, under: str) -> Callable:
    @functools.wraps(function)
    def timed(*args, **kwargs):
        with clock.inside(part, under):
            return function(*args, **kwargs)

    return timed


def _starting(clock: RoundClock) -> Callable:
    run = Rounds.run

    @functools.wraps(run)
    def starting(*args, **kwargs):
        if clock.mine():
            clock.begin_round()
        return run(*args, **kwargs)

    return starting


def _ending(clock: RoundClock) -> Callable:
    append_to = ArenaCache.append_to

    @functools.wraps(append_to)
    def ending(*args, **kwargs):
        if clock.mine():  # the loop writes its cache back once, after the last round
            clock.end_round()
        return append_to(*args, **kwargs)

    return ending


def _replaying(clock: RoundClock) -> Callable:
    replayed = GraphRounds._replayed

    @functools.wraps(replayed)
    def replaying(rounds: GraphRounds, name: str, *args, **kwargs):
        with clock.inside(GRAPHS[name]):
            return replayed(rounds, name, *args, **kwargs)

    return replaying


def _armed(clock: RoundClock) -> Callable:
    armed = Target._armed

    @contextmanager
    def listening(target: Target):  # what `verify` puts around the model's forward, and around nothing else
        with clock.inside("verify", "masks"), armed(target) as caught:
            yield caught

    return listening


def device_busy(device: torch.device, generate: Callable[[RoundClock], object]) -> float | None:
    """
    Seconds a round during which the GPU executed something, by torch.profiler; the round's time less it is the host's.

    Args:
        generate: runs one call under the clock it is given; all rounds but the first are counted.

    Returns:
        `None` if there was no second round.
    """
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    started = []

    def on_round(number: int) -> None:
        if number == 1:
            torch.cuda.synchronize(device)
            profiler.start()
            started.append(True)

    clock = RoundClock(device, on_round)
    try:
        with instrumented(clock):
            generate(clock)
        torch.cuda.synchronize(device)
    finally:
        if started:
            profiler.stop()
    if not started:
        return None
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return covered(spans) / 1e6 / (len(clock.rounds()) - 1)


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals: kernels may run side by side."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
