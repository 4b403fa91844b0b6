"""Emitting tokens exactly as plain decoding does, and walking a verified tree along them."""

import copy
from collections.abc import Callable, Sequence

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from .noise import NoiseQueue, is_distribution, race
from .tree import CandidateTree

# What transformers has that looks at each sequence by itself, and remembers nothing.
BY_ROW = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper", "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor", "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor",
    "SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor", "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor", "ExponentialDecayLengthPenalty",
    "LogitNormalization", "SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor",
    "EosTokenCriteria", "MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria",
}  # fmt: skip
PLAIN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria)  # functions of the last token and the length


def is_by_row(one) -> bool:
    """Whether a processor or criterion is one of [`BY_ROW`]."""
    return type(one).__name__ in BY_ROW and type(one).__module__.startswith("transformers.")


def settings_of(processors: LogitsProcessorList) -> tuple:
    """The settings of processors, to see whether they have changed."""
    return tuple(
        (type(p).__name__, *((k, v if is_plain(v) else id(v)) for k, v in sorted(vars(p).items()))) for p in processors
    )


def is_plain(value) -> bool:
    """Whether it can be told from another by comparing."""
    return value is None or isinstance(value, (bool, int, float, str))


def processors_of(processors: LogitsProcessorList, sequence: int, batch: int) -> LogitsProcessorList:
    """What processes the logits of one sequence of a batch alone: the same, less what they know of the others."""
    if batch == 1:
        return processors

    def own(processor):
        ignored = getattr(processor, "prompt_ignore_length", None)  # of a repetition penalty: each row's padding
        if not isinstance(ignored, torch.Tensor):
            return processor
        mine = copy.copy(processor)
        mine.prompt_ignore_length = ignored[sequence : sequence + 1]
        return mine

    return LogitsProcessorList([own(processor) for processor in processors])


class TokenEmitter:
    """
    Everything plain decoding does for one token of one sequence, once per token and in its order: processors on the
    true prefix, scores and logits, the draw, stopping criteria, streamer. Mirrors `GenerationMixin._sample`.

    Args:
        input_ids (`[1, prompt]`): grows by each token emitted.
        noise: where draws come from; `None` is greedy.
        sequence: its number in the batch.
        ends_with_batch: criteria that see all sequences are to say where it ends, see [`~TokenEmitter.cut`].

    `emitted` are the tokens so far, on the host; `ends` are those after which nothing is emitted.
    """

    def __init__(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config,
        streamer=None,
        noise: NoiseQueue | None = None,
        sequence: int = 0,
        ends_with_batch: bool = False,
    ):
        self.sequence, self.ends_with_batch = sequence, ends_with_batch
        self._ids, self.length = input_ids, input_ids.shape[1]
        self.emitted: list[int] = []
        self.settings: tuple | None = None  # of the processors when tokens were drawn beforehand; `None` is unwatched
        self.logits_processor, self.stopping_criteria, self.streamer = logits_processor, stopping_criteria, streamer
        self.noise = noise
        self.ends = {
            token
            for criterion in stopping_criteria
            if type(criterion) is EosTokenCriteria
            for token in criterion.eos_token_id.flatten().tolist()
        }
        self.plain_criteria = all(type(criterion) in PLAIN_CRITERIA for criterion in stopping_criteria)
        wanted = generation_config.return_dict_in_generate
        self.scores = () if wanted and generation_config.output_scores else None
        self.raw_logits = () if wanted and generation_config.output_logits else None
        self.finished = False

    @property
    def input_ids(self) -> torch.LongTensor:
        """All tokens so far, `[1, length]`."""
        late = self.length - self._ids.shape[1]
        if late:
            self._ids = torch.cat((self._ids, self._ids.new_tensor([self.emitted[-late:]])), dim=-1)
        return self._ids

    def emit(self, logits: torch.Tensor) -> int:
        """
        Emits the token that follows `input_ids`; `logits` is the target's row for it, `[1, vocabulary]`.

        Returns:
            The token that the model is to read next.
        """
        logits = fresh_row(logits).to(self._ids.device)
        scores = self.logits_processor(self.input_ids, logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.raw_logits is not None:
            self.raw_logits += (logits,)
        if self.noise is not None:
            token = self.noise.draw(torch.nn.functional.softmax(scores, dim=-1), self.sequence)
        else:
            token = torch.argmax(scores, dim=-1)
        self._ids = torch.cat([self.input_ids, token[:, None]], dim=-1)
        return self._emitted(int(token))

    def take(self, token: int) -> int:
        """Emits a token that was drawn beforehand, by [`walk_ahead`]."""
        if self.noise is not None:
            self.noise.skip(self.sequence)
        return self._emitted(token)

    def can_take(self) -> bool:
        """Whether such a token is still the one that plain decoding would draw."""
        if self.settings is not None and self.settings != settings_of(self.logits_processor):
            return False
        return self.noise is None or self.noise.is_ahead(self.sequence)

    def _emitted(self, token: int) -> int:
        self.emitted.append(token)
        self.length += 1
        # Plain criteria look at the length and the last token alone: no need to wait for the device.
        ids = torch.tensor([[token]], device="cpu").expand(1, self.length) if self.plain_criteria else self.input_ids
        self.finished = bool(self.stopping_criteria(ids, self.scores).all())
        if self.finished and self.noise is not None:
            self.noise.end(self.sequence, len(self.emitted))
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token], device="cpu"))
        if not self.plain_criteria:  # the user's may have written another token there, which the model then reads
            self.emitted[-1] = token = int(self._ids[0, -1])
        return token

    def cut(self, count: int):
        """It ends with its first `count` tokens."""
        self.length -= len(self.emitted) - count
        self._ids, self.finished = self._ids[:, : self.length], True
        del self.emitted[count:]
        if self.noise is not None:
            self.noise.end(self.sequence, count)


