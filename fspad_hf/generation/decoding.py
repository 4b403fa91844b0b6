"""The loop: prefill -> [ grow a tree -> verify it -> walk it -> keep the path ]*.

f_t is the target's feature at position t; a round's root is the last token emitted, which the target has not read yet.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from ..host import CACHE
from ..modeling_fspad import FSPADDraftModel
from .cache import ArenaCache
from .candidate_generator import FSPADCandidateGenerator
from .probe import probe
from .target import Target
from .tuning import trees_of
from .verification import NoiseQueue, TokenEmitter, walk


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
        input_ids (`[1, prompt]`): the prompt; `model_kwargs` are as `generate` prepares them.
    """
    found = probe(model)
    target = Target(model, found.use_hook, found.logit_transform, draft.config.prepack_linears)
    noise = None
    if generation_config.do_sample:
        noise = NoiseQueue(input_ids.device, target.text_config.vocab_size)
    emitter = TokenEmitter(input_ids, logits_processor, stopping_criteria, generation_config, streamer, noise)
    generator = FSPADCandidateGenerator(draft, target, logits_processor, noise)
    record, on_round = SpeculationRecord(), getattr(streamer, "on_round", None)
    prefix, offset = _prompt_layout(input_ids, model_kwargs)

    with ExitStack() as stack:
        stack.enter_context(target.listening())
        stack.enter_context(model._optimize_model_for_decode())
        outputs, features = target.prefill(input_ids, generation_config, model_kwargs)
        prefill_cache = outputs[CACHE]
        emitter.emit(outputs.logits[:, -1])
        del outputs
        if not emitter.finished:
            arena = ArenaCache.from_dynamic(prefill_cache)
            stack.callback(arena.append_to, prefill_cache)  # also when the user's code raises
            shown = prefix[0].to(features.device)
            unread = [(features[:, shown], emitter.input_ids[:, 1:][:, prefix[0].to(input_ids.device)])]
            trees = trees_of(target, draft)

        while not emitter.finished:
            length, shape = emitter.input_ids.shape[1], trees.choose()
            depth = depth_limit(shape.depth, length, offset, generation_config.max_length, target.text_config)
            if depth:  # a plain step leaves the draft behind; it catches up before its next tree
                generator.accept(*(torch.cat(parts, dim=1) for parts in zip(*unread, strict=True)))
                unread = []
            tree = generator.grow(emitter.input_ids[:, -1:], shape._replace(depth=depth))
            logits, features = target.verify(tree, arena, prefix, position=length - 1 + offset)
            if on_round is not None:
                on_round(tree)
            path: list[int] = []
            try:
                walk(tree, logits, emitter, path)
            finally:
                arena.keep(path)
            trees.observe(tree, path)
            record.accepted_lengths.append(len(path))
            prefix = torch.cat((prefix, prefix.new_ones(1, len(path))), dim=-1)
            unread.append((features[:, path], emitter.input_ids[:, -len(path) :]))

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


def _prompt_layout(input_ids: torch.LongTensor, model_kwargs: dict) -> tuple[torch.BoolTensor, int]:
    """Which prompt columns hold tokens, `[1, prompt]`, and a token's position id less its column."""
    mask = model_kwargs.get("attention_mask")
    prefix = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    positions = model_kwargs.get("position_ids")
    last = input_ids.shape[1] - 1 if positions is None else int(positions[0, -1])
    return prefix, last - (input_ids.shape[1] - 1)


def depth_limit(depth: int, length: int, offset: int, max_length: int, text_config) -> int:
    """
    No deeper than tokens can still be emitted, nor past the end of a table of positions, and never across the length
    at which a dynamic or longrope model turns its frequencies.
    """
    depth = min(depth, max_length - length - 1)
    rope = getattr(text_config, "rope_parameters", None) or {}
    table = getattr(text_config, "max_position_embeddings", None)
    if not rope and table is not None:
        depth = min(depth, table - (length + offset))
    for parameters in [rope, *(p for p in rope.values() if isinstance(p, dict))]:
        kind = parameters.get("rope_type")
        if kind in ("dynamic", "longrope"):
            default = getattr(text_config, "original_max_position_embeddings", None)
            boundary = parameters.get("original_max_position_embeddings") or default
            room = (boundary or text_config.max_position_embeddings) - (length + offset)
            if room >= 0:
                depth = min(depth, room)
            elif kind == "dynamic":
                depth = 0
    return max(depth, 0)
