"""The loop: prefill -> [ grow a tree -> verify it -> walk it -> keep the path ]*."""

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import logging

from ..host import CACHE
from ..modeling_fspad import FSPADDraftModel
from ..speculation_config import SpeculationConfig
from . import continuation
from .costs import costs_of
from .drafting import Drafter
from .graphs import make_rounds
from .probe import probe
from .tuning import trees_of
from .verification import NoiseQueue, TokenEmitter

logger = logging.get_logger(__name__)


@dataclass
class SpeculationRecord:
    """
    What speculation did in one call.

    Args:
        accepted_lengths: tokens emitted by each round, the bonus token included.
    """

    accepted_lengths: list[int] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        """Verification forwards; the prefill is not one."""
        return len(self.accepted_lengths)

    @property
    def tau(self) -> float | None:
        """Tokens after the first, per verification forward; `None` without a round."""
        return sum(self.accepted_lengths) / self.rounds if self.rounds else None

    def __repr__(self) -> str:
        tau = self.tau if self.tau is None else f"{self.tau:.2f}"
        return f"SpeculationRecord(rounds={self.rounds}, tau={tau})"


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
    `GenerationMixin._sample` for one sequence, several tokens a forward, the same tokens.

    A streamer may have a method `on_round(tree)`: it is called before each round's first token with the tree that the
    tokens put after it walk, and must leave that tree as it is.

    Args:
        model: a target that [`probe`] has passed.
        input_ids (`[1, prompt]`): the whole prompt, also what a cache passed in holds of it; `model_kwargs` are as
            `generate` prepares them.
    """
    found = probe(model)
    target = found.view(model)
    noise = None
    if generation_config.do_sample:
        noise = NoiseQueue(input_ids.device, target.text_config.vocab_size)
    emitter = TokenEmitter(input_ids, logits_processor, stopping_criteria, generation_config, streamer, noise)
    settings = settings_of_call(draft, target.device, generation_config)
    drafter = Drafter(draft, target, logits_processor, noise, settings)
    record = SpeculationRecord()

    read = continuation.take(model_kwargs.get(CACHE), draft, input_ids)
    with ExitStack() as stack:
        stack.enter_context(target.listening())
        outputs, features = target.prefill(input_ids, generation_config, model_kwargs)
        prefill_cache = outputs[CACHE]
        emitter.emit(outputs.logits[:, -1])
        del outputs
        if not emitter.finished:
            prompt, offset = _prompt_layout(input_ids, model_kwargs)
            on_round = getattr(streamer, "on_round", None)
            rounds = make_rounds(target, drafter, emitter, prefill_cache, features, prompt, offset, on_round)
            stack.callback(rounds.close)
            if read is not None:
                rounds.go_on(read)
            costs = costs_of(target, draft, rounds.captured) if settings.tree == "auto" else None
            trees = trees_of(settings, costs)

        while not emitter.finished:
            found = rounds.lookup.continuation(settings.tree_lookup_tokens)
            shape = rounds.limit(trees.choose(found), generation_config.max_length)
            tree, path = rounds.run(shape, found.tokens[: shape.lookup], costs)
            trees.observe(tree, path, found, emitter.emitted[-len(path) :])
            record.accepted_lengths.append(len(path))
        if record.rounds and prompt.all() and not rounds.captured:
            state = continuation.DraftState(emitter.input_ids[0].tolist(), drafter.cache, rounds.unread)
            continuation.keep(prefill_cache, draft, state)

    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return emitter.input_ids
    return FSPADGenerateOutput(
        sequences=emitter.input_ids,
        scores=emitter.scores,
        logits=emitter.raw_logits,
        speculation=record,
        **{CACHE: prefill_cache},
    )


def settings_of_call(draft: FSPADDraftModel, device: torch.device, generation_config) -> SpeculationConfig:
    """
    The draft's settings, resolved, and what the call says to stock assistants: `num_assistant_tokens`, the most tokens
    to guess ahead, is the most levels here. `assistant_confidence_threshold` says nothing about a tree, which has the
    most confident nodes anyway.
    """
    settings, default = draft.speculation_settings(device), GenerationConfig._get_default_generation_params()

    configs = generation_config, getattr(draft, "generation_config", None)

    def asked(name: str):
        given = (getattr(config, name, None) for config in configs)
        return next((value for value in given if value not in (None, default.get(name))), None)

    if (most := asked("num_assistant_tokens")) is not None:
        settings.tree_depth = min(settings.tree_depth, max(int(most), 1))
        settings.tree_lookup_tokens = min(settings.tree_lookup_tokens, max(int(most), 1))
        settings = settings.resolved(device)  # fewer levels may hold fewer nodes
    if asked("assistant_confidence_threshold") is not None:
        logger.warning_once(
            "assistant_confidence_threshold says nothing about a draft tree and is not used: set "
            "draft.speculation_config.tree_total_nodes, of which the most confident nodes are verified."
        )
    return settings


def _prompt_layout(input_ids: torch.LongTensor, model_kwargs: dict) -> tuple[torch.BoolTensor, int]:
    """Which prompt columns hold tokens, `[1, prompt]`, and a token's position id less its column."""
    mask = model_kwargs.get("attention_mask")
    prefix = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    positions = model_kwargs.get("position_ids")
    last = input_ids.shape[1] - 1 if positions is None else int(positions[0, -1])
    return prefix, last - (input_ids.shape[1] - 1)
