"""How a draft speculates: settings beside its weights, as a generation config lies beside a model's."""

import difflib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from transformers.utils import cached_file

from .runtime import write_json

FILE = "speculation_config.json"
PAPER = {"tree": "fixed", "tree_depth": 6, "tree_top_k": 10, "tree_total_nodes": 59}
CPU = {"tree": "auto", "tree_depth": 6, "tree_top_k": 8, "tree_total_nodes": 31}
ROWS, CPU_ROWS = 128, 32  # nodes of all trees of a batch together
ELSE = {"cuda_graphs": False, "coupled_drafting": True}
RANGES = {"tree_depth": (1, 64), "tree_top_k": (1, 256), "tree_total_nodes": (1, 1024), "tree_lookup_tokens": (0, 256)}


@dataclass
class SpeculationConfig:
    """
    The settings of speculation; none of them changes a token. A field that is `None` is chosen at each call for the
    device that it runs on.

    Args:
        tree: "auto": each round's tree is the one, up to the size below, that promises most tokens a second, by what
            rounds have cost so far and by the paths accepted in this call; where none pays, decoding is plain.
            "fixed": every tree has the size below, so that in half precision a call repeats to the last bit.
        tree_depth: levels of the draft tree below its root.
        tree_top_k: children of a node, and nodes expanded at each level.
        tree_total_nodes: nodes verified each round, the root not counted; no more than such a tree can have.
        tree_lookup_tokens: at most so many of these nodes are tokens that followed the last time that the text ended
            as it does now (prompt lookup, Saxena 2023); by default a quarter of them, of an "auto" tree half. 0 is
            the paper's tree.
        cuda_graphs: on CUDA, record each step of a round as a graph when it is first run and replay it afterwards, so
            that the host no longer holds up the device; what cannot be recorded runs as ever.
        coupled_drafting: when sampling, let the draft see the noise of the coming draws.
    """

    tree: str | None = None
    tree_depth: int | None = None
    tree_top_k: int | None = None
    tree_total_nodes: int | None = None
    tree_lookup_tokens: int | None = None
    cuda_graphs: bool | None = None
    coupled_drafting: bool | None = None

    def __setattr__(self, name: str, value):
        if name not in self.__annotations__:
            near = difflib.get_close_matches(name, self.__annotations__, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"expected one of {list(self.__annotations__)}."
            raise AttributeError(f"SpeculationConfig has no field {name!r}: {meant}")
        if value is not None:
            _check(name, value)
        object.__setattr__(self, name, value)

    def resolved(
        self, device: torch.device | str | None = None, vocabulary: int | None = None, batch: int = 1
    ) -> "SpeculationConfig":
        """
        These settings with every field chosen.

        Args:
            device: where the target runs; `None` chooses the paper's tree, by which drafts are compared.
            vocabulary: how many tokens can be drafted.
            batch: sequences; the more there are, the fewer nodes each has, unless their number is set.
        """
        sized = any(getattr(self, name) is not None for name in ("tree_depth", "tree_top_k", "tree_total_nodes"))
        asked = self.tree == "fixed" or (sized and self.tree is None)  # for one very tree
        default = CPU if device is not None and torch.device(device).type == "cpu" and not asked else PAPER
        chosen = SpeculationConfig(**default, **ELSE).update(**asdict(self))
        chosen.tree_top_k = min(chosen.tree_top_k, vocabulary or chosen.tree_top_k)
        reach = chosen.tree_top_k + (chosen.tree_depth - 1) * chosen.tree_top_k**2
        chosen.tree_total_nodes = nodes = min(chosen.tree_total_nodes, reach)
        if batch > 1 and self.tree_total_nodes is None:
            rows = CPU_ROWS if default is CPU else ROWS
            chosen.tree_total_nodes = nodes = max(min(nodes, rows // batch - 1), 1)
        share = 0 if device is None else nodes // 2 if chosen.tree == "auto" else nodes // 4
        lookup = share if chosen.tree_lookup_tokens is None else chosen.tree_lookup_tokens
        chosen.tree_lookup_tokens = min(lookup, nodes, RANGES["tree_lookup_tokens"][1])
        return chosen

    def update(self, **settings) -> "SpeculationConfig":
        """Sets what is not `None`; returns itself."""
        for name, value in settings.items():
            if value is not None:
                setattr(self, name, value)
        return self

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes the fields that are set to `speculation_config.json`."""
        told = {name: value for name, value in asdict(self).items() if value is not None}
        write_json(Path(save_directory) / FILE, told)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **hub_kwargs) -> "SpeculationConfig":
        """
        The settings saved there; all `None` if there are none.

        Args:
            hub_kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            ValueError: the file is damaged, or a value in it is out of range.
        """
        path = cached_file(
            name_or_path, FILE, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False, **hub_kwargs,
        )  # fmt: skip
        if path is None:
            return cls()
        try:
            told = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{name: value for name, value in told.items() if name in cls.__annotations__})
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{FILE} of {str(name_or_path)!r} is unusable: {error} Correct it, or delete it for the defaults."
            ) from error


def _check(name: str, value) -> None:
    if name == "tree":
        if value not in ("auto", "fixed"):
            raise ValueError(f"tree={value!r} is unknown: expected 'auto' or 'fixed', or None to have it chosen.")
    elif name in RANGES:
        low, high = RANGES[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(
                f"{name}={value!r} makes no tree: expected an integer from {low} to {high}, or None to have it chosen."
            )
    elif not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True, False, or None to have it chosen.")


OLD_DEFAULTS = {
    "tree": "fixed", "tree_depth": 6, "tree_top_k": 10, "tree_total_nodes": 59, "tree_lookup_tokens": 0,
    "cuda_graphs": False, "coupled_drafting": True,
}  # fmt: skip


def of_old_config(settings: dict) -> SpeculationConfig:
    """From the fields that config.json held before there was a file of their own; a default was nobody's choice."""
    return SpeculationConfig(**{k: v for k, v in settings.items() if v is not None and v != OLD_DEFAULTS.get(k)})


FIELDS = tuple(field.name for field in fields(SpeculationConfig))

__all__ = ["SpeculationConfig"]
