"""Target, tokenizer and draft from what a command line names."""

from dataclasses import asdict, dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .configuration_fspad import FSPADConfig
from .demo_target import demo_target, released_draft
from .modeling_fspad import FSPADDraftModel
from .pretrained import named_target
from .runtime import check_reachable, quiet_transformers, resolve_device, resolve_dtype, status
from .speculation_config import SpeculationConfig


@dataclass(frozen=True)
class Models:
    """A target, its tokenizer and a draft for it, and what the first and the last were loaded from."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    draft: FSPADDraftModel
    target_name: str
    draft_name: str


def load_models(
    target: str | None = None,
    draft: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **trees: int | str | None,
) -> Models:
    """
    Loads what the arguments name; whatever can be checked is checked before anything is downloaded.

    Args:
        target: path or Hub id; by default the one that the draft's configuration names, and with neither a target nor
            a draft SmolLM2-135M-Instruct from PyPI, see [`demo_target`].
        draft: path or Hub id of a draft for `target`; by default the released one of the default target.
        device, dtype: see [`resolve_device`] and [`resolve_dtype`].
        trees: see [`tree_settings`].

    Raises:
        ValueError, OSError: an argument is wrong, or a model cannot be had.
    """
    place, precision, settings = resolve_device(device), resolve_dtype(dtype, device), tree_settings(**trees)
    with quiet_transformers():
        draft_name = draft or str(released_draft())
        check_reachable(draft_name, "draft")
        config = FSPADConfig.from_pretrained(draft_name)
        target_name = target or (named_target(draft, config) if draft else str(demo_target()))
        check_reachable(target_name, "target")
        with status(f"Loading {target_name} and {draft_name}"):
            model, tokenizer, loaded = FSPADDraftModel.load_pair(draft_name, target=target_name, dtype=precision)
            loaded.speculation_config.update(**settings)
            return Models(model.to(place), tokenizer, loaded.to(place), target_name, draft_name)


def load_draft(draft: str, beside: Models, **trees: int | str | None) -> FSPADDraftModel:
    """Another draft for the target of `beside`; `trees` as [`load_models`] takes them."""
    with quiet_transformers():
        made = FSPADDraftModel.from_pretrained(draft, dtype=beside.target.dtype, **tree_settings(**trees))
    return made.to(beside.target.device).eval()


def tree_settings(
    tree_depth: int | None = None,
    tree_top_k: int | None = None,
    tree_nodes: int | None = None,
    tree_lookup: int | None = None,
    tree: str | None = None,
) -> dict[str, int | str]:
    """The commands' options as fields of a [`SpeculationConfig`]; `ValueError` if one is out of range."""
    given = SpeculationConfig(tree, tree_depth, tree_top_k, tree_nodes, tree_lookup)
    return {name: value for name, value in asdict(given).items() if value is not None}


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], device=None) -> dict:
    """`input_ids` and `attention_mask` (`[1, prompt]`) of a chat; without a chat template, of its last message."""
    if getattr(tokenizer, "chat_template", None):
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(messages[-1]["content"], return_tensors="pt")
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
