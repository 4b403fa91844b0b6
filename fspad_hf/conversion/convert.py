"""`fspad-hf convert`: a public draft checkpoint becomes a [`FSPADDraftModel`] folder."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..configuration_fspad import FSPADConfig
from ..host import target_class
from ..modeling_fspad import FSPADDraftModel, config_for_target, layer_width
from ..runtime import quiet_transformers
from .layouts import EMBEDDING, Layout, draft_fields, recognise
from .weights import StoredWeights, find_file, read_json

ROWS = 4096  # of the embeddings, compared at a time


@dataclass(frozen=True)
class Conversion:
    """The draft, what the checkpoint was found to be, and the remarks that were given as warnings."""

    draft: FSPADDraftModel
    variant: str
    remarks: tuple[str, ...]


def convert_checkpoint(
    checkpoint: str | os.PathLike,
    target: str | os.PathLike,
    output: str | os.PathLike,
    *,
    target_name: str | None = None,
    allow_pickle: bool = False,
    strict: bool = False,
) -> Conversion:
    """
    Converts an EAGLE, EAGLE-2 or official FSPAD checkpoint and saves it in this package's format.

    Of the target only the configuration, the tokenizer and the embedding are read. The checkpoint's own embedding is
    dropped: the draft uses the target's. Where the two differ, or cannot be compared, a warning says so.

    Args:
        checkpoint: local folder or Hub id with config.json and weights, see [`conversion.layouts`].
        target: local folder or Hub id of the model that the draft was trained for.
        output: folder to write, by [`FSPADDraftModel.save_pretrained`].
        target_name: the target's name in the draft's configuration (default: `target`).
        allow_pickle: also read `pytorch_model.bin`, by `torch.load(weights_only=True)`.
        strict: an embedding that differs or cannot be compared is an error.

    Raises:
        ValueError: a checkpoint of another kind or for another target; the message names what does not fit.
        OSError: a file is missing or damaged, or the Hub cannot be reached.
    """
    checkpoint, target = os.fspath(checkpoint), os.fspath(target)
    output = _checked_output(output, checkpoint, target)
    if (path := find_file(checkpoint, "config.json")) is None:
        raise FileNotFoundError(f"{checkpoint!r} has no config.json: expected the draft's, beside its weights.")
    source = read_json(path)
    weights = StoredWeights(checkpoint, allow_pickle)
    layout = recognise(weights.names, weights.shape, checkpoint)
    with quiet_transformers():
        host = _without_weights(target)
        config = _draft_config(source, layout, host, checkpoint, target, target_name)
        _check_shapes(config, layout, weights)
        remark = _compare_embedding(weights, host, target, allow_pickle)
        if remark is not None and strict:
            raise ValueError(f"{remark} Without strict (--strict) this is a warning.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(target)
        except (OSError, ValueError):
            tokenizer = None  # save_pretrained says what that means
        draft = _draft(config, layout, weights)
        draft.save_pretrained(output, tokenizer=tokenizer)
    if remark is not None:
        warnings.warn(remark, stacklevel=2)
    return Conversion(draft, layout.variant, () if remark is None else (remark,))


def _checked_output(output: str | os.PathLike, checkpoint: str, target: str) -> Path:
    output = Path(output).expanduser().resolve()
    if output.is_file():
        raise ValueError(f"output={str(output)!r} is a file: expected a folder to save the draft in.")
    for what, taken in (("checkpoint", checkpoint), ("target", target)):
        if Path(taken).is_dir() and Path(taken).resolve() == output:
            raise ValueError(f"output={str(output)!r} is the {what}'s own folder: name another.")
    return output


def _without_weights(target: str) -> PreTrainedModel:
    """The target on the meta device: it tells the shapes and names of a model that is not read."""
    config = AutoConfig.from_pretrained(target)
    with torch.device("meta"):
        return target_class(config).from_config(config)


def _draft_config(
    source: dict, layout: Layout, host: PreTrainedModel, checkpoint: str, target: str, target_name: str | None
) -> FSPADConfig:
    layers = source.get("num_hidden_layers", 1)
    if layers != 1:
        raise ValueError(f"{checkpoint!r} has num_hidden_layers={layers}: expected a draft of one layer.")
    fields = {**draft_fields(source, layout), "target_name_or_path": target_name or target}
    width = source.get("hidden_size", 4096)
    if width != layer_width(host.get_output_embeddings()):
        raise ValueError(
            f"{checkpoint!r} has hidden_size={width}, the LM head of {target!r} reads "
            f"{layer_width(host.get_output_embeddings())}: pass the target that the draft was trained for."
        )
    try:
        return config_for_target(host, **fields)
    except StrictDataclassError as error:
        raise ValueError(
            f"The config.json of {checkpoint!r} describes no draft: {' '.join(str(error).split())}"
        ) from error


def _check_shapes(config: FSPADConfig, layout: Layout, weights: StoredWeights) -> None:
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in FSPADDraftModel(config).state_dict().items()}
    wrong = [
        f"{name} is {list(found)}, expected {list(expected[ours])}"
        for name, ours in layout.names.items()
        if (found := weights.shape(name)) != expected[ours]
    ]
    if EMBEDDING in weights.names:
        found, wanted = weights.shape(EMBEDDING), (config.vocab_size, config.hidden_size)
        wrong += [f"{EMBEDDING} is {list(found)}, the target's {list(wanted)}"] if found != wanted else []
    if wrong:
        raise ValueError(
            f"{weights.repo!r} does not fit its config.json and the target {config.target_name_or_path!r}: "
            f"{'; '.join(wrong)}. Pass the checkpoint's own config.json and the target it was trained for."
        )


def _compare_embedding(weights: StoredWeights, host: PreTrainedModel, target: str, allow_pickle: bool) -> str | None:
    """Why the checkpoint's embedding is not known to be the target's; `None` if it is, or if there is none."""
    if EMBEDDING not in weights.names:
        return None
    use = "The converted draft uses the target's embedding, not its own."
    try:
        stored = StoredWeights(target, allow_pickle)
    except (OSError, ValueError) as error:
        return f"The checkpoint's embedding was not compared with the target's: {error} {use}"
    name = _embedding_name(stored, host)
    if name is None:
        return (
            f"The checkpoint's embedding was not compared: no embedding found among the weights of {target!r}. {use}"
        )
    rows, differing, largest = weights.shape(EMBEDDING)[0], 0, 0.0
    if stored.shape(name) != weights.shape(EMBEDDING):
        return f"The embedding {name} of {target!r} has the shape {list(stored.shape(name))}: not compared. {use}"
    for start in range(0, rows, ROWS):
        ours, theirs = (w.rows(n, start, start + ROWS) for w, n in ((weights, EMBEDDING), (stored, name)))
        # Either may be the other one rounded to its dtype: drafts are often saved in float16 for bfloat16 targets.
        unequal = (theirs.to(ours.dtype) != ours) & (ours.to(theirs.dtype) != theirs)
        differing += int(unequal.any(dim=-1).sum())
        largest = max(largest, float((ours.float() - theirs.float()).abs().masked_fill(~unequal, 0).max()))
    if not differing:
        return None
    return (
        f"The checkpoint's embedding is not that of {target!r}: {differing} of {rows} rows differ, by up to "
        f"{largest:.3g}. {use} A draft trained on another embedding drafts worse; the output stays the target's."
    )


def _embedding_name(stored: StoredWeights, host: PreTrainedModel) -> str | None:
    embedding = host.get_input_embeddings()
    module = next((name for name, module in host.named_modules() if module is embedding), "")
    if f"{module}.weight" in stored.names:
        return f"{module}.weight"
    # On disk the names may have another prefix than in the model.
    found = [name for name in stored.names if f".{name}".endswith(f".{module.rpartition('.')[2]}.weight")]
    return found[0] if len(found) == 1 else None


def _draft(config: FSPADConfig, layout: Layout, weights: StoredWeights) -> FSPADDraftModel:
    state = {ours: weights.tensor(name) for name, ours in layout.names.items()}
    dtype = state["feature_sampler.fc.weight"].dtype
    if layout.attention_bias:  # Qwen2's o_proj has none, Llama's has one as soon as q, k and v do
        state["layer.self_attn.o_proj.bias"] = torch.zeros(config.hidden_size, dtype=dtype)
    with torch.device("meta"):
        draft = FSPADDraftModel(config)
    draft.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
    draft.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are not in the state dict
    return draft.eval()
