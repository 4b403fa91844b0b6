"""A pair of a given shape with random weights, and tokens by decree: what a pair would cost, without its weights."""

import math
from collections import deque
from collections.abc import Callable

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from ..generation.tree import CandidateTree
from ..modeling_fspad import FSPADDraftModel, config_for_target
from ..speculation_config import FIELDS, SpeculationConfig

STD, SURE = 0.02, 100.0  # of the weights, of a draft's logits
CERTAIN = 1e30  # a score beside which every other has probability 0; infinity would make NaN of the softmax
SMALL = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
}  # fmt: skip
SHAPES = {
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-2-7b": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "smollm2-135m": {
        **SMALL, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    # the same width and depth, most layers recurrent
    "qwen3.5-135m": {
        "model_type": "qwen3_5_text", **SMALL, "head_dim": 64, "linear_num_key_heads": 8, "linear_num_value_heads": 8,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
    "lfm2-135m": {"model_type": "lfm2", **SMALL, "layer_types": ["conv", "conv", "full_attention"] * 10},
}  # fmt: skip


def shape_config(shape: str) -> PreTrainedConfig:
    """
    The configuration that `shape` names: a key of [`SHAPES`], a config.json or its folder, or a Hub id.

    Raises:
        ValueError, OSError: there is none, or it is not that of a causal language model.
    """
    if shape in SHAPES:
        return AutoConfig.for_model(**{"model_type": "llama", **SHAPES[shape]})
    try:
        config = AutoConfig.from_pretrained(shape)
    except OSError as error:
        raise OSError(
            f"shape={shape!r} has no configuration ({str(error).splitlines()[0]}): expected one of {list(SHAPES)}, "
            "a config.json or its folder, or a Hub id."
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping or config.is_encoder_decoder:
        raise ValueError(
            f"shape={shape!r} is a {config.model_type!r} configuration: expected that of a decoder-only causal "
            f"language model, or one of {list(SHAPES)}."
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its weights would be other tensors; these are plain ones
    return config


def random_pair(
    shape: str | PreTrainedConfig, device: torch.device, dtype: torch.dtype, overrides: dict,
    check: Callable[[SpeculationConfig, int | None], None] = lambda speculation, positions: None,
) -> tuple[PreTrainedModel, FSPADDraftModel]:  # fmt: skip
    """
    A target and a draft in eval mode, made on `device` in `dtype`, their weights random and the same every time. The
    target ends nowhere; the draft is sure of its first child, so that its trees are as deep as can be.

    Args:
        overrides: fields of [`FSPADConfig`] or [`SpeculationConfig`].
        check: called first, with the settings and the positions that the target has.

    Raises:
        ValueError: an override is wrong, or the device has not the memory.
    """
    config = shape_config(shape) if isinstance(shape, str) else shape
    settings = {name: value for name, value in overrides.items() if name in FIELDS}
    own = {name: value for name, value in overrides.items() if name not in FIELDS}
    with torch.device("meta"), no_init_weights():
        meta = AutoModelForCausalLM.from_config(config, dtype=dtype)
    meta.tie_weights()
    try:
        draft_config = config_for_target(meta, **own)
    except StrictDataclassError as error:  # which is no ValueError, and says the same at greater length
        raise ValueError(str(error.__cause__ or error)) from error
    check(
        SpeculationConfig(**settings).resolved(device),
        getattr(config.get_text_config(), "max_position_embeddings", None),
    )
    size = sum(weight.nbytes for weight in meta.parameters())
    if size > (room := _memory(device)):
        raise ValueError(
            f"The weights of this shape take {size / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, and "
            f"{device} has {room / 2**30:.1f}: pass a smaller shape, or --dtype bfloat16."
        )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, no_init_weights():
            target, draft = AutoModelForCausalLM.from_config(config, dtype=dtype), FSPADDraftModel(draft_config)
    finally:
        torch.set_default_dtype(default)
    target.tie_weights()
    _fill(target), _fill(draft)
    with torch.no_grad():
        embedded = target.get_input_embeddings()(torch.arange(64, device=device)[None] % draft_config.vocab_size)
        logits = target.get_output_embeddings()(draft.eval()(embedded, embedded).logit_features)
        draft.layer.mlp.down_proj.weight[: draft_config.hidden_size] *= SURE / logits.float().std()
    target.generation_config.eos_token_id = None
    draft.speculation_config.update(**settings)
    return target.eval(), draft.eval()


@torch.no_grad()
def _fill(model: PreTrainedModel) -> None:
    generator = torch.Generator(model.device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=STD, generator=generator)
        else:
            weight.fill_(1.0 if "norm" in name or name.endswith("weight") else 0.0)


def _memory(device: torch.device) -> int:
    """Bytes that a model on `device` may take: what a GPU has free, all that the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as file:
        return 1024 * int(file.readline().split()[1])


def weight_bytes(target: PreTrainedModel, draft: FSPADDraftModel) -> dict[str, int]:
    """
    Bytes of weights that one forward must read: of the `target`, without tables from which only rows are gathered
    (all experts of a mixture are counted), of the `draft`, and of the LM `head`'s rows that the draft uses.
    """
    head = target.get_output_embeddings()
    read = {id(weight): weight.nbytes for weight in head.parameters()}
    gathered = {id(m.weight) for m in target.modules() if isinstance(m, nn.Embedding)} - read.keys()
    drafted, vocabulary = draft.config.draft_vocab_size, target.config.get_text_config().vocab_size
    share = drafted / vocabulary if drafted is not None and type(head) is nn.Linear else 1.0
    return {
        "target": sum(weight.nbytes for weight in target.parameters() if id(weight) not in gathered),
        "draft": sum(weight.nbytes for weight in draft.parameters()),
        "head": round(share * sum(read.values())),
    }


class Decree(LogitsProcessor):
    """
    Rounds emit `tau` tokens on average: told of each tree before its tokens, plans a path and leaves the next token
    planned as the only possible one, greedy or sampled.
    """

    def __init__(self, tau: float):
        self.tau, self.rounds, self.emitted = tau, 0, 0
        self.planned: deque[int] = deque()

    @staticmethod
    def check(tau: float, settings: SpeculationConfig) -> None:
        """`ValueError` if no tree of `settings` (resolved) can give rounds of `tau` tokens on average."""
        most = 1 + min(settings.tree_depth, settings.tree_total_nodes)
        if not 1 <= tau <= most:
            raise ValueError(
                f"tau={tau!r} cannot be had from trees of depth {settings.tree_depth} and {settings.tree_total_nodes} "
                f"nodes: expected 1 to {most}, the bonus token included; lower tau, or raise --tree-depth."
            )

    @staticmethod
    def tokens(tau: float | None, rounds: int) -> int:
        """Tokens of an answer of so many rounds, the prefill's included."""
        if tau is None or not math.isfinite(tau) or rounds < 1:
            raise ValueError(
                f"tau={tau}, rounds={rounds}: a random draft accepts nothing, so say how many tokens a round shall "
                "emit, such as --tau 2.5, and 1 round or more."
            )
        return 1 + math.floor(tau * rounds + 0.5)

    def on_round(self, tree: CandidateTree) -> None:
        self.rounds += 1
        tokens = max(math.floor(self.tau * self.rounds + 0.5) - self.emitted, 1)
        self.emitted += tokens
        self.planned = deque(plan(tree, tokens))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.planned:
            scores[:, self.planned.popleft()] = CERTAIN
        return scores


def plan(tree: CandidateTree, tokens: int) -> list[int]:
    """
    The tokens of a path from the root to depth `tokens - 1` (or the deepest there is), and one that ends it: a token
    that is no child of the path's last node.
    """
    ids, parents, depths = (part[0].tolist() for part in (tree.tokens, tree.parents, tree.depths))
    node = depths.index(min(tokens - 1, max(depths)))
    taken = {ids[child] for child in range(1, len(ids)) if parents[child] == node}
    planned = [next(token for token in range(len(taken) + 1) if token not in taken)]
    while node:
        planned.append(ids[node])
        node = parents[node]
    return planned[::-1]
