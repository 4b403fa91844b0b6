"""The one place that patches transformers, and the rules by which a call falls back to plain decoding."""

import functools
import inspect
import os

import torch
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList, pipelines
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.utils import logging

from ..configuration_fspad import FSPADConfig, check_fits
from ..host import CACHE, LAYERS, length_of
from ..modeling_fspad import FSPADDraftModel, layer_width
from ..runtime import quiet_transformers
from .decoding import FSPADGenerateOutput, prompt_columns, tree_decoding
from .noise import default_generator
from .probe import probe
from .remembered import Remembered
from .stateful import is_stateful
from .target import is_compiled
from .verification import is_by_row

logger = logging.get_logger(__name__)

# What `generate` itself hands to a decoder-only text model; anything else is input that a tree knows nothing of.
KNOWN_MODEL_KWARGS = {
    "attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "inputs_embeds",
    "output_attentions", "output_hidden_states",
}  # fmt: skip


EXTRA_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
HOST_LOOP = ("_sample", "_update_model_kwargs_for_generation")  # what the tree loop stands in for


def install():
    """Lets `generate` take a [`FSPADDraftModel`] as `assistant_model`. Done on import; a second call does nothing."""
    for owner, name, wrap in PATCHES:
        original = getattr(owner, name)
        if not hasattr(original, "_fspad_original"):
            patched = wrap(original)
            patched._fspad_original = original
            setattr(owner, name, patched)


def uninstall():
    """Puts transformers back as it was."""
    for owner, name, _ in PATCHES:
        patched = getattr(owner, name)
        setattr(owner, name, getattr(patched, "_fspad_original", patched))


_named = Remembered()


def as_draft(target: PreTrainedModel, assistant) -> object:
    """
    What is passed as `assistant_model`, with a draft's path or Hub id turned into the draft and a compiled draft into
    the draft itself; anything else is returned as it is.

    What a string names is loaded once, in the target's dtype and on its device, and kept for as long as the target
    lives.

    Raises:
        ValueError: a string that names no FSPAD draft.
        OSError: the draft's weights are missing or damaged.
    """
    compiled = getattr(assistant, "_orig_mod", None)  # of torch.compile(draft), which is no FSPADDraftModel
    if isinstance(compiled, FSPADDraftModel):
        return compiled
    if not isinstance(assistant, (str, os.PathLike)):
        return assistant
    name = os.fspath(assistant)
    place = torch.device("cpu") if target.device.type == "meta" else target.device  # an offloaded target's is meta

    def load() -> FSPADDraftModel:
        try:
            config = FSPADConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"assistant_model={name!r} is a string that names no usable FSPAD draft "
                f"({str(error).strip().splitlines()[0]}): expected a model object, or the path or Hub id of an FSPAD "
                "draft; load any other assistant with AutoModelForCausalLM.from_pretrained first."
            ) from error
        with quiet_transformers():
            return FSPADDraftModel.from_pretrained(name, config=config, dtype=target.dtype).to(place)

    return _named.get(target, (name, target.dtype, place), load)


def _wrap_generate(original):
    @functools.wraps(original)
    def generate(self, *args, **kwargs):
        if kwargs.get("assistant_model") is not None and not kwargs.get("custom_generate"):
            kwargs["assistant_model"] = draft = as_draft(self, kwargs["assistant_model"])
            if isinstance(draft, FSPADDraftModel) and kwargs.get("cache_implementation") == "paged":
                logger.warning_once("Continuous batching takes no draft: this call generates without speculation.")
                kwargs = {name: value for name, value in kwargs.items() if not name.startswith("assistant_")}
        return original(self, *args, **kwargs)

    return generate


def _wrap_pipeline(original):
    @functools.wraps(original)
    def load_assistant_model(model, assistant_model, assistant_tokenizer):
        # It would compare all special tokens, padding included, and ask for a tokenizer that a draft has no use for.
        draft = getattr(assistant_model, "_orig_mod", assistant_model)
        if isinstance(draft, FSPADDraftModel) and model.can_generate():
            return draft, None
        return original(model, assistant_model, assistant_tokenizer)

    return load_assistant_model


