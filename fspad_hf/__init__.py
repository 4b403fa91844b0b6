from .configuration_fspad import FSPADConfig
from .modeling_fspad import FSPADDraftModel, FSPADDraftOutput

__version__ = "0.1.0"
