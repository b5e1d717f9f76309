"""Public name of ``interop.converters``: checkpoints of other libraries as SAELens SAEs."""

from sae_lens_switch.interop.converters import Converter, authors_switch, openai_topk, sparsify_topk

__all__ = ["Converter", "authors_switch", "openai_topk", "sparsify_topk"]
