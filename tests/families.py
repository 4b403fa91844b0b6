"""Every decoder-only family that transformers has, from its own config made tiny."""

import functools

import torch
import transformers as tf
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

SEES_OR_HEARS = {"text_config", "vision_config", "audio_config", "audio_encoder_config"}

SMALL = {  # the value: the attributes that get it, where a config has them and they are not None
    64: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    256: "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length",
    32: "hidden_size d_model n_embd emb_dim embedding_dim attention_hidden_size lru_width dim_model_base"
    " original_max_position_embeddings",
    48: "intermediate_size ffn_dim dff dim_ff d_inner decoder_ffn_dim ffn_hidden_size intermediate_size_mlp"
    " dense_intermediate_size",
    16: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size"
    " shared_experts_intermediate_size moe_shared_expert_intermediate_size router_hidden_size word_embed_proj_dim"
    " attention_head_dim mamba_headdim rel_extent qk_head_dim",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads swa_num_attention_heads"
    " num_experts n_routed_experts num_local_experts moe_num_experts qk_rope_head_dim rotary_dim index_topk chunk_size"
    " mamba_chunk_size time_step_rank mamba_dt_rank log_scaling_n_floor floor_scale linear_num_value_heads"
    " laurel_rank gated_norm_rank loop_gate_rank adapter_rank position_bias_num_buckets hidden_size_per_layer_input",
    8: "head_dim d_head dim_head kv_channels query_pre_attn_scalar q_lora_rank kv_lora_rank o_lora_rank"
    " qk_nope_head_dim v_head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim"
    " mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim index_head_dim block_size"
    " attention_chunk_size mamba_n_heads mamba_num_heads n_mamba_heads linear_num_heads",
    6: "sliding_window sliding_window_size window_size attention_window_size local_attention keep_window_size",
    2: "num_key_value_heads num_kv_heads num_query_groups swa_num_key_value_heads num_hidden_layers n_layer n_layers"
    " num_layers num_blocks decoder_layers num_experts_per_tok num_experts_per_token moe_k moe_topk topk_group n_group"
    " num_expert_group linear_num_key_heads index_n_heads eos_token_id zero_expert_num",
    1: "bos_token_id first_k_dense_replace num_shared_experts n_shared_experts",
    0.3: "initializer_range init_std",
    0: "pad_token_id",
}  # fmt: skip
SMALL = {name: value for value, names in SMALL.items() for name in names.split()} | {"is_decoder": True}

OWN = {}


def no_decoder(model_type: str) -> str | None:
    """Why a family is left out, if it is."""
    config = tf.CONFIG_MAPPING[model_type]
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "an encoder"
    if config.is_encoder_decoder:
        return "an encoder and a decoder"
    if SEES_OR_HEARS & set(config.sub_configs):
        return "its text model is a family of its own"
    return None


def families() -> list[str]:
    return [model_type for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if no_decoder(model_type) is None]


def tiny_config(model_type: str):
    """The family's own config with few layers, of all kinds that it has, and with small sizes."""
    made = tf.CONFIG_MAPPING[model_type]
    default = made().to_dict()
    small = {name: SMALL[name] for name, value in default.items() if name in SMALL and value is not None}
    for name, value in default.items():
        if name.endswith("_token_id"):
            small[name] = SMALL.get(name, 3)
        elif ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
            small[name] = 0.0
    return made(**small | few_layers(default) | OWN.get(model_type, {}))


def few_layers(default: dict) -> dict:
    """The first layer of each kind; two layers where all are alike."""
    counts = [name for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in default]
    if not counts:
        return {}
    count = default[counts[0]]
    each = {k: v for k, v in default.items() if isinstance(v, list) and len(v) == count}
    layers = sorted({v.index(kind) for v in each.values() for kind in v if len(set(v)) < len(v)} or {0})
    if len(layers) == 1:
        layers.append(layers[0] + 1)
    return {counts[0]: len(layers)} | {k: [v[layer] for layer in layers] for k, v in each.items()}
