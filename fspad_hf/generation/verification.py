"""Emitting tokens exactly as plain decoding does, and walking a verified tree along them.

Legend: p the target's processed distribution, E a row of Exp(1) noise. `torch.multinomial(p, 1)` is argmax(p / E) with
E drawn from the same generator, so drawing the rows ahead and dividing later gives the very same tokens.
"""

from collections import deque

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from .tree import CandidateTree


class NoiseQueue:
    """
    The Exp(1) rows of the coming draws, drawn ahead while the generator itself stays where plain sampling has it.

    Between calls the device's generator always stands after the last token drawn, so whatever other code does with it
    (a processor that draws, a streamer that reseeds, an exception) meets the state it would meet in plain sampling. If
    the state is not the one left behind, the queue is dropped and draws go straight to `torch.multinomial`.

    Args:
        device: where tokens are drawn (that of `input_ids`).
        vocab_size: length V of a row.
    """

    def __init__(self, device: torch.device, vocab_size: int):
        self.device, self.vocab_size = device, vocab_size
        self.generator = default_generator(device)
        self.coupled = self.generator is not None
        self._rows: deque[tuple[torch.Tensor, torch.Tensor]] = deque()  # (row [1, V], generator state after it)
        self._here = self.generator.get_state() if self.coupled else None

    def peek(self, count: int) -> torch.Tensor | None:
        """The rows of the next `count` draws, `[count, V]`; `None` once the queue is off."""
        if not self._in_step():
            return None
        if len(self._rows) < count:
            self.generator.set_state(self._rows[-1][1] if self._rows else self._here)
            try:
                while len(self._rows) < count:
                    # One call a row: on CUDA a [count, V] call numbers the philox subsequences differently.
                    row = torch.empty(1, self.vocab_size, device=self.device).exponential_()
                    self._rows.append((row, self.generator.get_state()))
            finally:
                if self._rows and torch.equal(self.generator.get_state(), self._rows[-1][1]):
                    self.generator.set_state(self._here)
                else:  # another thread drew meanwhile: its draws stand
                    self._turn_off()
            if not self.coupled:
                return None
        return torch.cat([self._rows[i][0] for i in range(count)])

    def draw(self, probabilities: torch.Tensor) -> torch.LongTensor:
        """`torch.multinomial(probabilities, 1)[:, 0]`, tokens and generator alike; `[1, V]` in, `[1]` out."""
        ready = self._in_step() and self._rows
        if not ready or not _is_like(probabilities, self._rows[0][0]) or not _is_distribution(probabilities):
            self._rows.clear()  # multinomial draws, or raises, as plain sampling does
            token = torch.multinomial(probabilities, num_samples=1).squeeze(1)
            if self.coupled:
                self._here = self.generator.get_state()
            return token
        row, after = self._rows.popleft()
        self.generator.set_state(after)
        self._here = after
        return torch.argmax(probabilities / row, dim=-1)

    def _in_step(self) -> bool:
        if self.coupled and not torch.equal(self.generator.get_state(), self._here):
            self._turn_off()
        return self.coupled

    def _turn_off(self):
        """Someone else drew, and may again: no more guessing ahead."""
        self.coupled = False
        self._rows.clear()


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


def _is_distribution(probabilities: torch.Tensor) -> bool:
    return bool((torch.isfinite(probabilities) & (probabilities >= 0)).all())


class TokenEmitter:
    """
    Everything plain decoding does for one token, once per token and in its order: processors on the true prefix,
    scores and logits, the draw, stopping criteria, streamer. Mirrors `GenerationMixin._sample`.

    Args:
        input_ids (`[1, prompt]`): grows by each token emitted.
        noise: where draws come from; `None` is greedy.
    """

    def __init__(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config,
        streamer=None,
        noise: NoiseQueue | None = None,
    ):
        self.input_ids = input_ids
        self.logits_processor, self.stopping_criteria, self.streamer = logits_processor, stopping_criteria, streamer
        self.noise = noise
        wanted = generation_config.return_dict_in_generate
        self.scores = () if wanted and generation_config.output_scores else None
        self.raw_logits = () if wanted and generation_config.output_logits else None
        self.finished = False

    def emit(self, logits: torch.Tensor) -> int:
        """Emits the token that follows `input_ids`; `logits` is the target's row for it, `[1, vocabulary]`."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self.input_ids.device)
        scores = self.logits_processor(self.input_ids, logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.raw_logits is not None:
            self.raw_logits += (logits,)
        if self.noise is not None:
            token = self.noise.draw(torch.nn.functional.softmax(scores, dim=-1))
        else:
            token = torch.argmax(scores, dim=-1)
        self.input_ids = torch.cat([self.input_ids, token[:, None]], dim=-1)
        self.finished = bool(self.stopping_criteria(self.input_ids, self.scores).all())
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        return int(token)


def walk(tree: CandidateTree, logits: torch.Tensor, emitter: TokenEmitter, path: list[int]):
    """
    Emits tokens from the root for as long as each is among its node's children; the first that is not is the bonus.

    Args:
        logits (`[1, nodes, vocabulary]`): the target's, at every node.
        path: filled with the nodes at which a token was drawn, the root first: the rows to keep, also when code of the
            user's raises on the way.
    """
    children, node = tree.children(), 0
    while True:
        path.append(node)
        token = emitter.emit(logits[:, node])
        node = children.get((node, token))
        if emitter.finished or node is None:
            return