def _wrap_decoding(original):
    @functools.wraps(original)
    def _assisted_decoding(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None,
        inputs_tensor=None, assistant_model=None, assistant_tokenizer=None, tokenizer=None, **model_kwargs,
    ):  # fmt: skip
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        if not isinstance(assistant_model, FSPADDraftModel):
            return original(
                self, *arguments, synced_gpus=synced_gpus, streamer=streamer, inputs_tensor=inputs_tensor,
                assistant_model=assistant_model, assistant_tokenizer=assistant_tokenizer, tokenizer=tokenizer,
                **model_kwargs,
            )  # fmt: skip
        reason = why_not(
            self, assistant_model, input_ids, generation_config, model_kwargs, synced_gpus, logits_processor,
            stopping_criteria,
        )  # fmt: skip
        if reason is None:
            return tree_decoding(self, assistant_model, *arguments, streamer=streamer, **model_kwargs)
        logger.warning_once(
            f"{type(self).__name__} generates without speculation in this call, because {reason}. The output is that "
            "of plain `generate`."
        )
        # type() for the unbound method, as `generate` itself looks decoding methods up
        output = type(self)._sample(self, *arguments, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
        return FSPADGenerateOutput(**output) if type(output) is GenerateDecoderOnlyOutput else output

    return _assisted_decoding


def _wrap_validation(original):
    @functools.wraps(original)
    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        draft = generation_mode_kwargs.get("assistant_model")
        if not isinstance(draft, FSPADDraftModel):
            return original(self, generation_mode, generation_config, generation_mode_kwargs)
        check_pair(self, draft)
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            # Whatever plain decoding can do is allowed: what cannot be speculated falls back to it.
            plain = GenerationMode.SAMPLE if generation_config.do_sample else GenerationMode.GREEDY_SEARCH
            kept = {k: v for k, v in generation_mode_kwargs.items() if not k.startswith("assistant_")}
            return original(self, plain, generation_config, kept)
        logger.warning_once(f"{generation_mode.value} takes no draft: this call generates without speculation.")
        for name in ("assistant_model", "assistant_tokenizer"):
            generation_mode_kwargs.pop(name, None)  # the dict that `generate` hands on to the decoding method
        return original(self, generation_mode, generation_config, generation_mode_kwargs)

    return _validate_generation_mode


def check_pair(target: PreTrainedModel, draft: FSPADDraftModel):
    """
    Raises before anything runs if the draft cannot belong to the target.

    Raises:
        ValueError: a draft without weights (on `meta`), of another width or vocabulary, or with other special tokens.
    """
    if draft.device.type == "meta":
        raise ValueError(
            "The draft is on the `meta` device and has no weights: load it with FSPADDraftModel.from_pretrained(...)."
        )
    text, width = target.config.get_text_config(), layer_width(target.get_output_embeddings())
    check_fits(draft.config, text, width, type(target).__name__)


def why_not(
    model: PreTrainedModel,
    draft: FSPADDraftModel,
    input_ids: torch.LongTensor,
    generation_config,
    model_kwargs: dict,
    synced_gpus: bool = False,
    logits_processor: LogitsProcessorList = (),
    stopping_criteria: StoppingCriteriaList = (),
) -> str | None:
    """The reason why this call cannot be speculated, or `None`; completes "... because"."""
    cache = model_kwargs.get(CACHE)
    unknown = sorted(
        k for k, v in model_kwargs.items()
        if k not in KNOWN_MODEL_KWARGS and v is not None and v != {} and not _is_read_once(model, k)
    )  # fmt: skip
    overridden = [
        name
        for name in HOST_LOOP
        if getattr(type(model), name) is not getattr(GenerationMixin, name) or name in vars(model)
    ]
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    columns = prompt_columns(input_ids, model_kwargs)
    layers = cache.layers if type(cache) is DynamicCache else []
    kinds = sorted({type(x).__name__ for x in layers if type(x) not in LAYERS})
    rules = {
        "it is an encoder-decoder model": model.config.is_encoder_decoder,
        "the prompt is empty": columns == 0,
        "use_cache is off": not model_kwargs.get("use_cache", True),
        "synced_gpus is on": synced_gpus,
        f"{type(model).__name__} has its own {', '.join(overridden)}": bool(overridden),
        "the target, or a part of it, is in train mode (call model.eval())": any(
            module.training for module in model.modules()
        ),
        "the draft is in train mode (call draft.eval())": draft.training,
        "the target is compiled and prefill_chunk_size is set": generation_config.prefill_chunk_size is not None
        and is_compiled(model),
        "max_length crosses the length at which it recomputes everything (longrope)": _turns_longrope(
            model, columns, generation_config.max_length + columns - input_ids.shape[1]
        ),
        f"of the inputs {unknown}": bool(unknown),
        "output_attentions was asked for, of sliding windows": generation_config.return_dict_in_generate
        and generation_config.output_attentions
        and any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers),
        f"its cache is a {type(cache).__name__}": type(cache) is not DynamicCache,
        "its cache is offloaded": getattr(cache, "offloading", False),
        f"its cache has {kinds} layers": bool(kinds),
        "the cache passed in holds the whole prompt": bool(layers) and not kinds and length_of(cache) >= columns,
        "of the shape of position_ids": positions is not None
        and (positions.dim() not in (2, 3) or positions.shape[-1] != columns),
        "of the shape of attention_mask": mask is not None and mask.shape != (len(input_ids), columns),
        "a prompt is nothing but padding": mask is not None and not mask.any(1).all(),
    }
    if len(input_ids) > 1:
        rules |= _rules_of_batches(input_ids, generation_config, logits_processor, stopping_criteria, cache)
    if (reason := next((reason for reason, holds in rules.items() if holds), None)) is not None:
        return reason
    return probe(model).reason


