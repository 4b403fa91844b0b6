"""Draws known before they are made: the noise of plain sampling, drawn ahead.

Legend: p the target's processed distribution, E a row of Exp(1) noise. `torch.multinomial(p, 1)` is argmax(p / E) with
E drawn from the same generator, so drawing the rows ahead and dividing later gives the very same tokens.
"""

from collections import deque
from collections.abc import Sequence

import torch

from ..runtime import labelled


class NoiseQueue:
    """
    The Exp(1) noise of the coming draws, drawn ahead while the generator itself stays where plain sampling has it.

    Plain sampling draws a block `[sequences, V]` a step. A sequence that is ahead of the others takes its row of a
    later block; the generator goes on with the one that is furthest behind.

    Between calls the device's generator always stands after the last token drawn, so whatever other code does with it
    (a processor that draws, a streamer that reseeds, an exception) meets the state it would meet in plain sampling. If
    the state is not the one left behind, the queue is dropped and draws go straight to `torch.multinomial`. In a batch
    no code of the user's is met on the way, so there it is another thread's doing and changes nothing.

    Args:
        device: where tokens are drawn (that of `input_ids`).
        vocab_size: length V of a row.
        sequences: of the batch.
        ends_with_batch: only [`~NoiseQueue.follow`] says how far decoding has come.
    """

    def __init__(self, device: torch.device, vocab_size: int, sequences: int = 1, ends_with_batch: bool = False):
        self.device, self.shape, self.ends_with_batch = device, (sequences, vocab_size), ends_with_batch
        self.generator = default_generator(device)
        self.coupled = self.generator is not None
        self._steps = dict.fromkeys(range(sequences), 0)  # of each sequence not ended: the number of its next block
        self._first, self._most = 0, 0  # the number of the first block held; where the longest sequence has ended
        self._blocks: deque[tuple[torch.Tensor, torch.Tensor]] = deque()  # (block, generator state after it)
        self._here = self.generator.get_state() if self.coupled else None

    @labelled("noise")
    def peek(self, count: int, sequences: Sequence[int] = (0,)) -> torch.Tensor | None:
        """The noise of the next `count` draws of these, `[count, sequences, V]`; `None` once the queue is off."""
        if not self._in_step():
            return None
        firsts = [self._steps.get(sequence, self._first) - self._first for sequence in sequences]
        more = max(firsts) + count - len(self._blocks)
        if more > 0 and not self._draw_ahead(more):
            return None
        blocks = [block for block, _ in self._blocks]
        taken = [
            torch.stack([block[sequence] for block in blocks[first : first + count]])
            for sequence, first in zip(sequences, firsts, strict=True)
        ]
        return torch.stack(taken, dim=1)

    def _draw_ahead(self, more: int) -> bool:
        """So many blocks more; whether that was possible."""
        self.generator.set_state(self._blocks[-1][1] if self._blocks else self._here)
        try:
            for _ in range(more):
                # One call a block: on CUDA a larger one numbers the philox subsequences differently.
                block = torch.empty(self.shape, dtype=torch.float32, device=self.device).exponential_()
                self._blocks.append((block, self.generator.get_state()))
        finally:
            if self._blocks and torch.equal(self.generator.get_state(), self._blocks[-1][1]):
                self.generator.set_state(self._here)
            else:  # another thread drew meanwhile: its draws stand
                self._turn_off()
        return self.coupled

    def draw(self, probabilities: torch.Tensor, sequence: int = 0) -> torch.LongTensor:
        """`torch.multinomial(probabilities, 1)[:, 0]`, tokens and generator alike; `[1, V]` in, `[1]` out."""
        valid = is_distribution(probabilities)
        if self.shape[0] > 1 and self.coupled and not self.is_ahead(sequence):
            self._draw_ahead(1)  # a walk goes on beyond what was drafted by one
        row = None
        if self.is_ahead(sequence):
            row = self._blocks[self._steps[sequence] - self._first][0][sequence : sequence + 1]
        if row is None or not _is_like(probabilities, row) or not valid:
            self._blocks.clear()  # multinomial draws, or raises, as plain sampling does
            token = torch.multinomial(probabilities, num_samples=1).squeeze(1)
            if self.coupled:
                self._here = self.generator.get_state()
            return token
        self.skip(sequence)
        return race(probabilities, row)

    def skip(self, sequence: int = 0):
        """The next draw has been made already, with the noise that [`~NoiseQueue.peek`] gave for it."""
        self._steps[sequence] += 1
        self._follow()

    def end(self, sequence: int, draws: int):
        """This one has ended, after so many draws. Once all have, the generator stands after the longest one's."""
        self._most = max(self._most, min(self._steps.pop(sequence, draws), draws))
        self._follow()

    def _follow(self):
        if not self.ends_with_batch:
            self.follow(min(self._steps.values(), default=self._most))

    def follow(self, steps: int):
        """The generator stands after so many steps."""
        while self._first < steps and self._blocks:
            _, self._here = self._blocks.popleft()
            self.generator.set_state(self._here)
            self._first += 1

    def is_ahead(self, sequence: int = 0) -> bool:
        """Whether the noise of the next draw is known and still that which plain sampling would meet."""
        return self._in_step() and len(self._blocks) > self._steps[sequence] - self._first

    def _in_step(self) -> bool:
        if self.coupled and self.shape[0] == 1 and not torch.equal(self.generator.get_state(), self._here):
            self._turn_off()
        return self.coupled

    def _turn_off(self):
        """Someone else drew, and may again: no more guessing ahead."""
        if self.shape[0] == 1:
            self.coupled = False
            self._blocks.clear()


def race(probabilities: torch.Tensor, row: torch.Tensor) -> torch.LongTensor:
    """The draws that rows of noise decide: argmax p / E, `[batch, V]` both, `[batch]` out."""
    return torch.argmax(probabilities / row, dim=-1)


def default_generator(device: torch.device) -> torch.Generator | None:
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        torch.cuda.init()
        index = device.index if device.index is not None else torch.cuda.current_device()
        return torch.cuda.default_generators[index]
    return None  # elsewhere multinomial may be another algorithm: leave it alone


def _is_like(probabilities: torch.Tensor, row: torch.Tensor) -> bool:
    return probabilities.shape == row.shape and probabilities.dtype == row.dtype


def is_distribution(probabilities: torch.Tensor) -> torch.BoolTensor:
    """`[rows]`."""
    return (torch.isfinite(probabilities) & (probabilities >= 0)).all(-1)
