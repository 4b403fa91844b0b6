"""The FSPAD draft network (arXiv 2408.15562).

Notation, as in the paper: h hidden size, V vocabulary, f_t the target's feature at position t (the tensor its LM head
reads), e_t the target's embedding of token t. From (f_t, e_{t+1}) the draft predicts token t+2 and feature f_{t+1}.
"""

import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import ModelOutput

from .configuration_fspad import FSPADConfig


@dataclass
class FSPADDraftOutput(ModelOutput):
    """
    Args:
        logit_features (`[batch, length, hidden]`): o_logit, what the target's LM head turns into draft logits.
        features (`[batch, length, hidden]`): o_feature, the regressed target feature, fed back at the next step.
    """

    logit_features: torch.Tensor | None = None
    features: torch.Tensor | None = None


class FSPADFeatureSampler(nn.Module):
    """
    Joins a feature with the embedding of the token sampled from it (paper, section 3.1):

        z = W_fc [e ; f] + b
        x = z + W_down(silu(W_gate e) * W_up RMSNorm(z))        the second line only with `feature_sampling`
    """

    def __init__(self, config: FSPADConfig):
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.fc = nn.Linear(2 * hidden, hidden, bias=config.fc_bias)
        self.feature_sampling = config.feature_sampling
        if config.feature_sampling:
            self.norm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
            self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
            self.up_proj = nn.Linear(hidden, intermediate, bias=False)
            self.down_proj = nn.Linear(intermediate, hidden, bias=False)
            self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, inputs_embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        z = self.fc(torch.cat((inputs_embeds, features), dim=-1))
        if not self.feature_sampling:
            return z
        return z + self.down_proj(self.act_fn(self.gate_proj(inputs_embeds)) * self.up_proj(self.norm(z)))


