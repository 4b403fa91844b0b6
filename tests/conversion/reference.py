"""Synthetic checkpoints in the public layouts, and their networks written out from EAGLE's and FSPAD's sources."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

HIDDEN, INTERMEDIATE, VOCABULARY = 32, 40, 64
CONFIG = {  # the fields of eagle/train/*.json
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 63, "hidden_act": "silu",
    "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "model_type": "llama", "num_attention_heads": 4,
    "num_hidden_layers": 1, "rms_norm_eps": 0.01, "torch_dtype": "float32", "vocab_size": VOCABULARY,
}  # fmt: skip
LAYOUTS = {
    "vicuna": {"config": {"rope_scaling": None}},
    "llama3": {"config": {"num_key_value_heads": 2, "rope_theta": 500_000.0, "bias": False}, "fc_bias": False},
    "qwen2": {"config": {"num_key_value_heads": 2, "rope_theta": 1e6, "model_type": "qwen2"}, "qkv_bias": True},
    "wide_heads": {"config": {"num_key_value_heads": 1, "head_dim": 16}},
    "linear_rope": {"config": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500_000.0}},
    "fspad": {"sampling": True, "alignment": True},
    "fspad_wofs": {"alignment": True},
    "mlplin": {"sampling": True, "config": {"hidden_act": "relu"}},
}


def config_of(name: str) -> dict:
    return {**CONFIG, **LAYOUTS[name].get("config", {})}


def weights_of(name: str, embedding: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The state dict that training code of this layout would save."""
    config, layout = config_of(name), LAYOUTS[name]
    head_dim = config.get("head_dim", HIDDEN // 4)
    key_values = config.get("num_key_value_heads", 4) * head_dim
    join = "fc.fc" if layout.get("sampling") else "fc"
    shapes = {
        f"{join}.weight": (HIDDEN, 2 * HIDDEN),
        "layers.0.self_attn.q_proj.weight": (4 * head_dim, HIDDEN),
        "layers.0.self_attn.k_proj.weight": (key_values, HIDDEN),
        "layers.0.self_attn.v_proj.weight": (key_values, HIDDEN),
        "layers.0.self_attn.o_proj.weight": (HIDDEN, 4 * head_dim),
        "layers.0.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "layers.0.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "layers.0.mlp.down_proj.weight": (HIDDEN * (2 if layout.get("alignment") else 1), INTERMEDIATE),
        "layers.0.post_attention_layernorm.weight": (HIDDEN,),
    }
    if layout.get("fc_bias", True):
        shapes[f"{join}.bias"] = (HIDDEN,)
    if layout.get("qkv_bias"):
        rows = {"q": 4 * head_dim, "k": key_values, "v": key_values}
        shapes |= {f"layers.0.self_attn.{p}_proj.bias": (rows[p],) for p in "qkv"}
    if layout.get("sampling"):
        shapes |= {
            "fc.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            "fc.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            "fc.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            "fc.post_attention_layernorm.weight": (HIDDEN,),
        }
    generator = torch.Generator().manual_seed(7)
    weights = {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    if embedding is not None:
        weights["embed_tokens.weight"] = embedding.detach().clone()
    return weights


def write(folder: Path, name: str, weights: dict[str, torch.Tensor], kind: str = "safetensors") -> str:
    """Saves a checkpoint as `safetensors` or `bin`, whole or (`... sharded`) in two shards; returns its path."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(name)))
    weights = {key: value.contiguous() for key, value in weights.items()}
    stem, save = ("model", save_file) if "safetensors" in kind else ("pytorch_model", torch.save)
    suffix = "safetensors" if "safetensors" in kind else "bin"
    if not kind.endswith("sharded"):
        save(weights, folder / f"{stem}.{suffix}")
        return str(folder)
    places = {key: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, key in enumerate(weights)}
    for place in set(places.values()):
        save({key: value for key, value in weights.items() if places[key] == place}, folder / place)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return str(folder)


def forward(name: str, weights: dict, embeds: torch.Tensor, features: torch.Tensor) -> tuple:
    """
    (what the LM head reads, what is fed back), `[length, hidden]` each, of `[length, hidden]` inputs.

    EAGLE `cnets1.py`: Model.forward, LlamaDecoderLayer (index 0), LlamaAttention; FSPAD `cnets_fspad.py`: Efc, EMLP,
    LlamaMLP with a down projection of 2h.
    """

    def linear(x, key):
        return F.linear(x, weights[f"{key}.weight"], weights.get(f"{key}.bias"))

    def norm(x, key):
        return weights[f"{key}.weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"])

    act = getattr(F, config_of(name)["hidden_act"])
    joined = torch.cat((embeds, features), dim=-1)
    if LAYOUTS[name].get("sampling"):
        z = linear(joined, "fc.fc")
        up = linear(norm(z, "fc.post_attention_layernorm"), "fc.mlp.up_proj")
        x = z + linear(act(linear(embeds, "fc.mlp.gate_proj")) * up, "fc.mlp.down_proj")
    else:
        x = linear(joined, "fc")
    attended = x + linear(_attention(config_of(name), linear, x), "layers.0.self_attn.o_proj")
    inner = norm(attended, "layers.0.post_attention_layernorm")
    inner = act(linear(inner, "layers.0.mlp.gate_proj")) * linear(inner, "layers.0.mlp.up_proj")
    out = linear(inner, "layers.0.mlp.down_proj")
    if LAYOUTS[name].get("alignment"):
        out = torch.cat((attended, attended), dim=-1) + out
        return out[:, :HIDDEN], out[:, HIDDEN:]
    return attended + out, attended + out


def _attention(config: dict, linear, x: torch.Tensor) -> torch.Tensor:
    length, head_dim = x.shape[0], config.get("head_dim", HIDDEN // 4)
    q, k, v = (linear(x, f"layers.0.self_attn.{p}_proj").view(length, -1, head_dim).transpose(0, 1) for p in "qkv")
    scaling = config.get("rope_scaling")
    base = 10_000.0 if scaling else config.get("rope_theta", 10_000.0)
    angles = torch.arange(length)[:, None] / (scaling["factor"] if scaling else 1.0)
    angles = angles / base ** (torch.arange(0, head_dim, 2)[None] / head_dim)
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    def turn(y):
        first, second = y.chunk(2, dim=-1)
        return y * cos + torch.cat((-second, first), dim=-1) * sin

    groups = q.shape[0] // k.shape[0]
    scores = turn(q) @ turn(k).repeat_interleave(groups, 0).transpose(1, 2) / head_dim**0.5
    scores = scores + torch.full((length, length), float("-inf")).triu(1)
    return (scores.softmax(-1) @ v.repeat_interleave(groups, 0)).transpose(0, 1).reshape(length, -1)
