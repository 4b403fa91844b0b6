"""Same seed, same tokens, faster: FSPAD tree speculation for transformers' `generate` (arXiv 2408.15562)."""

from .configuration_fspad import FSPADConfig
from .generation.decoding import FSPADGenerateOutput, SpeculationRecord
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
    "SpeculationConfig",
    "SpeculationRecord",
    "free_graphs",
    "install",
    "uninstall",
]

install()