class FSPADDecoderLayer(nn.Module):
    """
    A Llama layer without an input norm whose MLP, with `partial_alignment`, ends in two halves (paper, section 3.2):

        a = x + Attention(x);  m1, m2 = MLP(RMSNorm(a));  o_logit = a + m1;  o_feature = a + m2
    """

    def __init__(self, config: FSPADConfig):
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx=0)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)
        self.partial_alignment = config.partial_alignment
        if config.partial_alignment:
            self.mlp.down_proj = nn.Linear(config.intermediate_size, 2 * config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor, **attention_kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        attended = hidden_states + self.self_attn(hidden_states=hidden_states, **attention_kwargs)[0]
        out = self.mlp(self.post_attention_layernorm(attended))
        if self.partial_alignment:
            logit_half, feature_half = out.chunk(2, dim=-1)
            return attended + logit_half, attended + feature_half
        return attended + out, attended + out


class FSPADDraftModel(PreTrainedModel):
    """
    A draft for one target model: pass it to `generate` as `assistant_model`.

    It holds its own weights only. Embedding, LM head and vocabulary are the target's, and everything that belongs to
    one `generate` call lives in an object of that call, so threads can share one draft.
    """

    config_class = FSPADConfig
    base_model_prefix = ""
    main_input_name = "inputs_embeds"
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["FSPADDecoderLayer"]

    def __init__(self, config: FSPADConfig):
        super().__init__(config)
        self.feature_sampler = FSPADFeatureSampler(config)
        self.layer = FSPADDecoderLayer(config)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        drafted = None if config.draft_vocab_size is None else torch.arange(config.draft_vocab_size)
        self.register_buffer("draft_vocab_ids", drafted)  # [draft_vocab_size]: the target's ids that are drafted
        self.post_init()

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        position_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> FSPADDraftOutput:
        """
        One draft step: (f_t, e_{t+1}) in, what predicts token t+2 and f_{t+1} out.

        Args:
            inputs_embeds (`[batch, length, hidden]`): e_{t+1}, the target's embeddings of the tokens drawn.
            features (`[batch, length, hidden]`): f_t, the target's features, or the draft's own further down a tree.
            position_ids (`[batch, length]`): t, counted from 0; defaults to 0 ... length - 1.
            attention_mask (`[batch, 1, length, keys]`): float (additive) or bool (True = visible); `None` is causal,
                and only right without a cache.
            past_key_values: a `Cache` with one layer.
        """
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        hidden_states = self.feature_sampler(inputs_embeds, features)
        logit_features, features = self.layer(
            hidden_states,
            position_embeddings=self.rotary_emb(hidden_states, position_ids),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        return FSPADDraftOutput(logit_features=logit_features, features=features)

    def can_generate(self) -> bool:
        return False  # it drafts; only its target generates

    @classmethod
    def from_target(cls, target: PreTrainedModel, **overrides) -> "FSPADDraftModel":
        """
        A fresh, untrained draft of the right shape for `target`, on its device and in its dtype.

        Args:
            target: a decoder-only `PreTrainedModel` with an LM head.
            overrides: any field of [`FSPADConfig`].

        Raises:
            ValueError: the target has no LM head, or embeds tokens in another width than its head reads.
        """
        draft = cls(config_for_target(target, **overrides)).to(target.dtype).eval()
        return draft if target.device.type == "meta" else draft.to(target.device)  # an offloaded target's is meta

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`, safetensors only. A weight that the file lacks is an error.

        Raises:
            OSError: the weights are missing or damaged.
            ValueError: the file lacks a weight that the configuration asks for.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        try:
            draft, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"The draft weights in {str(pretrained_model_name_or_path)!r} are damaged ({error}): expected a whole "
                "model.safetensors; download or save the draft again."
            ) from error
        if info["missing_keys"]:
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} lacks the draft weights {sorted(info['missing_keys'])}, "
                "which its config.json asks for: the file is incomplete or belongs to another configuration; save the "
                "draft again, or convert the checkpoint it came from."
            )
        return (draft, info) if with_info else draft

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        tokenizer=None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs,
    ):
        """
        Writes config.json, model.safetensors (the draft's own weights) and the target's tokenizer files.

        Files are written to a temporary folder and renamed, so an interrupted save leaves the old ones standing.

        Args:
            save_directory: the folder; made if need be.
            tokenizer: the target's tokenizer; by default read from `config.target_name_or_path`. Without one the
                draft is saved all the same, with a warning: a pipeline cannot load it from a string.
        """
        save_directory = Path(save_directory)
        if save_directory.is_file():
            raise ValueError(
                f"save_directory={str(save_directory)!r} is a file: expected a folder to save the draft in."
            )
        save_directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory.parent, prefix=f".{save_directory.name}.") as partial:
            super().save_pretrained(partial, **kwargs)
            tokenizer = tokenizer if tokenizer is not None else _find_tokenizer(self.config.target_name_or_path)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            for path in sorted(Path(partial).rglob("*")):
                if path.is_file():
                    final = save_directory / path.relative_to(partial)
                    final.parent.mkdir(parents=True, exist_ok=True)
                    shutil.move(path, final)
        if push_to_hub:
            self.push_to_hub(repo_id or save_directory.name)


def config_for_target(target: PreTrainedModel, **overrides) -> FSPADConfig:
    """The [`FSPADConfig`] of a draft for `target`; `overrides` replace any field."""
    text = target.config.get_text_config()
    head, embedding = target.get_output_embeddings(), target.get_input_embeddings()
    if head is None:
        raise ValueError(f"{type(target).__name__} has no LM head: expected a causal language model as the target.")
    hidden, embedded = overrides.get("hidden_size") or layer_width(head), layer_width(embedding)
    if hidden is None:
        raise ValueError(f"The width of {type(head).__name__} is unknown: pass hidden_size=... to from_target.")
    if embedded is not None and "hidden_size" not in overrides and hidden != embedded:
        raise ValueError(
            f"{type(target).__name__} embeds tokens in {embedded} dimensions but its LM head reads {hidden}: expected "
            "one width for both; such targets are not supported."
        )
    heads = getattr(text, "num_attention_heads", None) or max(hidden // 64, 1)
    while hidden % (2 * heads) and heads > 1:  # head_dim = h / heads, and rotary needs it even
        heads -= 1
    fields = {
        "vocab_size": text.vocab_size,
        "hidden_size": hidden,
        "intermediate_size": _first(text, "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden),
        "num_attention_heads": heads,
        "rms_norm_eps": _first(text, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", default=1e-6),
        "max_position_embeddings": _first(text, "max_position_embeddings", "n_positions", default=2048),
        "rope_parameters": {"rope_type": "default", "rope_theta": _full_attention_theta(text)},
        "target_name_or_path": target.name_or_path or None,
        "target_model_type": text.model_type,
        **{name: getattr(text, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }
    unknown = sorted(name for name in overrides if not hasattr(FSPADConfig, name))
    if unknown:
        raise ValueError(
            f"{unknown} are not fields of FSPADConfig: expected any of {sorted(FSPADConfig.__annotations__)}."
        )
    return FSPADConfig(**{**fields, **overrides})


def layer_width(module: nn.Module | None) -> int | None:
    """The width of what an LM head reads or an embedding gives; `None` where a packed module does not tell."""
    for name in ("in_features", "embedding_dim"):
        if isinstance(width := getattr(module, name, None), int):
            return width
    weight = getattr(module, "weight", None)
    readable = isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.dtype.is_floating_point
    return weight.shape[-1] if readable else None


def _first(config, *names: str, default):
    value = next((value for name in names if (value := getattr(config, name, None)) is not None), default)
    return value[0] if isinstance(value, (list, tuple)) else value


def _full_attention_theta(text_config) -> float:
    """The rotary base of the target's full-attention layers; scaling (yarn, longrope, ...) is not inherited."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope) or {}
    return float(rope.get("rope_theta") or 10_000.0)


def _find_tokenizer(target_name_or_path: str | None):
    try:
        if target_name_or_path:
            return AutoTokenizer.from_pretrained(target_name_or_path)
    except Exception:  # whatever stands in the way, the draft itself can be saved
        pass
    warnings.warn(
        f"No tokenizer found at the target {target_name_or_path!r}: the draft is saved without one, and "
        "pipeline(assistant_model='path') will not load it. Pass `tokenizer=` to save_pretrained.",
        stacklevel=3,
    )
    return None


AutoModelForCausalLM.register(FSPADConfig, FSPADDraftModel, exist_ok=True)

__all__ = ["FSPADDraftModel", "FSPADDraftOutput", "config_for_target"]
