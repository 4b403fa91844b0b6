"""The target talking to itself: every row of a batch one token further a step, on device tensors alone.

Each row is a small automaton. Its states are the ids of the template's glue, to be written as they are, and three in
which the target chooses: the first token of a user turn, the rest of it, and an answer. All tables are tensors, so a
step has no branch on what was drawn and never waits for the device.
"""

from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticLayer

from ..generation.capturing import capture
from ..generation.probe import probe
from ..generation.target import attention_windows, execution_device
from ..host import CACHE
from .templates import ChatGlue

USER_START, USER, ASSISTANT = range(3)  # states of choice, counted from the number of glue ids
WARM_UP_STEPS = 3


class TurnTables:
    """
    The automaton of one chat template, as tensors.

    Args:
        glue: the template's.
        stop_ids: the ids that end a turn beside the first of the glue after it, such as the model's EOS ids; in a row
            the glue's own first id stands in their place.
        special_ids: never chosen within a user's turn unless they end it.
        vocab_size: the width of the target's logits.
    """

    def __init__(self, glue: ChatGlue, stop_ids: Iterable[int], special_ids: Iterable[int], vocab_size: int, device):
        segments = [*glue.opening], [*glue.to_assistant], [*glue.to_user]
        forced = [token for segment in segments for token in segment]
        self.count = len(forced)
        answer, question = len(segments[0]), len(segments[0]) + len(segments[1])  # where these two segments start
        successor = [i + 1 for i in range(self.count)] + [self.count + state for state in (USER, USER, ASSISTANT)]
        for last, state in ((answer - 1, USER_START), (question - 1, ASSISTANT), (self.count - 1, USER_START)):
            successor[last] = self.count + state
        self.forced = torch.tensor(forced, device=device)  # [glue]
        self.successor = torch.tensor(successor, device=device)  # [states]
        self.closing = torch.tensor([answer, answer, question], device=device)  # [3]: the glue after a turn
        ends = torch.zeros(3, vocab_size, dtype=torch.bool)
        ends[:, [token for token in stop_ids if token < vocab_size]] = True
        ends[:ASSISTANT, glue.to_assistant[0]] |= glue.ends_user
        ends[ASSISTANT, glue.to_user[0]] |= glue.ends_assistant
        banned = torch.zeros_like(ends)
        banned[:ASSISTANT, [token for token in special_ids if token < vocab_size]] = True
        banned &= ~ends
        banned[USER_START] |= ends[USER_START]
        self.ends, self.banned = ends.to(device), banned.to(device)  # [3, vocabulary]

    def advance(
        self, state: torch.LongTensor, logits: torch.Tensor, noise: torch.Tensor, temperature: torch.Tensor
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        The next token of each row and the state after it.

        A choice is argmax(logits - T log E) with E exponential: a draw from softmax(logits / T), and at T = 0 the
        greedy choice, by one formula.

        Args:
            state (`[rows]`): before the token.
            logits, noise (`[rows, vocabulary]`): fp32; E.
            temperature (`[rows, 3]`): T in the three states of choice.
        """
        choice = (state - self.count).clamp(min=0)
        scale = temperature.gather(1, choice[:, None])
        scores = logits.masked_fill(self.banned[choice], float("-inf"))
        chosen = (scores - scale * noise.clamp(min=torch.finfo(noise.dtype).tiny).log()).argmax(-1)
        ended = (state >= self.count) & self.ends[choice, chosen]
        state = torch.where(ended, self.closing[choice], state)
        written = self.forced[state.clamp(max=self.count - 1)]
        return torch.where(state < self.count, written, chosen), self.successor[state]


class SelfplayDecoder:
    """
    Rows of conversation, one token of every row a step.

    All rows stand at the same position throughout, so nothing is padded. [`~SelfplayDecoder.step`] touches tensors of
    fixed shapes and addresses only: on a CPU it runs as it is, on CUDA the very same function is captured once as a
    graph and replayed. The CUDA half is that thin wrapper, [`captured`]; the step itself is what the tests run.

    Args:
        target: a causal language model; every layer's keys are stored in full, windows are the mask's business.
        tables: the automaton.
        rows, row_length: the batch.
        user_temperature: T of the user turns.
        graph: capture on CUDA.

    Raises:
        ValueError: the model cannot be driven by explicit masks and positions (recurrent or alibi models, ...).
    """

    def __init__(
        self, target: PreTrainedModel, tables: TurnTables, rows: int, row_length: int, user_temperature: float = 1.0,
        graph: bool = True,
    ):  # fmt: skip
        reason = probe(target).reason
        if reason is not None:
            raise ValueError(
                f"{type(target).__name__} cannot be a target because {reason}: expected a decoder-only model with "
                "attention that takes masks and positions."
            )
        text_config, device = target.config.get_text_config(), execution_device(target)
        self.target, self.tables, self.device = target, tables, device
        self.user_temperature, self.row_length = user_temperature, row_length
        layers = len(DynamicCache(config=text_config).layers) or text_config.num_hidden_layers
        self.cache = Cache(layers=[StaticLayer(row_length) for _ in range(layers)])
        self.windows = attention_windows(text_config)
        self.keys = torch.arange(row_length, device=device)
        self.tokens = torch.zeros(rows, row_length, dtype=torch.long, device=device)
        self.state = torch.zeros(rows, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.temperature = torch.zeros(rows, 3, device=device)
        self.noise = torch.ones(rows, text_config.vocab_size, device=device)
        self.generator = torch.Generator(device)
        self.run_step = self._captured() if graph and device.type == "cuda" else self.step

    def _captured(self) -> Callable[[], None]:
        try:
            with self.target._optimize_model_for_decode():  # of experts, the kind whose shapes do not depend on data
                return captured(self.step, self.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"{type(self.target).__name__} cannot be captured as a CUDA graph ({str(error).splitlines()[0]}): "
                "use graph=False (--no-graph)."
            ) from error

    @torch.no_grad()
    def rows(
        self, temperatures: list[float], seed: int, report: Callable[[int], None] = lambda tokens: None
    ) -> torch.LongTensor:
        """
        A batch of conversations from the start, `[rows, row_length]` on the CPU; each ends where the row is full.

        Args:
            temperatures: T of each row's answers.
            seed: the batch is a function of it, the target and the settings.
            report: called after each step with the number of tokens it added.
        """
        self._reset(temperatures)
        self.generator.manual_seed(seed)
        for _ in range(self.row_length - 1):
            self.noise.exponential_(generator=self.generator)  # outside the graph, whose draws would repeat
            self.run_step()
            report(len(self.tokens))
        return self.tokens.cpu()

    def _reset(self, temperatures: list[float]):
        answers = torch.tensor(temperatures, dtype=self.temperature.dtype)
        self.temperature.fill_(self.user_temperature)
        self.temperature[:, ASSISTANT] = answers.to(self.device)
        self.cache.reset()
        self.position.zero_()
        self.tokens[:, 0] = self.tables.forced[0]
        self.state.copy_(self.tables.successor[0].expand_as(self.state))

    def step(self) -> None:
        """Reads the token at `position` of every row and writes the next."""
        logits = self.target(
            input_ids=self.tokens.index_select(1, self.position),
            position_ids=self.position.expand(len(self.tokens), 1),
            attention_mask=self._mask(),
            use_cache=True,
            return_dict=True,
            **{CACHE: self.cache},
        ).logits[:, -1]
        token, state = self.tables.advance(self.state, logits.float(), self.noise, self.temperature)
        self.position.add_(1)
        self.tokens.index_copy_(1, self.position, token[:, None])
        self.state.copy_(state)

    def _mask(self):
        """One additive mask `[rows, 1, 1, row_length]`, or one for each kind of layer where the model mixes kinds."""
        masks = {}
        for kind, window in self.windows.items():
            hidden = self.keys > self.position
            if window is not None:
                hidden = hidden | (self.keys <= self.position - window)
            mask = torch.zeros_like(hidden, dtype=self.target.dtype).masked_fill(
                hidden, torch.finfo(self.target.dtype).min
            )
            masks[kind] = mask.expand(len(self.tokens), 1, 1, -1)
        return masks if len(masks) > 1 else next(iter(masks.values()))


@torch.no_grad()
def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """
    `step` as a CUDA graph: warmed up on a side stream, recorded once, replayed at each call.

    It only records; what is computed is `step`, the function that runs eagerly elsewhere. The warm-up advances
    whatever state `step` has, so set that state afterwards.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
    return capture(step, device)[0]
