"""
Every decoder-only family of the installed transformers, from its own config made tiny: what does it verify?

    python -m tests.families                             # prints docs/support.md's table
    python -m tests.families --write docs/support.md     # puts it there
    python -m tests.families llama mamba2                # asks only these
"""

import argparse
import dataclasses
import re
import textwrap
import warnings
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fspad_hf.generation.hook import logger
from fspad_hf.generation.probe import probe

from .conftest import Oracle, fresh_draft, oracles_growth, rng_state

PARTS = {"text_config", "vision_config", "audio_config", "audio_encoder_config", "audio_encoder"}

SMALL = {  # a value, and the fields that get it wherever a config has them and does not leave them None
    0: "pad_token_id",
    1: "bos_token_id first_k_dense_replace num_shared_experts n_shared_experts topk_group num_dense_layers",
    2: "eos_token_id num_hidden_layers n_layer n_layers num_layers decoder_layers num_key_value_heads num_kv_heads"
    " swa_num_key_value_heads linear_num_key_heads num_experts_per_tok num_experts_per_token moe_k moe_topk"
    " n_group n_groups num_expert_group zero_expert_num o_groups index_topk_blocks n_layers_per_attn_res_block",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads swa_num_attention_heads"
    " linear_num_heads linear_num_value_heads n_mamba_heads num_experts n_routed_experts num_local_experts"
    " moe_num_experts qk_rope_head_dim rotary_dim index_topk index_block_size chunk_size mamba_chunk_size block_size"
    " time_step_rank mamba_dt_rank laurel_rank gated_norm_rank loop_gate_rank adapter_rank log_scaling_n_floor"
    " floor_scale position_bias_num_buckets hidden_size_per_layer_input hc_lowrank",
    6: "sliding_window sliding_window_size window_size attention_window_size local_attention",
    8: "head_dim d_head dim_head kv_channels query_pre_attn_scalar q_lora_rank kv_lora_rank o_lora_rank"
    " qk_nope_head_dim v_head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim"
    " mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim mamba_n_heads mamba_num_heads"
    " index_head_dim index_n_heads attention_chunk_size d_rel",
    12: "qk_head_dim",
    16: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size"
    " shared_experts_intermediate_size moe_shared_expert_intermediate_size router_hidden_size word_embed_proj_dim"
    " rel_extent",
    32: "hidden_size d_model n_embd emb_dim embedding_dim attention_hidden_size lru_width dim_model_base",
    48: "intermediate_size ffn_dim dff dim_ff d_inner decoder_ffn_dim ffn_hidden_size intermediate_size_mlp"
    " dense_intermediate_size",
    64: "vocab_size vocab_size_per_layer_input unpadded_vocab_size mamba_d_ssm",
    256: "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length"
    " original_max_position_embeddings",
    0.3: "initializer_range init_std",
}  # fmt: skip
SMALL = {field: value for value, fields in SMALL.items() for field in fields.split()}
SMALL |= {"is_decoder": True, "use_cache": True, "tie_word_embeddings": False}  # tied, it would repeat what it reads
LATENT = {"num_key_value_heads": 4, "head_dim": 4}  # a head each, and `head_dim` is what turns of it

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
SHARING = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2}
BYTES = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}

OWN = {  # what these need besides, or have only where it is asked for, or lest they repeat one token
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "patcher_config": {**BYTES, "num_hidden_layers": 1}, "global_config": {**BYTES, "num_hidden_layers": 2},
        "encoder_config": {**BYTES, "num_hidden_layers": 1, "hidden_size_global": 32},
        "decoder_config": {**BYTES, "num_hidden_layers": 1, "hidden_size_global": 32},
        "encoder_hash_byte_group_vocab": 64,
    },
    "bloom": {"initializer_range": 0.5},
    "cohere_compass_text": {
        "layer_types": [FULL, SLIDING],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]} for kind in (FULL, SLIDING)
        },
    },
    "ctrl": {"initializer_range": 0.4},
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
    "minimax_m3_vl_text": {
        "index_n_heads": 2, "layer_types": [FULL, "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"],
    },
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"time_step_min": 1e-9},  # to which steps are clamped where several tokens are read, and else not
    "qwen4_exp_text": {
        "ple_layer_ids": [1], "ple_embed_dim": 32, "ngram_vocab_size_base": 64, "heads_per_ngram": 2,
        "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 1, "indexer_n_heads": 8, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "w_init_variance_scale": 2.0},
    "trocr": {"init_std": 0.2},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": [LINEAR, "hybrid"] * 2, "attention_hidden_size": 64,
        "attention_head_dim": 16, "num_key_value_heads": 4,
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": [LINEAR, "hybrid"] * 2, "time_step_min": 1e-9},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 6},
}  # fmt: skip

UNANSWERED = {"blt": "plain generate's cache counts num_hidden_layers, which its config has not"}


class NotBuilt(Exception):
    """A family that cannot be had small here, and why."""


def left_out(model_type: str) -> str | None:
    """Why a family with a causal head is not asked, where it is not."""
    config = tf.CONFIG_MAPPING[model_type]
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "an encoder"
    if PARTS & set(config.sub_configs):
        return "one of several models, not all of them of text"
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


def build(model_type: str, attention: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 4):
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


MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.2, "top_k": 0, "repetition_penalty": 1.1},
    "in a batch": {"batch": True},
}
GAP = 1e-3  # of two logits: what rounding may exchange
BEGIN, END = "<!-- families: {} -->", "<!-- families -->"


def asked(model_type: str) -> dict[str, str]:
    """
    For each of `MODES` what the family verifies, "tree", "chain", or "plain" and why.

    Raises:
        AssertionError: it gives other tokens than plain `generate`, or leaves the generator elsewhere.
    """
    model = build(model_type)
    cells = {}
    for mode, settings in MODES.items():
        answers = (_asked(model, f"{model_type}, {mode}", first, **settings) for first in range(3, 8))
        cells[mode] = next((answer for answer in answers if answer is not None), "near ties")
    return cells


def _asked(model, name: str, first: int, batch: bool = False, **settings) -> str | None:
    """`None` where two tokens are so near to each other that rounding decides."""
    ids = torch.arange(first, first + 7 * 10, 7)[None] % 61
    ids = torch.cat((ids, ids.flip(1))) if batch else ids
    mask = torch.ones_like(ids)
    mask[1:, :3] = 0
    kwargs = {
        "attention_mask": mask, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_logits": not batch, "output_scores": not batch, **settings,
    }  # fmt: skip
    torch.manual_seed(3)
    plain, state, said = model.generate(ids, **kwargs), rng_state(model.device), []
    texts = [
        [token for token, shown in zip(text, [*m, *[1] * 16], strict=True) if shown]
        for text, m in zip(plain.sequences.tolist(), mask.tolist(), strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        oracles = [Oracle(text, 0.7, model.config.get_text_config().vocab_size) for text in texts]
        patch.setattr("fspad_hf.generation.drafting.Drafter.grow", oracles_growth(oracles, patch))
        patch.setattr(logger, "warning_once", said.append)
        torch.manual_seed(3)
        draft = fresh_draft(model, tree_depth=4, tree_top_k=3, tree_total_nodes=20)
        fast = model.generate(ids, assistant_model=draft, **kwargs)
    if fast.sequences.tolist() != plain.sequences.tolist():
        assert not batch and _is_near_tie(plain, fast, ids.shape[1]), f"{name}: other tokens than plain generate"
        return None
    assert torch.equal(rng_state(model.device), state), f"{name}: the generator is elsewhere"
    if said:
        return "plain: " + re.search("because (.*)[.] The output", said[0])[1]
    assert fast.speculation.tau > 1.5, f"{name}: {fast.speculation}"
    return "chain" if probe(model).chains_only else "tree"


def _is_near_tie(plain, fast, prompt: int) -> bool:
    """Whether the first token that differs is one that rounding may exchange."""
    at = int((plain.sequences != fast.sequences)[0].nonzero()[0]) - prompt
    best, second = plain.scores[at][0].topk(2).values
    torch.testing.assert_close(plain.logits[at], fast.logits[at], atol=GAP, rtol=GAP)
    return bool(best - second < GAP)


def table(found: dict[str, dict[str, str]]) -> str:
    """Markdown: how many families verify what, and which; of those that verify nothing, why."""
    groups, reasons = defaultdict(list), defaultdict(list)
    for model_type, cells in sorted(found.items()):
        kinds = tuple(cell.split(":")[0] for cell in cells.values())
        groups[kinds].append(model_type)
        if kinds[0] == "plain":
            reasons[_short(cells["greedy"])].append(model_type)
    head = f"families of transformers {tf.__version__}, {len(found)} in all"
    lines = [f"| {' | '.join(MODES)} | {head} |", "|---" * (len(MODES) + 1) + "|"]
    groups = dict(sorted(groups.items(), key=lambda item: [["tree", "chain", "plain"].index(k) for k in item[0]]))
    lines += [f"| {' | '.join(kinds)} | {len(names)} |" for kinds, names in groups.items()]
    for kinds, names in groups.items():
        if kinds[0] != "plain":
            lines += ["", f"**{kinds[0].capitalize()}s, in a batch {kinds[-1]}:**", *_wrapped(names)]
    lines += ["", "**Plain:**", ""]
    for reason, names in sorted(reasons.items()):
        lines += textwrap.wrap(f"- {', '.join(names)}: {reason}", 118, subsequent_indent="  ")
    return "\n".join(lines)


def _wrapped(names: list[str]) -> list[str]:
    return textwrap.wrap(", ".join(names), 118, break_on_hyphens=False)


def _short(cell: str) -> str:
    why = cell.removeprefix("plain: ").split(" (error")[0].split(" of type <")[0]
    return re.sub(r" on a trial (tree|chain):.*", r" on a trial \1", why)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help="by default all")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the marks in this file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    tf.logging.set_verbosity_error()
    found = {}
    for model_type in arguments.family or families():
        if model_type not in UNANSWERED:
            found[model_type] = asked(model_type)
            print(f"{model_type}: {found[model_type]}", flush=True)
    made = table(found)
    if arguments.write is None:
        print(made)
        return
    begin, rest = re.search("<!-- families: .* -->", text := arguments.write.read_text(encoding="utf-8"))[0], END
    before, after = text.split(begin)[0], text.split(begin)[1].split(rest)[1]
    arguments.write.write_text(f"{before}{begin}\n{made}\n{rest}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
