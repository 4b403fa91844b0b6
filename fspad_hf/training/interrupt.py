"""Ctrl-C between two steps: noticed at once, acted on when there is something whole to save."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .config import TrainingConfig

SAME_CTRL_C = 2.0  # seconds: a launcher passes on the Ctrl-C that the terminal has sent to its workers already


class TrainingInterrupted(KeyboardInterrupt):
    """A run stopped by Ctrl-C or SIGTERM after its checkpoint was written; the text tells how to go on."""

    def __init__(self, step: int, config: TrainingConfig):
        super().__init__(
            f"Interrupted after step {step} of {config.steps}; saved in {config.output_dir}: run the same command "
            "again to go on."
        )


class Interrupts:
    """Whether one came, and the signal's `number`."""

    def __init__(self):
        self.came, self.number, self._first = False, None, 0.0

    def __call__(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.came and now - self._first > SAME_CTRL_C:
            raise KeyboardInterrupt
        if not self.came:
            self.came, self.number, self._first = True, number, now


@contextmanager
def noticed_interrupts() -> Iterator[Interrupts]:
    """
    SIGINT and SIGTERM are noted inside the block; a second one, seconds later, stops at once. One that came too late
    for the block to act on does its work after it.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield interrupts
        return
    before = {number: signal.signal(number, interrupts) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interrupts.came:  # an exception would not get here
        signal.raise_signal(interrupts.number)
