"""Same seed, same tokens, faster: FSPAD tree speculation for transformers' `generate` (arXiv 2408.15562)."""

from importlib import import_module

from .configuration_fspad import FSPADConfig
from .generation.decoding import FSPADGenerateOutput, SpeculationRecord
from .generation.exact_mode import bit_exact
from .generation.graphs import free_graphs
from .generation.hook import install, uninstall
from .modeling_fspad import FSPADDraftModel, FSPADDraftOutput
from .speculation_config import SpeculationConfig

__version__ = "0.1.0"
__all__ = [
    "FSPADConfig",
    "FSPADDraftModel",
    "FSPADDraftOutput",
    "FSPADGenerateOutput",
    "FSPADTrainer",
    "FSPADTrainingArguments",
    "SpeculationConfig",
    "SpeculationRecord",
    "bit_exact",
    "free_graphs",
    "install",
    "uninstall",
]

_TRAINING = {"FSPADTrainer": "trainer", "FSPADTrainingArguments": "arguments"}  # which need accelerate


def __getattr__(name: str):
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".training.{_TRAINING[name]}", __name__), name)


install()
