"""The frozen target as training reads it: its features and its likeliest tokens, made on the fly or kept in files."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..generation.probe import probe
from ..generation.target import attention_windows, execution_device
from .data import TrainingRows
from .packing import segment_mask, segment_positions
from .shards import ShardFolder

TOP_K = 64  # of the target's tokens, whose probabilities the draft is aligned with
LOGITS_AT_ONCE = 1 << 26  # a quarter of a gigabyte in float32, several times
LOGITS_AT_ONCE_CPU = 1 << 22  # 16 MB, which malloc uses again; larger blocks come from the kernel, zeroed, each time
SHARD_ROWS = 64
ROWS_AT_ONCE = 8
TOKENS_AT_ONCE_CPU = 1024  # in place of 8 rows, for the reason of LOGITS_AT_ONCE_CPU


@dataclass
class TargetOutputs:
    """
    What a draft learns from.

    Args:
        features (`[rows, length, hidden]`): what the target's LM head reads.
        top_ids (`[rows, length, k]`): its likeliest next tokens, the first one first ...
        top_log_probs (`[rows, length, k]`): ... and their log-probabilities; both mean something where the loss
            counts a position, and nowhere else.
    """

    features: torch.Tensor
    top_ids: torch.LongTensor
    top_log_probs: torch.Tensor

    def to(self, *args, **kwargs) -> "TargetOutputs":
        return TargetOutputs(*(getattr(self, field.name).to(*args, **kwargs) for field in fields(self)))


class FrozenTarget:
    """
    The target beside a draft on another device or in another dtype. Its modules are called, never read: they may be
    quantised, offloaded or split off by a device map.

    Args:
        target: on one device or on several.
        device: the draft's; by default where the target's inputs go.
        top_k: how many of its likeliest tokens are read; all of a smaller vocabulary.
    """

    def __init__(self, target: PreTrainedModel, device: torch.device | None = None, top_k: int = TOP_K):
        self.model, self.view = target, probe(target).view(target)
        self.view.chooses_products = False  # by time, and so another run would round otherwise
        self.input_device = module_device(target.get_input_embeddings(), execution_device(target))
        self.head_device = module_device(self.view.head, self.input_device)
        self.device = self.input_device if device is None else device
        self.top_k = min(top_k, self.view.text_config.vocab_size)

    @torch.no_grad()
    def embed(self, ids: torch.LongTensor) -> torch.Tensor:
        """`[rows, length]` on any device in, `[rows, length, hidden]` on the draft's out."""
        return self.view.embedding(ids.to(self.input_device)).to(self.device)

    def logits(self, features: torch.Tensor, ids: torch.LongTensor | None = None) -> torch.Tensor:
        """
        What the target makes of `features` (`[..., hidden]`, any device): logits, on its head's device.

        Args:
            ids (`[drafted]`): only these columns, the same ones throughout; `None` is the whole vocabulary.
        """
        return self.view.draft_logits(
            features.to(self.head_device, self.model.dtype), None if ids is None else ids.to(self.head_device)
        )

    @torch.no_grad()
    def features(self, ids: torch.LongTensor, segments: torch.LongTensor | None = None) -> torch.Tensor:
        """
        Ids `[rows, length]` in, features `[rows, length, hidden]` out, on the draft's device.

        Args:
            segments (`[rows, length]`): the document of each token: none sees another's, and positions start again.
        """
        decoder, inputs = self.model.get_decoder(), {"input_ids": ids.to(self.input_device)}
        if segments is not None:
            segments = segments.to(self.input_device)
            windows = attention_windows(self.view.text_config)
            masks = {kind: segment_mask(segments, self.model.dtype, window) for kind, window in windows.items()}
            inputs["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
            inputs["position_ids"] = segment_positions(segments)
        return decoder(**inputs, use_cache=False).last_hidden_state.to(self.device)

    @torch.no_grad()
    def __call__(
        self, ids: torch.LongTensor, counted: torch.BoolTensor, segments: torch.LongTensor | None = None
    ) -> TargetOutputs:
        """
        What the target makes of rows.

        Args:
            counted (`[rows, length]`): True where its likeliest tokens are wanted.
        """
        return self.outputs(self.features(ids, segments), counted)

    @torch.no_grad()
    def outputs(self, features: torch.Tensor, counted: torch.BoolTensor) -> TargetOutputs:
        """Features `[rows, length, hidden]`, and beside them the likeliest tokens where they count, else zeros."""
        top_ids = torch.zeros(*counted.shape, self.top_k, dtype=torch.long, device=features.device)
        top_log_probs = torch.zeros(top_ids.shape, device=features.device)
        places = counted.to(features.device).nonzero(as_tuple=True)
        at_once = positions_at_once(self.head_device, self.view.text_config.vocab_size)
        for some in zip(*(index.split(at_once) for index in places), strict=True):
            logits = self.logits(features[some]).float()
            values, tokens = logits.topk(self.top_k, dim=-1)
            peak = values[:, :1]
            values = values - peak - logits.sub_(peak).exp_().sum(-1, keepdim=True).log()
            top_ids[some], top_log_probs[some] = tokens.to(top_ids.device), values.to(top_ids.device)
        return TargetOutputs(features, top_ids, top_log_probs)


def positions_at_once(device: torch.device, logits: int) -> int:
    """How many positions, each of `logits` logits, are worked on together on `device`."""
    return max((LOGITS_AT_ONCE_CPU if device.type == "cpu" else LOGITS_AT_ONCE) // logits, 1)


class KeptOutputs:
    """
    A target's outputs of rows of text, made once: about 2 h + 6 k bytes a token, in memory or in a folder.

    A folder is filled shard by shard: an interrupted call goes on where it stood, and what is there is checked against
    target and rows.

    Args:
        folder: of safetensors files, which are mapped into memory as rows are read; `None`: in memory.

    Raises:
        ValueError: the folder holds something else, or outputs of another target or of other rows.
    """

    def __init__(self, frozen: FrozenTarget, rows: TrainingRows, folder: str | Path | None = None):
        self.frozen, self.rows = frozen, rows
        self.starts = range(0, len(rows), SHARD_ROWS)
        self.shards: list[dict[str, torch.Tensor]] = []  # in memory
        self.files: dict[int, object] = {}  # open ones, by shard
        self.folder = None if folder is None else ShardFolder(folder, self._settings(), "outputs", ".safetensors")
        for number in range(self.made if folder is not None else 0):
            self._check(number)

    @property
    def made(self) -> int:
        """How many shards there are; `len(starts)` are wanted."""
        return len(self.shards if self.folder is None else self.folder.shards[: len(self.starts)])

    def fill(
        self, report: Callable[[], None] = lambda: None, first: int | None = None, write: bool = True
    ) -> "KeptOutputs":
        """
        Makes what is missing; `report` is called after each shard.

        Args:
            first: the number of the first shard to make; by default the first that is not there.
            write: False: only read the target, as the processes must that hold a part of it.
        """
        on_cpu, length = self.frozen.input_device.type == "cpu", self.rows.ids.shape[1]
        at_once = max(TOKENS_AT_ONCE_CPU // length, 1) if on_cpu else ROWS_AT_ONCE
        for number in range(self.made if first is None else first, len(self.starts)):
            rows = self._rows(number)
            parts = [self._outputs(rows[i : i + at_once]) for i in range(0, len(rows), at_once)]
            if not write:
                continue
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            if self.folder is None:
                self.shards.append(tensors)
            else:
                self.folder.add(save(tensors), {"rows": len(rows)}, rows_sha256=rows.sha256())
            report()
        return self

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """The [`TargetOutputs`] of one row, by name, without the dimension of rows."""
        number, place = divmod(row, SHARD_ROWS)
        if self.folder is None:
            return {name: tensor[place] for name, tensor in self.shards[number].items()}
        if number not in self.files:
            self.files[number] = safe_open(self.folder.path / self.folder.name(number), "pt")
        return {field.name: self.files[number].get_slice(field.name)[place] for field in fields(TargetOutputs)}

    def __getstate__(self) -> dict:
        """For the workers of a data loader, which open the files themselves."""
        return {**self.__dict__, "files": {}, "frozen": None}

    def _rows(self, number: int) -> TrainingRows:
        return self.rows[self.starts[number] : self.starts[number] + SHARD_ROWS]

    def _outputs(self, rows: TrainingRows) -> dict[str, torch.Tensor]:
        found = self.frozen(rows.ids, rows.mask, rows.segments)
        features = found.features.half() if found.features.dtype == torch.float32 else found.features
        parts = (features, found.top_ids.int(), found.top_log_probs.half())
        return {field.name: part.cpu() for field, part in zip(fields(TargetOutputs), parts, strict=True)}

    def _settings(self) -> dict:
        model = self.frozen.model
        return {
            "target": Path(model.name_or_path).name or type(model).__name__,
            "target_sha256": _fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "top_k": self.frozen.top_k,
        }

    def _check(self, number: int) -> None:
        shard, file = self.folder.shards[number], self.folder.path / self.folder.name(number)
        rows = self._rows(number)
        if shard["rows_sha256"] != rows.sha256():
            raise ValueError(
                f"{str(file)!r} was made from other rows than number {self.starts[number]} and on of this data: "
                "repeat the first data, or name another folder."
            )
        try:
            with safe_open(file, "pt") as found:
                assert found.get_slice("features").get_shape()[0] == len(rows)
        except (OSError, SafetensorError, AssertionError) as error:
            raise ValueError(
                f"{str(file)!r} is damaged or missing ({error}): delete the folder, and it is made anew."
            ) from error


def shard_layers(target: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """
    Splits the weights of the target's layers over the processes of a launch, by torch's FSDP2: each holds a part of
    every layer, and gathers a layer while it runs. Embedding, norms and LM head stay whole. From then on all processes
    must run the target together.

    Args:
        device: of this process; the weights go there layer by layer.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layers in (child for child in target.get_decoder().children() if isinstance(child, nn.ModuleList)):
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    return target.to(device)


def is_sharded(target: PreTrainedModel) -> bool:
    return any(isinstance(module, FSDPModule) for module in target.modules())


def _fingerprint(model: PreTrainedModel) -> str:
    """Of the beginning of every weight that is in memory: a fine-tuned target has another one."""
    digest = sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        if weight.device.type != "meta":
            weight = weight.detach()
            weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
            digest.update(weight.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def module_device(module: nn.Module, default: torch.device) -> torch.device:
    """Where a module computes; `default` if that is nowhere to be seen."""
    if (place := getattr(getattr(module, "_hf_hook", None), "execution_device", None)) is not None:
        return torch.device(place) if not isinstance(place, int) else torch.device("cuda", place)
    tensors = [*module.parameters(), *module.buffers()]
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), default)
