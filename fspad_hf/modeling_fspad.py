"""The FSPAD draft network (arXiv 2408.15562).

Notation, as in the paper: h hidden size, V vocabulary, f_t the target's feature at position t (the tensor its LM head
reads), e_t the target's embedding of token t. From (f_t, e_{t+1}) the draft predicts token t+2 and feature f_{t+1}.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import ModelOutput

from .configuration_fspad import FSPADConfig
from .host import CACHE
from .pretrained import FSPADPreTrainedModel
from .speculation_config import FIELDS, SpeculationConfig, of_old_config


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
        return self.halves(hidden_states + self.self_attn(hidden_states=hidden_states, **attention_kwargs)[0])

    def halves(self, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """o_logit and o_feature of `a`, each of its shape, `[..., hidden]`; equal without `partial_alignment`."""
        out = self.mlp(self.post_attention_layernorm(attended))
        if self.partial_alignment:
            logit_half, feature_half = out.chunk(2, dim=-1)
            return attended + logit_half, attended + feature_half
        return attended + out, attended + out


class FSPADDraftModel(FSPADPreTrainedModel):
    """
    A draft for one target model: pass it to `generate` as `assistant_model`.

    It holds its own weights only. Embedding, LM head and vocabulary are the target's, and everything that belongs to
    one `generate` call lives in an object of that call, so threads can share one draft.

    Attributes:
        speculation_config ([`SpeculationConfig`]): the settings of speculation, all chosen at the call unless set.
    """

    def __init__(self, config: FSPADConfig):
        super().__init__(config)
        self.speculation_config = of_old_config(config.old_speculation)
        self.feature_sampler = FSPADFeatureSampler(config)
        self.layer = FSPADDecoderLayer(config)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        drafted = None if config.draft_vocab_size is None else torch.arange(config.draft_vocab_size)
        self.register_buffer("draft_vocab_ids", drafted)  # [draft_vocab_size]: the target's ids that are drafted
        self.post_init()

    def speculation_settings(self, device: torch.device | str | None = None, batch: int = 1) -> SpeculationConfig:
        """`speculation_config` with every field chosen, see [`SpeculationConfig.resolved`]."""
        vocabulary = self.config.draft_vocab_size or self.config.vocab_size
        return self.speculation_config.resolved(device, vocabulary, batch)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        position_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
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
            cache: a `Cache` with one layer.
        """
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        hidden_states = self.feature_sampler(inputs_embeds, features)
        logit_features, features = self.layer(
            hidden_states,
            position_embeddings=self.rotary_emb(hidden_states, position_ids),
            attention_mask=attention_mask,
            **{CACHE: cache},
        )
        return FSPADDraftOutput(logit_features=logit_features, features=features)

    @classmethod
    def from_target(cls, target: PreTrainedModel, **overrides) -> "FSPADDraftModel":
        """
        A fresh, untrained draft of the right shape for `target`, on its device and in its dtype.

        Args:
            target: a decoder-only `PreTrainedModel` with an LM head.
            overrides: any field of [`FSPADConfig`] or [`SpeculationConfig`].

        Raises:
            ValueError: the target has no LM head, or embeds tokens in another width than its head reads.
        """
        settings = {name: overrides.pop(name) for name in FIELDS if name in overrides}
        draft = cls(config_for_target(target, **overrides)).to(target.dtype).eval()
        draft.speculation_config.update(**settings)
        return draft if target.device.type == "meta" else draft.to(target.device)  # an offloaded target's is meta


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
    if hasattr(module, "get_base_layer"):  # an adapter around it, whose own in_features is a vocabulary
        module = module.get_base_layer()
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


AutoModelForCausalLM.register(FSPADConfig, FSPADDraftModel, exist_ok=True)

__all__ = ["FSPADDraftModel", "FSPADDraftOutput", "config_for_target"]