def fresh_row(logits: torch.Tensor) -> torch.Tensor:
    """What processors are given: an fp32 copy of their own."""
    return logits.to(copy=True, dtype=torch.float32, memory_format=torch.contiguous_format)


def walk(
    tree: CandidateTree,
    draw: Callable[[int, torch.LongTensor, torch.BoolTensor], torch.LongTensor | None],
    levels: int,
    nodes: torch.LongTensor | None = None,
    going: torch.BoolTensor | None = None,
) -> torch.LongTensor:
    """
    Follows the tokens drawn, level by level and in all trees at once, for as long as each is among its node's
    children; the first that is not is the bonus. Waits for no value, so that a graph can hold it, unless `draw` does.

    Args:
        draw: (level, nodes, going) -> the tokens drawn at these nodes, `[batch]` each; `None` ends the walk.
        levels: of the tree.
        nodes, going (`[batch]`): where to begin, and in which trees; by default at all roots.

    Returns:
        `[batch, 1 + 2 * (levels + 1)]`: how many tokens were drawn, the nodes they were drawn at, and the tokens. What
        follows those drawn means nothing.
    """
    numbers = torch.arange(len(tree), device=tree.tokens.device)
    nodes = torch.zeros_like(tree.tokens[:, 0]) if nodes is None else nodes
    going = torch.ones_like(nodes, dtype=torch.bool) if going is None else going
    count, visited, tokens = torch.zeros_like(nodes), [], []
    for level in range(levels + 1):
        token = draw(level, nodes, going)
        if token is None:
            break
        visited.append(nodes), tokens.append(token)
        count = count + going
        at = nodes[:, None]
        child = (tree.parents == at) & (tree.tokens == token[:, None]) & (numbers != at)
        going = going & child.any(1)
        nodes = torch.where(going, child.long().argmax(1), nodes)
    return torch.stack((count, *visited, *tokens), dim=1)


def walk_ahead(
    tree: CandidateTree, logits: torch.Tensor, warpers: LogitsProcessorList, noise: torch.Tensor | None, levels: int
) -> torch.LongTensor:
    """
    [`walk`] without criteria and streamers, which see its tokens later, and without processors that look at the tokens
    before.

    Args:
        logits (`[batch, nodes, vocabulary]`): the target's, at every node.
        warpers: processors of the scores alone.
        noise (`[levels + 1, batch, V]`): of the coming draws; `None` is greedy.

    Returns:
        What [`walk`] returns; no token counts where a draw's distribution was none.
    """
    rows, valid = torch.arange(len(logits), device=logits.device), torch.ones_like(logits[:, 0, 0], dtype=torch.bool)

    def draw(level: int, nodes: torch.LongTensor, going: torch.BoolTensor) -> torch.LongTensor:
        nonlocal valid
        scores = warpers(None, fresh_row(logits[rows, nodes]))
        if noise is None:
            return torch.argmax(scores, dim=-1)
        probabilities = torch.nn.functional.softmax(scores, dim=-1)
        valid = valid & (is_distribution(probabilities) | ~going)
        return race(probabilities, noise[level])

    walked = walk(tree, draw, levels)
    return torch.where(valid[:, None], walked, 0)


def walk_and_emit(
    tree: CandidateTree, logits: torch.Tensor, emitters: Sequence[TokenEmitter], paths: Sequence[list[int]],
    levels: int, nodes: Sequence[int | None],
):  # fmt: skip
    """
    [`walk`] that emits each token as it is drawn.

    Args:
        logits (`[batch, nodes, vocabulary]`): the target's, at every node.
        paths: filled with the nodes at which a token was drawn, the root first: the rows to keep, also when code of
            the user's raises on the way.
        nodes: where to begin; `None` is not at all.
    """

    def draw(level: int, nodes: torch.LongTensor, going: torch.BoolTensor) -> torch.LongTensor | None:
        if not going.any():
            return None
        tokens = [-1] * len(emitters)  # which is nobody's child
        for row, (node, goes) in enumerate(zip(nodes.tolist(), going.tolist(), strict=True)):
            if goes:
                paths[row].append(node)
                token = emitters[row].emit(logits[row : row + 1, node])
                tokens[row] = -1 if emitters[row].finished else token
        return torch.tensor(tokens, device="cpu")

    tokens, parents = torch.stack((tree.tokens, tree.parents)).cpu()  # one wait for the device
    begin = torch.tensor([0 if node is None else node for node in nodes], device="cpu")
    going = torch.tensor([node is not None for node in nodes], device="cpu")
    walk(CandidateTree(tokens, parents, torch.zeros_like(parents)), draw, levels, begin, going)


def emit_drawn(
    tree: CandidateTree, row: int, drawn: Sequence[tuple[int, int]], emitter: TokenEmitter, path: list[int]
) -> int | None:
    """
    Emits tokens that were drawn beforehand, by [`walk_ahead`], for as long as plain decoding would draw the same.

    Args:
        drawn: nodes and the tokens drawn there.
        path: filled as by [`walk_and_emit`].

    Returns:
        The node to go on from with draws of its own, if there is one.
    """
    for node, token in drawn:
        if not emitter.can_take():
            return node
        path.append(node)
        told = emitter.take(token)
        if emitter.finished:
            return None
        if told != token:  # a criterion wrote another one in its place
            return tree.children(row).get((node, told))
    return None
