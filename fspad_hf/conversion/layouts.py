"""
The layouts of public checkpoints and what they are called here.

Sources: SafeAILab/EAGLE `eagle/model/cnets1.py` (EAGLE and EAGLE-2: one layout, EAGLE-2 changed only the tree) and
`eagle/model/cnets.py` (EAGLE-3); Luc4Gui/FSPAD `eagle/model/cnets_fspad.py`, with the paper's ablations in
`cnets_fspad_wofs.py` (no feature sampling) and `cnets_mlplin.py` (no partial alignment). All of them join
`fc(cat(embedding, feature))` in this order, and their layer 0 has no input norm.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

EMBEDDING = "embed_tokens.weight"
ROTARY_BUFFER = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # made anew from the configuration
ATTENTION_BIASES = tuple(f"layers.0.self_attn.{name}_proj.bias" for name in "qkv")
LAYER = {
    **{f"layers.0.self_attn.{name}_proj.weight": f"layer.self_attn.{name}_proj.weight" for name in "qkvo"},
    **{f"layers.0.mlp.{name}_proj.weight": f"layer.mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    "layers.0.post_attention_layernorm.weight": "layer.post_attention_layernorm.weight",
}
JOIN = {"fc.weight": "feature_sampler.fc.weight"}
SAMPLER = {
    "fc.fc.weight": "feature_sampler.fc.weight",
    "fc.post_attention_layernorm.weight": "feature_sampler.norm.weight",
    **{f"fc.mlp.{name}_proj.weight": f"feature_sampler.{name}_proj.weight" for name in ("gate", "up", "down")},
}
VARIANTS = {  # by (feature sampling, partial alignment)
    (False, False): "EAGLE / EAGLE-2",
    (True, True): "FSPAD",
    (False, True): "FSPAD without feature sampling",
    (True, False): "FSPAD without partial alignment",
}
EAGLE3_MARKS = re.compile(r"(.*\.)?(midlayer\..*|d2t|t2d|hidden_norm\..*)")


@dataclass(frozen=True)
class Layout:
    """What a checkpoint is, and the name here (the second) of each of its tensors (the first) that is taken over."""

    variant: str
    names: dict[str, str]
    feature_sampling: bool
    partial_alignment: bool
    fc_bias: bool
    attention_bias: bool


def recognise(names: Iterable[str], shape: Callable[[str], tuple[int, ...]], source: str) -> Layout:
    """
    The layout of a checkpoint.

    Args:
        names: of its tensors.
        shape: gives a tensor's shape.
        source: what errors call the checkpoint.

    Raises:
        ValueError: an EAGLE-3 draft, or tensors are missing or unknown.
    """
    names = {name for name in names if not ROTARY_BUFFER.fullmatch(name)}
    _refuse_eagle3(names, shape, source)
    sampling = any(name.startswith(("fc.fc.", "fc.mlp.")) for name in names)
    expected = {**LAYER, **(SAMPLER if sampling else JOIN)}
    join_bias = "fc.fc.bias" if sampling else "fc.bias"
    if join_bias in names:
        expected[join_bias] = "feature_sampler.fc.bias"
    if attention_bias := any(name in names for name in ATTENTION_BIASES):
        expected.update({name: name.replace("layers.0.", "layer.") for name in ATTENTION_BIASES})
    missing, unknown = sorted(expected.keys() - names), sorted(names - expected.keys() - {EMBEDDING})
    if missing or unknown:
        raise ValueError(
            f"{source!r} is no checkpoint that can be converted: of an EAGLE, EAGLE-2 or FSPAD draft of one layer, it "
            f"lacks {missing or 'nothing'} and has the unknown {unknown or 'nothing'}; pass the draft's whole state "
            "dict, and nothing but the draft's."
        )
    join, down = shape("fc.fc.weight" if sampling else "fc.weight"), shape("layers.0.mlp.down_proj.weight")
    alignment = down[0] == 2 * join[0]
    return Layout(VARIANTS[sampling, alignment], expected, sampling, alignment, join_bias in names, attention_bias)


def _refuse_eagle3(names: set[str], shape: Callable[[str], tuple[int, ...]], source: str) -> None:
    marks = sorted(name for name in names if EAGLE3_MARKS.fullmatch(name))
    if "fc.weight" in names and (join := shape("fc.weight")) and len(join) == 2 and join[1] == 3 * join[0]:
        marks.append(f"fc.weight of shape {list(join)}")
    if marks:
        shown = ", ".join(marks[:4]) + (", ..." if len(marks) > 4 else "")
        raise ValueError(
            f"{source!r} is an EAGLE-3 draft ({shown}), not of the kind that is converted: it reads features of three "
            "of the target's layers and has an LM head of its own, so it would need another network and other "
            "features. Pass an EAGLE, EAGLE-2 or FSPAD checkpoint for this target, or train one with `fspad-hf train`."
        )


def draft_fields(config: dict, layout: Layout) -> dict:
    """
    The fields of [`FSPADConfig`] that a checkpoint's config.json decides; what it lacks is as in EAGLE's `EConfig`.

    Vocabulary, width and special tokens are the target's: the configs of public drafts name others (the one for
    Llama-3-8B-Instruct has Llama-3's base `eos_token_id`), and `bias` is told by the weights, as it is often wrong.

    Raises:
        ValueError: a rotary scaling that a draft cannot have.
    """
    heads = config.get("num_attention_heads", 32)
    return {
        "intermediate_size": config.get("intermediate_size", 11008),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim"),
        "hidden_act": config.get("hidden_act", "silu"),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_parameters": _rope_parameters(config),
        "feature_sampling": layout.feature_sampling,
        "partial_alignment": layout.partial_alignment,
        "fc_bias": layout.fc_bias,
        "attention_bias": layout.attention_bias,
    }


def _rope_parameters(config: dict) -> dict:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    if kind == "default":
        return {"rope_type": kind, "rope_theta": theta}
    if kind == "linear":  # EAGLE's scaled rotary embeddings never see rope_theta (cnets1.py, _init_rope)
        return {"rope_type": kind, "rope_theta": 10_000.0, "factor": float(scaling["factor"])}
    if kind == "llama3":
        return {**scaling, "rope_type": kind, "rope_theta": theta}
    raise ValueError(
        f"rope_scaling={scaling!r} in the checkpoint's config.json depends on the text's length or is unknown: "
        "expected none, 'linear' or 'llama3'; remove it from config.json if the draft was trained without it."
    )
