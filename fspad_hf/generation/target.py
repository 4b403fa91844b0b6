"""What speculation needs of the target: its features, a forward over a tree, and how features become logits."""

import inspect
import threading
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from ..host import CACHE
from ..runtime import label
from .cache import ArenaCache
from .few_rows import few_rows_product, has_choice
from .grouped import folded_config
from .tree import CandidateTree
from .twin import twin

HIDDEN_WINDOWS = ("window_size", "attention_window", "local_attention")


class Target:
    """
    One call's view of the target model.

    Features are what the decoder returns, caught by a forward hook that listens only to this thread and only during
    this object's own forwards (a classifier-free-guidance processor calls the same model). In a decoder compiled in
    place hooks do not fire; then `use_hook=False` takes the last of `output_hidden_states`.

    Args:
        model: the target.
        use_hook: as found by the probe.
        logit_transform: name of a function in [`LOGIT_TRANSFORMS`], as found by the probe.
        use_twin: verify by a [`twin`], as found by the probe.
        chains_only: its forward takes no mask for trees, see [`~Target.verify`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        use_hook: bool = True,
        logit_transform: str = "identity",
        use_twin: bool = False,
        chains_only: bool = False,
    ):
        self.model, self.chains_only = model, chains_only
        self.extras: tuple[str, ...] = ()  # outputs that a verification leaves in `outputs`, such as "hidden_states"
        self.outputs = None
        self.embedding = model.get_input_embeddings()
        self.head = model.get_output_embeddings()
        self.use_hook = use_hook
        self.use_twin = use_twin
        self._verifier: PreTrainedModel | None = None
        self.logit_transform = LOGIT_TRANSFORMS[logit_transform]
        self.text_config = model.config.get_text_config()
        self._takes_positions = accepts_positions(model)
        self.device = execution_device(model)
        self.is_tensor_parallel = (getattr(model, "_tp_size", None) or 1) > 1
        self.chooses_products = not self.is_tensor_parallel  # else each process would choose, and round, for itself
        self._thread = threading.get_ident()
        self.head_rows: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._caught: list[torch.Tensor] | None = None
        self._windows: dict[str, int | None] | None = None

    @contextmanager
    def listening(self):
        """Catches the decoder's features for as long as the context lasts."""
        if not self.use_hook:  # a compiler would trace the hook into its graph
            yield self
            return
        handle = self.model.get_decoder().register_forward_hook(self._catch)
        try:
            yield self
        finally:
            handle.remove()

    def _catch(self, module, args, output):
        if self._caught is not None and threading.get_ident() == self._thread:
            self._caught.append(output[0])

    @contextmanager
    def _armed(self):
        self._caught = []
        try:
            yield self._caught
        finally:
            self._caught = None

    def prefill(self, input_ids: torch.LongTensor, generation_config, model_kwargs: dict):
        """The host's own prefill. Returns its outputs and the features of the prompt, `[batch, prompt, hidden]`."""
        if not self.use_hook:
            model_kwargs = {**model_kwargs, "output_hidden_states": True}
        if model_kwargs.get("logits_to_keep") == 1 and getattr(self.text_config, "num_kv_shared_layers", 0):
            # the number would make layers without keys of their own leave out the other tokens' features
            model_kwargs = {**model_kwargs, "logits_to_keep": torch.tensor([-1], device=self.device)}
        with self._armed() as caught:
            outputs = self.model._prefill(input_ids, generation_config, model_kwargs)
        return outputs, self._features(outputs, caught)

    def verify(
        self, tree: CandidateTree, cache: ArenaCache, shown: torch.BoolTensor, positions: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        One forward over every node of `tree`. A chain, in which each node's parent is the one before, needs no mask
        but what the model makes itself; and no positions, where it takes none.

        Args:
            cache: holds the tokens before the roots; the nodes' rows go where it was told to place them.
            shown (`[batch, positions]`): False on padding.
            positions (`[batch, kinds]`): the roots' position ids. A model with several kinds of them, for multimodal
                rotary embeddings, is given `[kinds, batch, nodes]`.

        Returns:
            logits (`[batch, nodes, vocabulary]`) and features (`[batch, nodes, hidden]`).
        """
        held, tokens = cache.begin(tree.tokens)
        inputs = {"input_ids": tokens, CACHE: held, "use_cache": True, "return_dict": True}
        if self.chains_only:
            inputs["attention_mask"] = shown[:, : cache.kv_length].long()
        else:
            inputs["attention_mask"] = self._mask(tree, shown, cache)
        if self._takes_positions:
            steps = tree.depths
            if (reread := tokens.shape[1] - len(tree)) > 0:
                before = torch.arange(-reread, 0, device=steps.device).expand(len(steps), -1)
                steps = torch.cat((before, steps), dim=1)
            places = positions.T[..., None] + steps
            inputs["position_ids"] = places if len(places) > 1 else places[0]
        if not self.use_hook:
            inputs["output_hidden_states"] = True
        inputs |= {f"output_{name}": True for name in self.extras}
        with self._armed() as caught, label("forward"):
            outputs = self.verifier(**inputs)
        self.outputs = outputs if self.extras else None
        return outputs.logits[:, -len(tree) :], self._features(outputs, caught)[:, -len(tree) :]

    @property
    def verifier(self) -> PreTrainedModel:
        """What runs over trees: the model, or its twin."""
        if self._verifier is None:
            config = None if self.chains_only else folded_config(self.model)  # whose attention is given its masks
            self._verifier = twin(self.model, config) if self.use_twin else self.model
        return self._verifier

    def draft_logits(self, features: torch.Tensor, ids: torch.LongTensor | None = None) -> torch.Tensor:
        """
        What the target would make of `features`: its LM head and whatever it applies after it.

        Args:
            ids (`[drafted]`): only these columns, the same ones throughout a call; `None` is the whole vocabulary.
        """
        # flat: for a slice of one row, a 3-D `linear` becomes a batched product that copies the whole weight
        rows = features.flatten(0, -2)
        if has_rows(self.head) and self.head.weight.device == features.device:
            if ids is not None and self.head_rows is None:
                self.head_rows = self.take_head_rows(ids)
            weight, bias = (self.head.weight, self.head.bias) if ids is None else self.head_rows
            quick = has_choice(weight) and weight.dtype == rows.dtype and not torch.is_grad_enabled()
            quick = quick and self.chooses_products
            logits = (few_rows_product if quick else nn.functional.linear)(rows, weight, bias)
            logits = logits.unflatten(0, features.shape[:-1])
        elif ids is None:
            logits = self.head(rows).unflatten(0, features.shape[:-1])
        else:  # quantised, offloaded or adapted: only the module itself knows how
            logits = self.head(features)[..., ids]
        return self.logit_transform(self.text_config, logits)

    def take_head_rows(self, ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """A copy of the LM head's weight and bias at `ids`; `None` of a head that is no plain `Linear`."""
        if not has_rows(self.head):
            return None
        return self.head.weight[ids], None if self.head.bias is None else self.head.bias[ids]

    def embed(self, tokens: torch.LongTensor) -> torch.Tensor:
        return self.embedding(tokens.to(self.device))

    def _features(self, outputs, caught: list[torch.Tensor]) -> torch.Tensor:
        if not self.use_hook:
            return outputs.hidden_states[-1]
        return torch.cat(caught, dim=1)

    def _mask(self, tree: CandidateTree, shown: torch.BoolTensor, cache: ArenaCache):
        """One mask, or one per kind of layer where the model mixes kinds."""
        if self._windows is None:
            self._windows = attention_windows(self.text_config)
        dtype = next(layer.keys.dtype for layer in cache.layers if layer.is_initialized)
        masks = {
            kind: tree.attention_mask(cache.shown(shown, window), cache.columns(window), dtype, window)
            for kind, window in self._windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))


