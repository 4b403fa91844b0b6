"""The loop: prefill -> [ grow a tree -> verify it -> walk it -> keep the path ]*."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import logging

from ..host import CACHE
from ..modeling_fspad import FSPADDraftModel
from ..speculation_config import SpeculationConfig
from . import continuation, exact_mode
from .costs import costs_of
from .drafting import Drafter
from .graphs import counted_call, graphs_of
from .noise import NoiseQueue
from .probe import probe
from .rounds import Rounds
from .stateful import is_stateful
from .tree import TreeShape
from .tuning import trees_of
from .verification import TokenEmitter, is_by_row, processors_of

logger = logging.get_logger(__name__)


@dataclass
class SpeculationRecord:
    """
    What speculation did in one call.

    Args:
        accepted_lengths: tokens emitted by each round, the bonus token included; in a batch by each round of the first
            sequence, then of the next.
        sequences: in a batch the record of each sequence.
    """

    accepted_lengths: list[int] = field(default_factory=list)
    sequences: list["SpeculationRecord"] = field(default_factory=list)

    @classmethod
    def of(cls, lengths: list[list[int]]) -> "SpeculationRecord":
        """From the accepted lengths of each sequence."""
        if len(lengths) == 1:
            return cls(lengths[0])
        return cls([length for one in lengths for length in one], [cls(one) for one in lengths])

    @property
    def rounds(self) -> int:
        """Verification forwards; the prefill is not one."""
        return max((one.rounds for one in self.sequences), default=len(self.accepted_lengths))

    @property
    def tau(self) -> float | None:
        """Tokens after the first, per verification forward and sequence in it; `None` without a round."""
        lengths = self.accepted_lengths
        return sum(lengths) / len(lengths) if lengths else None

    def __repr__(self) -> str:
        tau = self.tau if self.tau is None else f"{self.tau:.2f}"
        batch = f", sequences={len(self.sequences)}" if self.sequences else ""
        return f"SpeculationRecord(rounds={self.rounds}, tau={tau}{batch})"


@dataclass
class FSPADGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with the call's [`SpeculationRecord`]; `None` if it ran without speculation."""

    speculation: SpeculationRecord | None = None


