"""Public name of ``interop.converters``: checkpoints of other libraries as SAELens SAEs."""

from sae_lens_switch.interop.converters import Converter

__all__ = ["Converter"]
