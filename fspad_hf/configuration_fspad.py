"""FSPAD draft configuration."""

import json
import os
import re

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .speculation_config import FIELDS

GONE = ("prepack_linears", "coupling_sharpness", "coupling_kappa")  # fields of older versions


@strict
class FSPADConfig(PreTrainedConfig):
    r"""
    Configuration of a [`FSPADDraftModel`]: a one-layer, feature-level draft for one target (arXiv 2408.15562).

    The draft owns no embedding and no LM head; it reads the target's, so `vocab_size` and `hidden_size` are the
    target's: the vocabulary, and the width of the LM head's *input* (which is not `hidden_size` on OPT-350m).

    Args:
        vocab_size: the target's vocabulary size.
        hidden_size: width h of the features, the token embeddings and the LM head's input.
        intermediate_size: width I of the feature sampler and of the layer's MLP.
        num_hidden_layers: 1; other engines ask for it.
        num_attention_heads, num_key_value_heads, head_dim: attention shape; key-value heads default to
            `num_attention_heads`, `head_dim` to `hidden_size / num_attention_heads`.
        feature_sampling: the embedding-gated MLP on top of the fully connected join (paper, section 3.1).
        partial_alignment: two output halves, one for the logits and one for the feature (paper, section 3.2).
            With both off the network *is* the EAGLE / EAGLE-2 draft, parameter for parameter.
        fc_bias: bias on the fully connected join (some public EAGLE checkpoints have none).
        draft_vocab_size: draft only that many of the target's ids (stored with the weights, the most frequent ones of
            the training text), which makes the draft's LM head cheaper and changes no token; `None` is all.
        target_name_or_path: where the target came from (Hub id or path).
        target_model_type: the target's `model_type`.
        weights_sha256: the sha256 of the weights saved with this configuration; `save_pretrained` sets it, and
            `from_pretrained` refuses other weights. `None` checks nothing.
    """

    model_type = "fspad"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float | None = 0.0
    mlp_bias: bool = False
    feature_sampling: bool = True
    partial_alignment: bool = True
    fc_bias: bool = True
    draft_vocab_size: int | None = None
    target_name_or_path: str | None = None
    target_model_type: str | None = None
    weights_sha256: str | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        # Once these fields were here; what a draft was saved with then still holds.
        self.old_speculation = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        for name in GONE:
            kwargs.pop(name, None)
        if kwargs.get("quantization_config"):
            raise ValueError(
                f"quantization_config={kwargs['quantization_config']!r} in a draft's config: expected none, for a "
                "draft's weights are not quantised (its target's may be); save the draft in a floating-point dtype."
            )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of the `@strict` validation: the shape must make a network."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_hidden_layers != 1:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers}: expected 1, as a draft has one layer.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is unknown: expected a name in transformers' ACT2FN, such as 'silu'."
            )
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind not in (known := ["default", *ROPE_INIT_FUNCTIONS]):
            raise ValueError(f"rope_type={kind!r} in rope_parameters is unknown: expected one of {known}.")
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size={self.draft_vocab_size} must be from 1 to vocab_size={self.vocab_size}, or None."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even (rotary position embeddings turn pairs); choose "
                f"num_attention_heads so that hidden_size={self.hidden_size} / num_attention_heads is even, "
                "or set head_dim."
            )

    def validate_weights_sha256(self):
        """Part of the `@strict` validation."""
        if self.weights_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.weights_sha256):
            raise ValueError(
                f"weights_sha256={self.weights_sha256!r} is no sha256: expected 64 lower-case hexadecimal digits, or "
                "null to check nothing; save_pretrained writes the right one."
            )

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        fields = super()._dict_from_json_file(json_file)
        if not isinstance(fields, dict):
            raise ValueError(
                f"{str(json_file)!r} holds {json.dumps(fields)[:40]}: expected a JSON object of a draft's settings; "
                "save the draft again."
            )
        return fields

    def to_dict(self) -> dict:
        return {name: value for name, value in super().to_dict().items() if name != "old_speculation"}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "FSPADConfig":
        """As `PreTrainedConfig.from_pretrained`, but `ValueError` if it is no draft's or none that makes a network."""
        # Not super(): in transformers 5.17 that forgets the `token` before it comes to get_config_dict.
        fields, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        kind = fields.get("model_type")
        if kind != cls.model_type:
            is_what = f"is a {kind!r} model" if kind else "has no config.json that names a model_type"
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} {is_what}: expected an FSPAD draft ('fspad'); pass the "
                "folder or Hub id that FSPADDraftModel.save_pretrained wrote."
            )
        try:
            return cls.from_dict(fields, **kwargs)
        except (StrictDataclassError, KeyError) as error:  # the latter for a rope_type that lacks a parameter
            raise ValueError(
                f"The config.json of {str(pretrained_model_name_or_path)!r} describes no draft: "
                f"{error.__cause__ or error.args[0]}"
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        # A pipeline looks a string draft's class up as `getattr(transformers, architecture)`, so the list must
        # name a class that transformers itself has; the registration then leads it to ours.
        self.architectures = ["FSPADDraftModel", "AutoModelForCausalLM"]
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def check_fits(config: FSPADConfig, target: PreTrainedConfig, width: int | None, name: str):
    """
    Raises if a draft cannot belong to a target.

    Args:
        target: the target's text configuration.
        width: of what its LM head reads; `None` where that is unknown.
        name: what the error calls the target.

    Raises:
        ValueError: a draft of another width or vocabulary, or with other special tokens.
    """
    made_for = f"The draft (made for {config.target_name_or_path!r}) does not fit {name}"
    remedy = "pass a draft trained for this target, or make one with FSPADDraftModel.from_target(target)."
    if width is not None and width != config.hidden_size:
        raise ValueError(
            f"{made_for}: its hidden_size is {config.hidden_size}, the target's LM head reads {width}; {remedy}"
        )
    if target.vocab_size != config.vocab_size:
        raise ValueError(
            f"{made_for}: its vocab_size is {config.vocab_size}, the target's {target.vocab_size}; {remedy}"
        )
    for token in ("bos_token_id", "eos_token_id"):
        ours, theirs = _ids(getattr(config, token, None)), _ids(getattr(target, token, None))
        if ours and theirs and ours != theirs:
            raise ValueError(f"{made_for}: its {token} is {sorted(ours)}, the target's {sorted(theirs)}; {remedy}")


def _ids(token_id: int | list[int] | None) -> set[int]:
    return set() if token_id is None else {token_id} if isinstance(token_id, int) else set(token_id)


AutoConfig.register("fspad", FSPADConfig, exist_ok=True)

__all__ = ["FSPADConfig", "check_fits"]
