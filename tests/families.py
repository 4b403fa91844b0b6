"""Every decoder-only family of the installed transformers, from its own config made tiny."""

import dataclasses

import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

PARTS = {"text_config", "vision_config", "audio_config", "audio_encoder_config", "audio_encoder"}

SMALL = {  # a value, and the fields that get it wherever a config has them and does not leave them None
    0: "pad_token_id",
    1: "bos_token_id first_k_dense_replace num_shared_experts n_shared_experts topk_group num_dense_layers",
    2: "eos_token_id num_hidden_layers n_layer n_layers num_layers decoder_layers num_key_value_heads num_kv_heads"
    " swa_num_key_value_heads linear_num_key_heads num_experts_per_tok num_experts_per_token moe_k"
    " moe_topk n_group n_groups num_expert_group zero_expert_num o_groups index_topk_blocks n_layers_per_attn_res_block",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads swa_num_attention_heads"
    " linear_num_heads linear_num_value_heads n_mamba_heads num_experts n_routed_experts num_local_experts"
    " moe_num_experts qk_rope_head_dim rotary_dim index_topk index_block_size chunk_size mamba_chunk_size block_size"
    " time_step_rank mamba_dt_rank laurel_rank gated_norm_rank loop_gate_rank adapter_rank log_scaling_n_floor"
    " floor_scale position_bias_num_buckets hidden_size_per_layer_input hc_lowrank",
    6: "sliding_window sliding_window_size window_size attention_window_size local_attention keep_window_size",
    8: "head_dim d_head dim_head kv_channels query_pre_attn_scalar q_lora_rank kv_lora_rank o_lora_rank"
    " qk_nope_head_dim v_head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim"
    " mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim mamba_n_heads mamba_num_heads"
    " index_head_dim index_n_heads attention_chunk_size d_rel",
    12: "qk_head_dim",
    16: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size"
    " shared_experts_intermediate_size moe_shared_expert_intermediate_size router_hidden_size word_embed_proj_dim"
    " rel_extent",
    32: "hidden_size d_model n_embd emb_dim embedding_dim attention_hidden_size lru_width dim_model_base"
    " original_max_position_embeddings",
    48: "intermediate_size ffn_dim dff dim_ff d_inner decoder_ffn_dim ffn_hidden_size intermediate_size_mlp"
    " dense_intermediate_size",
    64: "vocab_size vocab_size_per_layer_input unpadded_vocab_size mamba_d_ssm",
    256: "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length",
    0.3: "initializer_range init_std",
}  # fmt: skip
SMALL = {field: value for value, fields in SMALL.items() for field in fields.split()}
SMALL |= {"is_decoder": True, "tie_word_embeddings": False}  # a small model with a tied head repeats what it reads
LATENT = {"num_key_value_heads": 4, "head_dim": 4}  # a head each, and `head_dim` is what turns of it

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
SHARING = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2}
BYTES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48}

OWN = {  # what these need besides, or have only where it is asked for
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "patcher_config": BYTES, "encoder_config": {**BYTES, "hidden_size_global": 32}, "global_config": BYTES,
        "decoder_config": {**BYTES, "hidden_size_global": 32}, "encoder_hash_byte_group_vocab": 64,
    },
    "cohere_compass_text": {
        "layer_types": [FULL, SLIDING],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]} for kind in (FULL, SLIDING)
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "num_hidden_layers": 3, "mlp_layer_types": ["hash_moe", "moe", "moe"], "partial_rotary_factor": 0.5,
        "layer_types": [SLIDING, "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dory": {
        "num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING], "n_input_layers": 1, "n_output_layers": 1,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "head_dim": 12, "swa_head_dim": 12, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "gemma3n_text": {**SHARING, "intermediate_size": 48, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    "gemma4_text": {**SHARING, "global_head_dim": 16},
    "gemma4_unified_text": {**SHARING, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling2_loop_text": {
        "num_hidden_layers": 3, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": [FULL, SLIDING], "num_attention_heads_per_layer": [4, 2]},
    "lfm2": {"layer_types": ["conv", FULL]},
    "lfm2_moe": {"layer_types": ["conv", FULL]},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "mamba2": {"head_dim": 16},
    "mellum": {"layer_types": [FULL, SLIDING]},
    "minimax_m3_vl_text": {"index_n_heads": 2, "layer_types": [FULL, "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"]},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "ple_layer_ids": [1], "ple_embed_dim": 32, "ngram_vocab_size_base": 64, "heads_per_ngram": 2,
        "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 1, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "w_init_variance_scale": 2.0},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": [LINEAR, "hybrid"] * 2, "attention_hidden_size": 64,
              "attention_head_dim": 16, "num_key_value_heads": 4},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": [LINEAR, "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 6},
}  # fmt: skip


class NotBuilt(Exception):
    """A family that cannot be had small here, and why."""


def left_out(model_type: str) -> str | None:
    """Why a family with a causal head is not asked, where it is not."""
    config = tf.CONFIG_MAPPING[model_type]
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "an encoder"
    if PARTS & set(config.sub_configs):
        return "of several models, its text model a family of its own"
    if config.is_encoder_decoder:
        return "a decoder that wants an encoder"
    return None


def families() -> list[str]:
    return [model_type for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if left_out(model_type) is None]


def tiny_config(model_type: str):
    """The family's own config, all sizes small, with one layer of each kind that it has, and two at least."""
    family = tf.CONFIG_MAPPING[model_type]
    default = family()
    names = [field.name for field in dataclasses.fields(family)]
    fields = {name: vars(default).get(family.attribute_map.get(name, name)) for name in names}
    small = {name: SMALL[name] for name in fields if name in SMALL and fields[name] is not None}
    for name, value in fields.items():
        if name.endswith("_token_id"):
            small[name] = SMALL.get(name, 3)
        elif "drop" in name and type(value) is float:
            small[name] = 0.0
    if "kv_lora_rank" in fields:
        small |= {name: value for name, value in LATENT.items() if name in fields}
    return family(**small | few_layers(fields) | OWN.get(model_type, {}))


def few_layers(fields: dict) -> dict:
    """How many layers it takes to have each kind once, in the family's order, and the lists with an item a layer."""
    count = fields.get("num_hidden_layers")
    each = {name: list(value) for name, value in fields.items() if isinstance(value, list) and len(value) == count}
    each = {name: value for name, value in each.items() if len(set(value)) < count}
    if not each:
        return {}
    layers = sorted({value.index(kind) for value in each.values() for kind in value})
    layers = layers if len(layers) > 1 else [0, 1]
    return {"num_hidden_layers": len(layers)} | {
        name: [SMALL.get(name, value[layer]) for layer in layers] for name, value in each.items()
    }


def build(model_type: str, attention: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random model of the family in eval mode; the global generator is left where it was."""
    try:
        config = tiny_config(model_type)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
            for parameter in model.parameters():  # what some families start at zero, next to it, or at garbage
                if not torch.isfinite(parameter).all() or parameter.abs().max() < 0.01:
                    torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else 0.3)
    except Exception as error:
        raise NotBuilt(f"{model_type}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    return model.eval()
