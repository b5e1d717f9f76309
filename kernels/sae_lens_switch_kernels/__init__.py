"""Sparse primitives for sparse autoencoders: tensors in, tensors out.

One meaning per letter, here and in every file of the project:

    B  tokens in a step           F  d_sae, latents
    D  d_in                       E  experts
    K  k, active latents a token  M  F / E, latents of one expert

A suffix on a name gives a tensor's shape (``x_BD``). Weights are latent-major, ``[F, D]``: a latent's
encoder column and decoder row are both contiguous. Expert e owns latents ``e * M`` to ``(e + 1) * M``.
"""

from sae_lens_switch_kernels.functions import (
    Reconstruction,
    latent_weight_grad,
    matmul_at_indices,
    sparse_autoencode,
    sparse_decode,
    switch_encode,
    topk_encode,
)
from sae_lens_switch_kernels.indexing import RowGrads

__all__ = [
    "Reconstruction",
    "RowGrads",
    "latent_weight_grad",
    "matmul_at_indices",
    "sparse_autoencode",
    "sparse_decode",
    "switch_encode",
    "topk_encode",
]
