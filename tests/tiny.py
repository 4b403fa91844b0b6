"""Tiny models built from configs: no download, a fraction of a second each."""

import torch
import transformers as tf

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = ["full_attention", "sliding_attention"]
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
NO_KV = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**COMMON),
    "mistral": lambda: tf.MistralConfig(**COMMON, sliding_window=5),
    "qwen2": lambda: tf.Qwen2Config(**COMMON),
    "qwen3": lambda: tf.Qwen3Config(**COMMON, head_dim=8),
    "gemma2": lambda: tf.Gemma2Config(**COMMON, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3_text": lambda: tf.Gemma3TextConfig(
        **COMMON, head_dim=8, sliding_window=6, query_pre_attn_scalar=8, layer_types=MIXED
    ),
    "phi3": lambda: tf.Phi3Config(**COMMON),
    "olmo2": lambda: tf.Olmo2Config(**COMMON),
    "gpt2": lambda: tf.GPT2Config(**GPT, vocab_size=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**NO_KV),
    "opt": lambda: tf.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16,
        max_position_embeddings=256, init_std=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0, dropout=0.0,
    ),
    "cohere2": lambda: tf.Cohere2Config(**COMMON, sliding_window=6, layer_types=MIXED, logit_scale=0.5),
    "mixtral": lambda: tf.MixtralConfig(**COMMON, num_local_experts=4, sliding_window=None),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "gpt_oss": lambda: tf.GptOssConfig(**COMMON, head_dim=8, num_local_experts=4, sliding_window=6, layer_types=MIXED),
}  # fmt: skip

OTHERS = {  # what their layers add to the ones above: multipliers, biased norms, partial and no rotary positions
    "granite": lambda: tf.GraniteConfig(**COMMON, residual_multiplier=0.5, logits_scaling=2.0),
    "starcoder2": lambda: tf.Starcoder2Config(**COMMON, sliding_window=None),
    "glm": lambda: tf.GlmConfig(**COMMON, head_dim=8),
    "smollm3": lambda: tf.SmolLM3Config(**COMMON, no_rope_layers=[1, 0]),
}

CHAINS = {  # no tree, for want of positions or of a mask that could be one
    "bloom": lambda: tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "mpt": lambda: tf.MptConfig(
        vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=256, initializer_range=0.3, use_cache=True
    ),
    "falcon": lambda: tf.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, initializer_range=0.3
    ),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, window_size=6,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=256, initializer_range=0.3,
    ),
}  # fmt: skip

LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
}  # fmt: skip
STATEFUL = {  # chains, for their states hold a text as a whole
    "lfm2": lambda: tf.Lfm2Config(**COMMON, layer_types=["full_attention", "conv"]),
    "mamba2": lambda: tf.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8, n_groups=2,
        chunk_size=16, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "falcon_h1": lambda: tf.FalconH1Config(
        **COMMON, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, head_dim=8,
        mamba_chunk_size=16,
    ),
    "qwen3_5_text": lambda: tf.Qwen3_5TextConfig(**COMMON, **LINEAR),
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **COMMON, **LINEAR, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}  # fmt: skip

UNSUPPORTED = {
    "mamba": lambda: tf.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3
    ),
}


def build(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random model in eval mode; the global generator is left where it was."""
    config = (CONFIGS | OTHERS | CHAINS | STATEFUL | UNSUPPORTED)[name]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
        for parameter in model.parameters():  # some families start biases and sinks at zero or garbage
            if not torch.isfinite(parameter).all() or (parameter.dim() == 1 and not parameter.any()):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def tokenizer():
    """One character a token, 64 of them, with a chat template."""
    from tokenizers import Tokenizer, decoders, models

    characters = "|<>abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,?!:-'"
    vocabulary = {c: i for i, c in enumerate(characters[:64])}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="?"))
    made.decoder = decoders.Fuse()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<", eos_token=">", pad_token="|", unk_token="?", chat_template=CHAT_TEMPLATE
    )
