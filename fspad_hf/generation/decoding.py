"""The loop: prefill -> [ grow a tree -> verify it -> walk it -> keep the path ]*."""

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from ..host import CACHE
from ..modeling_fspad import FSPADDraftModel
from .candidate_generator import FSPADCandidateGenerator
from .costs import costs_of
from .graphs import make_rounds
from .probe import probe
from .tuning import trees_of
from .verification import NoiseQueue, TokenEmitter


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
        input_ids (`[1, prompt]`): the prompt; `model_kwargs` are as `generate` prepares them.
    """
    found = probe(model)
    target = found.view(model)
    noise = None
    if generation_config.do_sample:
        noise = NoiseQueue(input_ids.device, target.text_config.vocab_size)
    emitter = TokenEmitter(input_ids, logits_processor, stopping_criteria, generation_config, streamer, noise)
    generator = FSPADCandidateGenerator(draft, target, logits_processor, noise)
    record = SpeculationRecord()

    with ExitStack() as stack:
        stack.enter_context(target.listening())
        outputs, features = target.prefill(input_ids, generation_config, model_kwargs)
        prefill_cache = outputs[CACHE]
        emitter.emit(outputs.logits[:, -1])
        del outputs
        if not emitter.finished:
            prompt, offset = _prompt_layout(input_ids, model_kwargs)
            on_round = getattr(streamer, "on_round", None)
            rounds = make_rounds(target, generator, emitter, prefill_cache, features, prompt, offset, on_round)
            stack.callback(rounds.close)
            costs = costs_of(target, draft, rounds.captured) if generator.settings.tree == "auto" else None
            trees = trees_of(generator.settings, costs)

        while not emitter.finished:
            found = rounds.lookup.continuation(generator.settings.tree_lookup_tokens)
            shape = rounds.limit(trees.choose(found), generation_config.max_length)
            tree, path = rounds.run(shape, found.tokens[: shape.lookup], costs)
            trees.observe(tree, path, found, emitter.emitted[-len(path) :])
            record.accepted_lengths.append(len(path))

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
