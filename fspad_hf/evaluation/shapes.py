"""Models of a given shape with random weights: what a pair would cost, without its weights."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..modeling_fspad import FSPADDraftModel, config_for_target
from ..speculation_config import FIELDS

STD = 0.02
SHAPES = {
    "llama-3-8b": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "llama-2-7b": lambda: LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5),
    "smollm2-135m": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    ),
}  # fmt: skip


def shape_config(shape: str) -> PreTrainedConfig:
    """
    The configuration that `shape` names.

    Args:
        shape: a key of [`SHAPES`], a config.json or its folder, or a Hub id.

    Raises:
        ValueError, OSError: there is none, or it is not that of a causal language model.
    """
    if shape in SHAPES:
        return SHAPES[shape]()
    try:
        config = AutoConfig.from_pretrained(shape)
    except OSError as error:
        raise OSError(
            f"shape={shape!r} has no configuration ({str(error).splitlines()[0]}): expected one of {list(SHAPES)}, "
            "a config.json or its folder, or a Hub id."
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping or config.is_encoder_decoder:
        raise ValueError(
            f"shape={shape!r} is a {config.model_type!r} configuration: expected that of a decoder-only causal "
            f"language model, or one of {list(SHAPES)}."
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its weights would be other tensors; these are plain ones
    return config


def random_target(
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    check: Callable[[PreTrainedModel], None] = lambda meta: None,
) -> PreTrainedModel:
    """
    A model of `config`'s shape in eval mode, made on `device` in `dtype`, its weights random and the same every time.
    It ends nowhere: its generation has no EOS.

    Args:
        check: called first, with the model on `meta`.

    Raises:
        ValueError: the device has not the memory.
    """
    with torch.device("meta"), no_init_weights():
        meta = AutoModelForCausalLM.from_config(config, dtype=dtype)
    meta.tie_weights()
    check(meta)
    size = sum(weight.nbytes for weight in meta.parameters())
    room = _memory(device)
    if size > room:
        raise ValueError(
            f"The weights of this shape take {size / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, and "
            f"{device} has {room / 2**30:.1f}: pass a smaller shape, or --dtype bfloat16."
        )
    with device, no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    _fill(model)
    model.generation_config.eos_token_id = None
    return model.eval()


def random_draft(target: PreTrainedModel, **overrides) -> FSPADDraftModel:
    """
    An untrained draft for `target`, made on its device; `overrides` are fields of [`FSPADConfig`] or
    [`SpeculationConfig`].
    """
    settings = {name: overrides.pop(name) for name in FIELDS if name in overrides}
    config = config_for_target(target, **overrides)
    config.dtype = target.dtype
    default = torch.get_default_dtype()
    torch.set_default_dtype(target.dtype)
    try:
        with target.device, no_init_weights():
            draft = FSPADDraftModel(config)
    finally:
        torch.set_default_dtype(default)
    _fill(draft)
    draft.speculation_config.update(**settings)
    return draft.eval()


@torch.no_grad()
def _fill(model: PreTrainedModel) -> None:
    generator = torch.Generator(model.device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=STD, generator=generator)
        else:
            weight.fill_(1.0 if "norm" in name or name.endswith("weight") else 0.0)


def _memory(device: torch.device) -> int:
    """Bytes that a model on `device` may take: what a GPU has free, all that the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and Path("/proc/meminfo").is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 1 << 62
