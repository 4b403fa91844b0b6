"""Public EAGLE, EAGLE-2 and FSPAD checkpoints as [`FSPADDraftModel`]s."""

from .convert import Conversion, convert_checkpoint

__all__ = ["Conversion", "convert_checkpoint"]