def _rules_of_batches(
    input_ids: torch.LongTensor, generation_config, processors, criteria, cache: Cache | None
) -> dict[str, bool]:
    """What holds for several sequences: one may be ahead of another, so nothing may look at two of them at once."""
    foreign = sorted({type(one).__name__ for one in processors if not is_by_row(one)})
    together = sorted({type(one).__name__ for one in criteria if not is_by_row(one)})
    ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    early = sorted({type(c).__name__ for c in criteria} - {"MaxLengthCriteria", "EosTokenCriteria"})
    wanted = generation_config.return_dict_in_generate
    extras = [name for name in EXTRA_OUTPUTS if getattr(generation_config, name)]
    return {
        "it is recurrent, and this is a batch": type(cache) is DynamicCache and is_stateful(cache),
        f"of {', '.join(foreign)} in a batch": bool(foreign),
        f"of {', '.join(together)} in a batch whose cache of sliding layers is returned": bool(together)
        and (wanted or getattr(cache, "_is_user_defined", False))
        and any(type(layer) is DynamicSlidingWindowLayer for layer in cache.layers),
        f"of {', '.join(early)} without an EOS token in a batch": bool(early) and not ends,
        f"{' and '.join(extras)} was asked for, of a batch": wanted and bool(extras),
        f"a batch is sampled on {input_ids.device.type}": generation_config.do_sample
        and default_generator(input_ids.device) is None,
    }


def _is_read_once(model: PreTrainedModel, name: str) -> bool:
    """Whether an input (of images, of kinds of tokens) is the prefill's alone: no text decoder is given it."""
    decoder = model.get_decoder()
    if model.config.get_text_config() is model.config or decoder in (model, None):
        return False
    takes, decodes = (inspect.signature(one.forward).parameters for one in (model, decoder))
    return name in takes and name not in decodes


def _turns_longrope(model: PreTrainedModel, prompt: int, longest: int) -> bool:
    """Phi-3 and its kin drop the cache where the text outgrows the original context; ours would not."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return False
    if type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
        return False
    text = model.config.get_text_config()
    boundary = getattr(text, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    return boundary is not None and prompt <= boundary < longest


PATCHES = (
    (GenerationMixin, "generate", _wrap_generate),
    (GenerationMixin, "_validate_generation_mode", _wrap_validation),
    (GenerationMixin, "_assisted_decoding", _wrap_decoding),
    (pipelines.base, "load_assistant_model", _wrap_pipeline),
)
