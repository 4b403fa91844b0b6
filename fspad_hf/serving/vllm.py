"""The draft in vLLM's parallel layers, read from the folder that `save_pretrained` wrote.

vLLM drafts chains, of all the ids that the target knows, with the target's own embedding and LM head. Tensors are
`[tokens, ...]`; notation as in modeling_fspad.py.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

try:
    from vllm.compilation.decorators import support_torch_compile
    from vllm.config import VllmConfig
    from vllm.distributed import get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        ReplicatedLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.models.llama import LlamaAttention
    from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
except ImportError as error:
    raise ImportError(
        f"This vLLM has not what an FSPAD draft is built of ({error}): expected vLLM 0.32 or newer; upgrade it with "
        "pip install -U vllm, or use the draft in transformers' generate."
    ) from error

from ..configuration_fspad import FSPADConfig, check_fits
from ..host import embedding_scale
from ..modeling_fspad import FSPADDecoderLayer, FSPADFeatureSampler


class FeatureSampler(nn.Module):
    """[`fspad_hf.modeling_fspad.FSPADFeatureSampler`], its width I split over the GPUs."""

    def __init__(self, config: FSPADConfig, prefix: str):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.fc = ReplicatedLinear(2 * hidden, hidden, bias=config.fc_bias, return_bias=False, prefix=f"{prefix}.fc")
        self.feature_sampling = config.feature_sampling
        if config.feature_sampling:
            options = {"bias": False, "return_bias": False}
            self.norm = RMSNorm(hidden, eps=config.rms_norm_eps)
            self.gate_proj = ColumnParallelLinear(hidden, inner, prefix=f"{prefix}.gate_proj", **options)
            self.up_proj = ColumnParallelLinear(hidden, inner, prefix=f"{prefix}.up_proj", **options)
            self.down_proj = RowParallelLinear(inner, hidden, prefix=f"{prefix}.down_proj", **options)
            self.act_fn = ACT2FN[config.hidden_act]

    forward = FSPADFeatureSampler.forward


class MLP(nn.Module):
    """A Llama MLP that, with `partial_alignment`, ends in two halves."""

    def __init__(self, config: FSPADConfig, prefix: str):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        ends = (2 if config.partial_alignment else 1) * hidden
        options = {"bias": config.mlp_bias, "return_bias": False}
        self.gate_up_proj = MergedColumnParallelLinear(hidden, 2 * [inner], prefix=f"{prefix}.gate_up_proj", **options)
        self.down_proj = RowParallelLinear(inner, ends, prefix=f"{prefix}.down_proj", **options)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class Attention(LlamaAttention):
    """vLLM's, turned by transformers' angles: those of every `rope_type`, as the draft was trained with them."""

    def _init_rotary_emb(self, config: FSPADConfig, quant_config: None):
        positions = config.max_position_embeddings
        self.rotary_emb = RotaryEmbedding(
            self.head_dim, self.head_dim, positions, 1.0, is_neox_style=True, dtype=torch.get_default_dtype()
        )
        self.rotary_emb.cos_sin_cache.copy_(rotary_angles(config, positions))


def rotary_angles(config: FSPADConfig, positions: int) -> torch.Tensor:
    """
    `[positions, head_dim]`, as vLLM's kernels read them: the cosines of half a head, then its sines.

    Where the angles depend on how long a text is, each position has those of a text that ends with it.
    """
    rotary, rope = LlamaRotaryEmbedding(config), config.rope_parameters
    at, x = torch.arange(positions)[None], torch.empty(0)
    constant = positions
    if "dynamic" in rope["rope_type"] or rope["rope_type"] == "longrope":
        constant = min(rope.get("original_max_position_embeddings") or rotary.original_max_seq_len, positions)
    parts = [rotary(x, at[:, :constant]), *(rotary(x, at[:, i : i + 1]) for i in range(constant, positions))]
    cos, sin = (torch.cat(some, dim=1)[0].chunk(2, dim=-1)[0] for some in zip(*parts, strict=True))
    return torch.cat((cos, sin), dim=-1)


class DecoderLayer(nn.Module):
    """[`fspad_hf.modeling_fspad.FSPADDecoderLayer`]."""

    def __init__(self, config: FSPADConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.self_attn = Attention(
            config, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings, bias=config.attention_bias,
            bias_o_proj=config.attention_bias, cache_config=vllm_config.cache_config, prefix=f"{prefix}.self_attn",
        )  # fmt: skip
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config, prefix=f"{prefix}.mlp")
        self.partial_alignment = config.partial_alignment

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.halves(hidden_states + self.self_attn(positions, hidden_states))

    halves = FSPADDecoderLayer.halves


@support_torch_compile
class FSPADModel(nn.Module):
    """All but the LM head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        target, config = vllm_config.model_config, draft_config(vllm_config)
        first = target.get_num_layers(vllm_config.parallel_config)  # the target's layers are numbered before ours
        self.embed_tokens = VocabParallelEmbedding(  # vLLM puts the target's here
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        self.embedding_scale = embedding_scale(target.hf_text_config)
        self.feature_sampler = FeatureSampler(config, maybe_prefix(prefix, "feature_sampler"))
        self.layer = DecoderLayer(config, vllm_config, maybe_prefix(prefix, f"layers.{first}"))

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs_embeds = self.embed_tokens(input_ids)
        if self.embedding_scale != 1:
            inputs_embeds *= torch.tensor(self.embedding_scale, dtype=inputs_embeds.dtype)  # rounded as the target's
        return self.layer(positions, self.feature_sampler(inputs_embeds, hidden_states))


class EagleFSPADDraftModel(nn.Module):
    """
    The draft as vLLM's method "eagle" calls it.

    Raises:
        ValueError: a draft of another target, or a tensor-parallel size that does not divide the draft's widths.
    """

    has_own_lm_head = False
    has_own_embed_tokens = False
    mapper = WeightsMapper(
        orig_to_new_stacked={
            ".self_attn.q_proj": (".self_attn.qkv_proj", "q"),
            ".self_attn.k_proj": (".self_attn.qkv_proj", "k"),
            ".self_attn.v_proj": (".self_attn.qkv_proj", "v"),
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        target, config = vllm_config.model_config, draft_config(vllm_config)
        check_fits(config, target.hf_text_config, target.get_hidden_size(), target.model)
        if embedding_scale(target.hf_text_config) is None:
            raise ValueError(
                f"{target.model!r} does more to its token embeddings than vLLM shows a draft: expected a target that "
                "only scales them; use the draft in transformers' generate."
            )
        check_divides(config, get_tensor_model_parallel_world_size())
        self.config = config
        self.model = FSPADModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """
        One draft step.

        Args:
            input_ids (`[tokens]`): token t+1.
            positions (`[tokens]`): t.
            hidden_states (`[tokens, hidden]`): f_t, the target's or the draft's own.

        Returns:
            o_logit, which [`compute_logits`] reads, and o_feature, the next step's `hidden_states`.
        """
        if inputs_embeds is not None:
            raise ValueError("An FSPAD draft reads token ids in vLLM, not inputs_embeds: send prompts as text or ids.")
        return self.model(input_ids, positions, hidden_states)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        # vLLM has put the target's head here, if it has one beside its embedding.
        return self.logits_processor(getattr(self, "lm_head", self.model.embed_tokens), hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Reads a draft's safetensors; `draft_vocab_ids` is left out, as every id is drafted here."""
        ours = ((name, weight) for name, weight in weights if name != "draft_vocab_ids")
        loaded = AutoWeightsLoader(self.model).load_weights(ours, mapper=self.mapper)
        return {f"model.{name}" for name in loaded}


def draft_config(vllm_config: VllmConfig) -> FSPADConfig:
    return vllm_config.speculative_config.draft_model_config.hf_config.model  # within vLLM's EAGLEConfig


def check_divides(config: FSPADConfig, size: int):
    """
    Raises if the draft cannot be split over `size` GPUs.

    Raises:
        ValueError: a number of heads or a width that `size` does not divide.
    """
    keys = config.num_key_value_heads
    for name, fits in {
        "num_attention_heads": config.num_attention_heads % size == 0,
        "num_key_value_heads": keys % size == 0 or size % keys == 0,  # fewer than GPUs: each has a copy of one
        "intermediate_size": config.intermediate_size % size == 0,
    }.items():
        if not fits:
            raise ValueError(
                f"tensor_parallel_size={size} does not divide the FSPAD draft's {name}={getattr(config, name)}: "
                "expected a divisor of both models' heads and widths; choose another size."
            )