def tree_decoding(
    model: PreTrainedModel,
    draft: FSPADDraftModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config,
    streamer=None,
    **model_kwargs,
) -> FSPADGenerateOutput | torch.LongTensor:
    """
    `GenerationMixin._sample`, several tokens a forward, the same tokens.

    A streamer may have a method `on_round(tree)`: it is called before each round's first token with the tree that the
    tokens put after it walk, and must leave that tree as it is.

    Args:
        model: a target that [`probe`] has passed.
        input_ids (`[batch, prompt]`): the whole prompts, also what a cache passed in holds of them; `model_kwargs` are
            as `generate` prepares them.
    """
    found, batch = probe(model), len(input_ids)
    target = found.view(model)
    batch_criteria = StoppingCriteriaList([c for c in stopping_criteria if batch > 1 and not is_by_row(c)])
    criteria = stopping_criteria
    if batch_criteria:
        criteria = StoppingCriteriaList([c for c in stopping_criteria if is_by_row(c)])
    noise = None
    if generation_config.do_sample:
        noise = NoiseQueue(input_ids.device, target.text_config.vocab_size, batch, bool(batch_criteria))
    own_streamer, emitters = streamer if batch == 1 else None, []
    for number, ids in enumerate(input_ids):
        processors = processors_of(logits_processor, number, batch)
        own = processors, criteria, generation_config, own_streamer, noise, number, bool(batch_criteria)
        emitters.append(TokenEmitter(ids[None], *own))
    settings = settings_of_call(draft, target.device, generation_config, batch)
    if target.chains_only:  # the draft's best children, or what is looked up
        settings.tree_top_k, settings.tree_total_nodes = 1, settings.tree_depth
        if settings.tree_lookup_tokens:
            settings.tree_lookup_tokens = max(settings.tree_lookup_tokens, settings.tree_depth)
    exact_mode.check_rows(model, TreeShape.of(settings).rows)
    drafter, extras = Drafter(draft, target, logits_processor, settings, batch), ForwardOutputs(generation_config)
    lengths: list[list[int]] = [[] for _ in emitters]
    together = None
    if batch > 1:
        together = Lockstep(emitters, input_ids, padding_of(generation_config), streamer, batch_criteria, noise)

    read = continuation.take(model_kwargs.get(CACHE), draft, input_ids) if batch == 1 else None
    with ExitStack() as stack:
        stack.enter_context(counted_call())
        stack.enter_context(target.listening())
        outputs, features = target.prefill(input_ids, generation_config, model_kwargs)
        prefill_cache, target.extras = outputs[CACHE], tuple(extras.of_tokens)
        extras.add_prefill(outputs)
        for row, emitter in enumerate(emitters):
            emitter.emit(outputs.logits[row : row + 1, -1])
        del outputs
        rounds = None
        if not all(emitter.finished for emitter in emitters):
            prompt, offsets = _prompt_layout(input_ids, model_kwargs)
            graphs = None if target.extras else graphs_of(target, drafter, features.dtype, batch)
            on_round = getattr(streamer, "on_round", None) if batch == 1 else None
            wanted = generation_config.return_dict_in_generate or getattr(prefill_cache, "_is_user_defined", False)
            rounds = Rounds(
                target, drafter, emitters, noise, prefill_cache, features, prompt, offsets, on_round, bool(wanted),
                graphs,
            )  # fmt: skip
            stack.callback(rounds.close)
            if read is not None:
                rounds.go_on(read)
            # of recurrent layers nobody knows what a chain costs; of a split target each process would time its own
            unknown = draft.speculation_config.tree is None and is_stateful(prefill_cache)
            auto = (settings.tree == "auto" or unknown) and not target.is_tensor_parallel
            costs = costs_of(target, draft, batch, rounds.graphs is not None) if auto else None
            trees = trees_of(settings, costs)
        if together is not None:
            together.publish()

        while not all(emitter.finished for emitter in emitters):
            found = [lookup.continuation(settings.tree_lookup_tokens) for lookup in rounds.lookups]
            here, most = rounds.emitters, max(found, key=lambda one: (len(one.tokens), one.match))
            shape = rounds.limit(trees.choose(most, rounds.arena.reread_rows), generation_config.max_length)
            before = rounds.arena.longest
            tree, paths = rounds.run(shape, [one.tokens[: shape.lookup] for one in found], costs)
            for row, (emitter, path) in enumerate(zip(here, paths, strict=True)):
                if path:
                    trees.observe(tree.of(row), path, found[row], emitter.emitted[-len(path) :])
                    lengths[emitter.sequence].append(len(path))
                    extras.add(target.outputs, len(tree), path, before)
            if together is not None:
                together.publish()
        if rounds is not None and rounds.cache_is_wanted:
            rounds.settle(padding_of(generation_config))
        whole = batch == 1 and lengths[0] and prompt.all() and not rounds.without_ids
        if whole and rounds.cache_is_wanted and rounds.graphs is None:
            state = continuation.DraftState(emitters[0].input_ids[0].tolist(), drafter.cache, rounds.pending[0])
            continuation.keep(prefill_cache, draft, state)

    if streamer is not None:
        streamer.end()
    lengths = [_within(own, len(emitter.emitted) - 1) for own, emitter in zip(lengths, emitters, strict=True)]
    sequences = emitters[0].input_ids if together is None else together.sequences()
    if not generation_config.return_dict_in_generate:
        return sequences
    return FSPADGenerateOutput(
        sequences=sequences,
        scores=emitters[0].scores,
        logits=emitters[0].raw_logits,
        **extras.of_tokens,
        speculation=SpeculationRecord.of(lengths),
        **{CACHE: prefill_cache},
    )


def _within(lengths: list[int], tokens: int) -> list[int]:
    """Accepted lengths of the first so many tokens; a sequence may have been ended at an earlier one than its last."""
    kept: list[int] = []
    for length in lengths:
        if (left := tokens - sum(kept)) > 0:
            kept.append(min(length, left))
    return kept


class ForwardOutputs:
    """
    `output_hidden_states` and `output_attentions`: what the forwards of plain decoding return, token by token.

    `of_tokens` has what was asked for, by name: of the first token what the prefill returned, of each other token for
    each layer `[1, 1, hidden]`, or `[1, heads, 1, positions]`.
    """

    def __init__(self, generation_config):
        names = [name for name in ("hidden_states", "attentions") if getattr(generation_config, f"output_{name}")]
        self.of_tokens = {name: () for name in names if generation_config.return_dict_in_generate}

    def add_prefill(self, outputs) -> None:
        for name in self.of_tokens:
            self.of_tokens[name] += (outputs[name],)

    def add(self, outputs, nodes: int, path: list[int], length: int) -> None:
        """
        Of the tokens drawn along a path.

        Args:
            outputs: of a verification whose last rows are the `nodes` of a tree.
            length: positions before the root.
        """
        for name in self.of_tokens:
            layers = outputs[name]
            for step, node in enumerate(path):
                row, columns = node - nodes, [*range(length), *(length + n for n in path[: step + 1])]
                parts = (None if x is None else x[..., [row], :] for x in layers)
                if name == "attentions":
                    parts = (None if x is None else x[..., columns] for x in parts)
                self.of_tokens[name] += (tuple(parts),)


