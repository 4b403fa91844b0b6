"""The frozen target as training uses it, wherever it lives: its features, its embeddings, its LM head."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from ..generation.probe import probe
from ..generation.target import LOGIT_TRANSFORMS, attention_windows, execution_device, has_rows
from .losses import SampledHead
from .packing import segment_mask, segment_positions


class TargetFeatures:
    """
    The target's features f, computed on the fly; with `keep`, each row's are held in memory (fp16) for later epochs.

    Args:
        target: the frozen target, on one device or on several.
        keep: hold rows of features: 2 * h bytes a token.
    """

    def __init__(self, target: PreTrainedModel, keep: bool = False):
        self.decoder, self.kept = target.get_decoder(), {} if keep else None
        self.text_config, self.dtype, self.device = target.config.get_text_config(), target.dtype, _entry(target)

    @torch.no_grad()
    def __call__(
        self, rows: list[int], ids: torch.LongTensor, segments: torch.LongTensor | None = None
    ) -> torch.Tensor:
        """
        Row numbers, ids and segments `[rows, length]` in, features `[rows, length, hidden]` out, on the ids' device.

        With segments no token sees another segment's, and positions start again with each.
        """
        if self.kept is None:
            return self._features(ids, segments).to(ids.device)
        missing = [i for i, row in enumerate(rows) if row not in self.kept]
        if missing:
            features = self._features(ids[missing], None if segments is None else segments[missing])
            for i, row_features in zip(missing, features, strict=True):
                self.kept[rows[i]] = row_features.to("cpu", torch.float16)
        return torch.stack([self.kept[row] for row in rows]).to(ids.device, torch.float32)

    def _features(self, ids: torch.LongTensor, segments: torch.LongTensor | None) -> torch.Tensor:
        ids = ids.to(self.device)
        if segments is None:
            return self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        segments = segments.to(self.device)
        windows = attention_windows(self.text_config)
        masks = {kind: segment_mask(segments, self.dtype, window) for kind, window in windows.items()}
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        positions = segment_positions(segments)
        return self.decoder(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state


class FrozenTarget:
    """
    The target's embedding and LM head for a draft on another device or in another dtype.

    The head is called, never read: it may be quantised, offloaded or split off by a device map.

    Args:
        target: the frozen target.
        device: the draft's.
    """

    def __init__(self, target: PreTrainedModel, device: torch.device):
        self.device, self.dtype, self.entry = device, target.dtype, _entry(target)
        self.embedding, self.lm_head = target.get_input_embeddings(), target.get_output_embeddings()
        self.head_device = module_device(self.lm_head, self.entry)
        self.text_config, self.transform_name = target.config.get_text_config(), probe(target).logit_transform
        self.transform = LOGIT_TRANSFORMS[self.transform_name]

    @torch.no_grad()
    def embed(self, ids: torch.LongTensor) -> torch.Tensor:
        """`[rows, length]` on any device in, `[rows, length, hidden]` on the draft's out."""
        return self.embedding(ids.to(self.entry)).to(self.device)

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """What the target makes of `features` (`[..., hidden]`, any device): logits, on the head's device."""
        return self.transform(self.text_config, self.lm_head(features.to(self.head_device, self.dtype)))

    def sampled_head(self, frequent_ids: torch.LongTensor, extra: int, generator: torch.Generator) -> Callable:
        """[`SampledHead`] of this target, called as [`head`]."""
        sampled = SampledHead(self.lm_head, frequent_ids, extra, generator)
        return lambda features: sampled(features.to(self.head_device, self.dtype))

    def check_sampling(self, head_sample: int) -> None:
        """`ValueError` if the head is of a kind that cannot be sampled."""
        if head_sample and (not has_rows(self.lm_head) or self.transform_name != "identity"):
            raise ValueError(
                f"head_sample={head_sample}: a sampled softmax needs a plain nn.Linear LM head that gives the logits, "
                f"this target's is {type(self.lm_head).__name__} with {self.transform_name}; use head_sample=0."
            )


def module_device(module: nn.Module, default: torch.device) -> torch.device:
    """Where a module computes; `default` if that is nowhere to be seen."""
    if (place := getattr(getattr(module, "_hf_hook", None), "execution_device", None)) is not None:
        return torch.device(place) if not isinstance(place, int) else torch.device("cuda", place)
    tensors = [*module.parameters(), *module.buffers()]
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), default)


def _entry(target: PreTrainedModel) -> torch.device:
    return module_device(target.get_input_embeddings(), execution_device(target))
