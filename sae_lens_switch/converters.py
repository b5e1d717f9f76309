"""Public names: SAEs of other libraries, and SAEs with weights in several files, for SAELens's ``converter=``."""

from sae_lens_switch.interop.converters import Converter, authors_switch, openai_topk, sparsify_topk
from sae_lens_switch.saes.weight_files import sharded_safetensors

__all__ = ["Converter", "authors_switch", "openai_topk", "sharded_safetensors", "sparsify_topk"]