class Lockstep:
    """
    The sequences of a batch as plain decoding has them: a token of each a step, padding behind one that has ended.

    Args:
        streamer: is given each step's tokens, as soon as all sequences have them.
        batch_criteria: criteria that see all sequences at once. A sequence that they end may have gone on meanwhile.
        noise: of a call that samples.
    """

    def __init__(
        self, emitters: Sequence[TokenEmitter], input_ids: torch.LongTensor, padding: int, streamer=None,
        batch_criteria: StoppingCriteriaList | None = None, noise: NoiseQueue | None = None,
    ):  # fmt: skip
        self.emitters, self.input_ids, self.padding = list(emitters), input_ids, padding
        self.streamer, self.batch_criteria, self.noise, self.steps = streamer, batch_criteria, noise, 0

    def publish(self):
        while (self.streamer is not None or self.batch_criteria) and self.steps < self._complete():
            self.steps += 1
            if self.streamer is not None:
                self.streamer.put(torch.tensor([row[-1] for row in self._padded(self.steps)], device="cpu"))
            if self.batch_criteria:
                self._apply_batch_criteria()

    def _apply_batch_criteria(self):
        done = self.batch_criteria(self.sequences(self.steps), None).tolist()
        for emitter, ends in zip(self.emitters, done, strict=True):
            if ends and len(emitter.emitted) >= self.steps:
                emitter.cut(self.steps)
        if self.noise is not None:
            self.noise.follow(self.steps)

    def _complete(self) -> int:
        """The steps of which all tokens are known."""
        going = [len(emitter.emitted) for emitter in self.emitters if not emitter.finished]
        return min(going, default=max(len(emitter.emitted) for emitter in self.emitters))

    def sequences(self, steps: int | None = None) -> torch.LongTensor:
        """`[batch, length]`, all of them or as they were after so many steps."""
        steps = max(len(emitter.emitted) for emitter in self.emitters) if steps is None else steps
        return torch.cat((self.input_ids, self.input_ids.new_tensor(self._padded(steps))), dim=1)

    def _padded(self, steps: int) -> list[list[int]]:
        return [e.emitted[:steps] + [self.padding] * (steps - len(e.emitted)) for e in self.emitters]


def padding_of(generation_config) -> int:
    """What plain decoding puts behind a sequence that has ended."""
    padding = generation_config._pad_token_tensor
    return 0 if padding is None else int(padding)


def settings_of_call(
    draft: FSPADDraftModel, device: torch.device, generation_config, batch: int = 1
) -> SpeculationConfig:
    """
    The draft's settings, resolved, and what the call says to stock assistants: `num_assistant_tokens`, the most tokens
    to guess ahead, is the most levels here. `assistant_confidence_threshold` says nothing about a tree, which has the
    most confident nodes anyway.
    """
    settings, default = draft.speculation_settings(device, batch), GenerationConfig._get_default_generation_params()

    configs = generation_config, getattr(draft, "generation_config", None)

    def asked(name: str):
        given = (getattr(config, name, None) for config in configs)
        return next((value for value in given if value not in (None, default.get(name))), None)

    if (most := asked("num_assistant_tokens")) is not None:
        settings.tree_depth = min(settings.tree_depth, max(int(most), 1))
        settings.tree_lookup_tokens = min(settings.tree_lookup_tokens, max(int(most), 1))
        settings = settings.resolved(device, batch=batch)  # fewer levels may hold fewer nodes
    if asked("assistant_confidence_threshold") is not None:
        logger.warning_once(
            "assistant_confidence_threshold says nothing about a draft tree and is not used: set "
            "draft.speculation_config.tree_total_nodes, of which the most confident nodes are verified."
        )
    return settings


def _prompt_layout(input_ids: torch.LongTensor, model_kwargs: dict) -> tuple[torch.BoolTensor, list[list[int]]]:
    """
    Which prompt columns hold tokens, `[batch, prompt]`, and of each row the next token's position ids (several for a
    model with multimodal rotary positions) less its column.
    """
    mask, columns = model_kwargs.get("attention_mask"), prompt_columns(input_ids, model_kwargs)
    prefix = input_ids.new_ones(len(input_ids), columns, dtype=torch.bool) if mask is None else mask.bool()
    positions, last = model_kwargs.get("position_ids"), columns - 1
    if positions is None:
        return prefix, [[0]] * len(input_ids)
    ends = positions.view(-1, *positions.shape[-2:])[..., -1].expand(-1, len(input_ids)) - last  # [kinds, batch]
    return prefix, ends.T.tolist()


def prompt_columns(input_ids: torch.LongTensor, model_kwargs: dict) -> int:
    """The prompt's tokens, padding included; there may be embeddings of all of them, and no ids."""
    embeddings = model_kwargs.get("inputs_embeds")
    return input_ids.shape[1] if embeddings is None else max(input_ids.shape[1], embeddings.shape[1])
