"""The primitives on Triton, under the names of torch_backend. Imported lazily, on the first use of a GPU.

Each is a launcher, or a launcher between a few small torch operations; none synchronises with the device.
"""

import torch
from torch import Tensor

from sae_lens_switch_kernels import torch_backend
from sae_lens_switch_kernels.indexing import ExpertGroups
from sae_lens_switch_kernels.triton_backend.adam import adam_rows, lazy_adam_rows
from sae_lens_switch_kernels.triton_backend.gather import matmul_at_indices, sparse_decode
from sae_lens_switch_kernels.triton_backend.grouped_matmul import grouped_decode as decode_dense
from sae_lens_switch_kernels.triton_backend.grouped_matmul import grouped_encode as encode_dense
from sae_lens_switch_kernels.triton_backend.grouped_matmul import grouped_weight_grad as weight_grad_dense
from sae_lens_switch_kernels.triton_backend.latent_weight_grads import latent_weight_grads
from sae_lens_switch_kernels.triton_backend.select_topk import select_topk
from sae_lens_switch_kernels.working_copy import working_copy

__all__ = [
    "adam_rows",
    "grouped_decode",
    "grouped_matmul_at_indices",
    "grouped_weight_grad",
    "latent_weight_grads",
    "lazy_adam_rows",
    "matmul_at_indices",
    "sparse_decode",
    "topk_encode",
]


def topk_encode(
    x_BD: Tensor,
    W_FD: Tensor,
    k: int,
    groups: ExpertGroups,
    bias_F: Tensor | None,
    scale_F: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """With one expert, select_topk over tiles of torch's own matrix product; with several, one grouped product."""
    if len(groups.offsets_E1) == 2 or bias_F is not None or scale_F is not None:
        return torch_backend.topk_encode(x_BD, W_FD, k, groups, bias_F, scale_F, dtype, select_topk)
    pre_BM = encode_dense(x_BD.to(dtype), working_copy(W_FD, dtype), groups.offsets_E1)
    values_BK, indices_BK = select_topk(pre_BM, k)
    return values_BK.to(W_FD.dtype), indices_BK + torch_backend.first_latents(groups, len(x_BD), len(W_FD))


def grouped_decode(
    values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor, groups: ExpertGroups, dtype: torch.dtype
) -> Tensor:
    acts_BM = _dense_in_expert(values_BK, indices_BK, len(W_FD), groups, dtype)
    return decode_dense(acts_BM, working_copy(W_FD, dtype), groups.offsets_E1).to(W_FD.dtype)


def grouped_matmul_at_indices(
    g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, groups: ExpertGroups, dtype: torch.dtype
) -> Tensor:
    out_BM = encode_dense(g_BD.to(dtype), working_copy(W_FD, dtype), groups.offsets_E1)
    return out_BM.gather(1, indices_BK - torch_backend.first_latents(groups, len(g_BD), len(W_FD))).to(g_BD.dtype)


def grouped_weight_grad(
    values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_latents: int, groups: ExpertGroups, dtype: torch.dtype
) -> Tensor:
    acts_BM = _dense_in_expert(values_BK, indices_BK, n_latents, groups, dtype)
    return weight_grad_dense(acts_BM, g_BD.to(dtype), groups.offsets_E1, g_BD.dtype)


def _dense_in_expert(
    values_BK: Tensor, indices_BK: Tensor, n_latents: int, groups: ExpertGroups, dtype: torch.dtype
) -> Tensor:
    """[B, M], each row's codes among the latents of its own expert."""
    M = n_latents // (len(groups.offsets_E1) - 1)
    local_BK = indices_BK - torch_backend.first_latents(groups, len(values_BK), n_latents)
    return values_BK.new_zeros(len(values_BK), M, dtype=dtype).scatter_add_(1, local_BK, values_BK.to(dtype))
