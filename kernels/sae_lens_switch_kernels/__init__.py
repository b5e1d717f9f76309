"""Sparse primitives for sparse autoencoders: tensors in, tensors out.

The suffix of a name gives a tensor's shape (``x_BD``), one letter per dimension:

    B  tokens in a step              A  aux_k, dead latents chosen per token
    D  d_in                          N  dead latents
    K  k, active latents per token   R  rows of a weight gradient: all latents, or the active ones
    F  d_sae, latents                S  B * K, the entries of a batch of codes
    E  experts                       M  F / E, latents of one expert

A file that uses another letter, or one of these otherwise, says so in its docstring. E1 and F1 are one longer than E
and F. Weights are latent-major, ``[F, D]``: a latent's encoder column and decoder row are both contiguous. Expert e
owns latents ``e * M`` to ``(e + 1) * M``, after the shared ones if there are any.
"""

from sae_lens_switch_kernels.autoencode_tensors import Reconstruction
from sae_lens_switch_kernels.backend import triton_kernel
from sae_lens_switch_kernels.candidates import EncoderPrecision
from sae_lens_switch_kernels.clipping import clip
from sae_lens_switch_kernels.counting import count_codes
from sae_lens_switch_kernels.functions import (
    batch_topk_encode,
    latent_weight_grad,
    matmul_at_indices,
    sparse_autoencode,
    sparse_decode,
    switch_encode,
    topk_encode,
)
from sae_lens_switch_kernels.huge_pages import to_huge_pages, zeros_huge
from sae_lens_switch_kernels.indexing import ExpertGroups
from sae_lens_switch_kernels.inference import threshold_encode
from sae_lens_switch_kernels.loss import reconstruction_loss
from sae_lens_switch_kernels.routing import route, router_logits, update_expert_bias, update_loads
from sae_lens_switch_kernels.row_grads import RowGrads
from sae_lens_switch_kernels.several_experts import code_gates
from sae_lens_switch_kernels.stochastic_rounding import rounded_moments
from sae_lens_switch_kernels.torch_loss import spread
from sae_lens_switch_kernels.torch_private import version_of
from sae_lens_switch_kernels.torch_routing import biased_probs
from sae_lens_switch_kernels.working_copy import WorkingCopies, working_copy

__all__ = [
    "EncoderPrecision",
    "ExpertGroups",
    "Reconstruction",
    "RowGrads",
    "WorkingCopies",
    "batch_topk_encode",
    "biased_probs",
    "clip",
    "code_gates",
    "count_codes",
    "latent_weight_grad",
    "matmul_at_indices",
    "reconstruction_loss",
    "route",
    "rounded_moments",
    "router_logits",
    "sparse_autoencode",
    "sparse_decode",
    "spread",
    "switch_encode",
    "threshold_encode",
    "to_huge_pages",
    "topk_encode",
    "triton_kernel",
    "update_expert_bias",
    "update_loads",
    "version_of",
    "working_copy",
    "zeros_huge",
]