def has_rows(head: nn.Module) -> bool:
    """Whether rows of its weight can be taken: not of one that is quantised (torchao's) or split over processes."""
    return type(head) is nn.Linear and type(head.weight) in (nn.Parameter, torch.Tensor)


def attention_windows(text_config) -> dict[str, int | None]:
    """
    The sliding window (or `None`) of each kind of attention layer, as the host's own cache sees them.

    Raises:
        ValueError: a kind of layer that no tree mask can serve, two windows within one kind, or a window that the
            model's own code applies by slot (GPT-Neo).
    """
    kinds = getattr(text_config, "layer_types", None)
    layers = DynamicCache(config=text_config).layers
    hidden = [name for name in HIDDEN_WINDOWS if isinstance(getattr(text_config, name, None), int)]
    if hidden and not any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers):
        raise ValueError(f"its attention has a window ({hidden[0]}) of its own")
    if kinds is None or len(kinds) < len(layers):
        kinds = ["attention"] * max(len(layers), 1)
    windows: dict[str, int | None] = {}
    for index, kind in enumerate(kinds):
        if kind not in ("attention", "full_attention", "sliding_attention"):
            raise ValueError(f"its layers include {kind!r}")
        layer = layers[index] if index < len(layers) else None
        if layers and (layer is None or (layer.keys is None and layer.is_initialized)):
            continue  # it has no keys of its own and attends to another layer's
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        if windows.setdefault(kind, window) != window:
            raise ValueError(f"its {kind!r} layers have different windows")
    return windows


def depth_limit(depth: int, length: int, offset: int, max_length: int | None, text_config) -> int:
    """
    No deeper than tokens can still be emitted (unless `max_length` is `None`), nor past the end of a table of
    positions, and never across the length at which a dynamic or longrope model turns its frequencies.
    """
    if max_length is not None:
        depth = min(depth, max_length - length - 1)
    rope = getattr(text_config, "rope_parameters", None) or {}
    table = getattr(text_config, "max_position_embeddings", None)
    if not rope and table is not None:
        depth = min(depth, table - (length + offset))
    for parameters in [rope, *(p for p in rope.values() if isinstance(p, dict))]:
        kind = parameters.get("rope_type")
        if kind in ("dynamic", "longrope"):
            default = getattr(text_config, "original_max_position_embeddings", None)
            boundary = parameters.get("original_max_position_embeddings") or default
            room = (boundary or text_config.max_position_embeddings) - (length + offset)
            if room >= 0:
                depth = min(depth, room)
            elif kind == "dynamic":
                depth = 0
    return max(depth, 0)


def execution_device(model: PreTrainedModel) -> torch.device:
    """Where the model's inputs go; the parameters of an offloaded model stand on `meta` between forwards."""
    if model.device.type != "meta":
        return model.device
    return torch.device(getattr(getattr(model, "_hf_hook", None), "execution_device", None) or "cpu")


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether the model or its decoder was compiled in place: `.compile()`, or a compiled `forward`."""
    return any(
        module._compiled_call_impl is not None or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in (model, model.base_model, model.get_decoder())
    )


def accepts_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


# What some models do to the output of their LM head. The probe finds out which one reproduces the model's logits.
LOGIT_TRANSFORMS = {
    "identity": lambda config, logits: logits,
    "logit_scale": lambda config, logits: logits * config.logit_scale,  # Cohere
    "logits_scaling": lambda config, logits: logits / config.logits_scaling,  # Granite
    "final_logit_softcapping": lambda config, logits: (  # Gemma 2, Gemma 3
        torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    ),
}
