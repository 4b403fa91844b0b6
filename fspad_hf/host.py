"""What is asked of transformers by name: what its versions call differently, its kinds of layers and of models."""

import inspect
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    cache_utils,
)

# The name under which models take and return their cache: "cache" from 5.24 on.
CACHE = "past_key_values"
if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
    CACHE = "cache"


# The layers of a cache that rounds can go on from: keys and values, windows of them, recurrent states, or nothing.
LAYERS = tuple(
    getattr(cache_utils, name)
    for name in (
        "DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer", "DummyLayer",
    )
    if hasattr(cache_utils, name)
)  # fmt: skip


def length_of(cache: Cache | None) -> int:
    """The tokens that a cache holds; 0 also where it has nothing but recurrent states, which do not count them."""
    return 0 if cache is None or all(cache.is_linear) else cache.get_seq_length()


# Whose input embedding multiplies by the root of its width; elsewhere such a factor stands in the model's forward.
SCALED_EMBEDDING = (
    "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "vaultgemma",
)  # fmt: skip


def embedding_scale(text_config: PreTrainedConfig) -> float | None:
    """What a target's `get_input_embeddings()` multiplies the rows of its table by; `None`: it does more to them."""
    if text_config.model_type.startswith("inkling"):
        return None  # normalises them
    if text_config.model_type == "minicpm3":
        return float(text_config.scale_emb)
    scaled = text_config.model_type in SCALED_EMBEDDING or getattr(text_config, "scale_embedding", False)
    return text_config.hidden_size**0.5 if scaled else 1.0


def load_target(name: str, **kwargs) -> PreTrainedModel:
    """The model of that path or Hub id, as [`target_class`] says."""
    asked = {k: kwargs[k] for k in ("token", "cache_dir", "local_files_only", "trust_remote_code") if k in kwargs}
    return target_class(AutoConfig.from_pretrained(name, **asked)).from_pretrained(name, **kwargs)


def target_class(config: PreTrainedConfig) -> type:
    """What loads a target: as a causal model, or else as one that sees."""
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def note_commit(model: PreTrainedModel) -> PreTrainedModel:
    """
    The model, just loaded from the default branch, with `config._commit_hash`, which transformers dropped in 5.24: the
    commit of its repository on the Hub, `None` of a folder.
    """
    if not hasattr(model.config, "_commit_hash"):
        local = Path(model.name_or_path).exists()
        found = None if local else try_to_load_from_cache(model.name_or_path, "config.json")
        model.config._commit_hash = Path(found).parent.name if isinstance(found, str) else None
    return model
