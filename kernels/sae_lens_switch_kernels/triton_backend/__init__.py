"""The primitives on Triton, under the names of torch_backend. Imported lazily, on the first use of a GPU.

Each is a launcher, or a launcher between a few small torch operations; none but codes_above, which only inference
needs, synchronises with the device.
"""

import torch
from torch import Tensor

from sae_lens_switch_kernels import torch_backend
from sae_lens_switch_kernels.float8 import operands
from sae_lens_switch_kernels.indexing import ExpertGroups, LatentGrads
from sae_lens_switch_kernels.triton_backend.adam import adam_rows, lazy_adam_rows
from sae_lens_switch_kernels.triton_backend.adam_tensors import adam_tensors
from sae_lens_switch_kernels.triton_backend.clipping import clip
from sae_lens_switch_kernels.triton_backend.code_rows import (
    code_grads,
    dense_rows,
    sorted_codes,
    sorted_row_pair,
    sorted_rows,
    take_in_rows,
    unsorted_codes,
)
from sae_lens_switch_kernels.triton_backend.codes_above import codes_above
from sae_lens_switch_kernels.triton_backend.count_codes import count_codes
from sae_lens_switch_kernels.triton_backend.counting_sort import expert_groups, latent_index
from sae_lens_switch_kernels.triton_backend.gated_codes import gated_row_grads, gated_rows
from sae_lens_switch_kernels.triton_backend.gather import matmul_at_indices, sparse_decode
from sae_lens_switch_kernels.triton_backend.grouped_matmul import grouped_decode as decode_dense
from sae_lens_switch_kernels.triton_backend.grouped_matmul import grouped_encode as encode_dense
from sae_lens_switch_kernels.triton_backend.grouped_matmul import grouped_weight_grads as weight_grads_dense
from sae_lens_switch_kernels.triton_backend.latent_weight_grads import latent_weight_grads
from sae_lens_switch_kernels.triton_backend.routing import route, route_backward, update_expert_bias, update_loads
from sae_lens_switch_kernels.triton_backend.select_topk import select_topk
from sae_lens_switch_kernels.triton_backend.step_loss import loss, loss_backward
from sae_lens_switch_kernels.working_copy import working_copy

__all__ = [
    "adam_rows",
    "adam_tensors",
    "clip",
    "code_grads",
    "codes_above",
    "count_codes",
    "expert_groups",
    "gated_decode",
    "gated_grads",
    "grouped_decode",
    "grouped_encode",
    "grouped_matmul_at_indices",
    "grouped_weight_grads",
    "latent_index",
    "latent_weight_grads",
    "lazy_adam_rows",
    "loss",
    "loss_backward",
    "matmul_at_indices",
    "route",
    "route_backward",
    "sorted_codes",
    "sorted_rows",
    "sparse_decode",
    "topk_encode",
    "unsorted_codes",
    "update_expert_bias",
    "update_loads",
]


def topk_encode(
    x_BD: Tensor,
    W_FD: Tensor,
    k: int,
    groups: ExpertGroups,
    bias_F: Tensor | None,
    scale_F: Tensor | None,
    dtype: torch.dtype,
    relu: bool = False,
    by_magnitude: bool = False,
) -> tuple[Tensor, Tensor]:
    """With one expert, select_topk over tiles of torch's own matrix product; with several, one grouped product."""
    if len(groups.offsets_E1) == 2:
        return torch_backend.topk_encode(x_BD, W_FD, k, groups, bias_F, scale_F, dtype, relu, by_magnitude, select_topk)
    pre_BM = grouped_encode(x_BD, W_FD, groups, dtype)
    if bias_F is not None:
        pre_BM = pre_BM.float() + _of_owners(bias_F, groups, len(x_BD))
    if scale_F is None:
        return select_topk(pre_BM, k, groups=groups, dtype=W_FD.dtype, relu=relu, by_magnitude=by_magnitude)
    ranked_BM = pre_BM.float() * _of_owners(scale_F, groups, len(x_BD))
    _, places_BK = select_topk(ranked_BM, k, by_magnitude=by_magnitude)
    values_BK = pre_BM.gather(1, places_BK).to(W_FD.dtype)
    indices_BK = places_BK + groups.first_latents(len(x_BD), len(W_FD))
    return values_BK.relu_() if relu else values_BK, indices_BK


def _of_owners(t_F: Tensor, groups: ExpertGroups, n_rows: int) -> Tensor:
    """[B, M], of each sorted row what the latents of its expert have."""
    return t_F.reshape(len(groups.offsets_E1) - 1, -1)[groups.owners(n_rows)]


def grouped_encode(x_BD: Tensor, W_FD: Tensor, groups: ExpertGroups, dtype: torch.dtype) -> Tensor:
    return encode_dense(*operands(x_BD, W_FD, dtype), groups.offsets_E1)


def grouped_decode(
    values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor, groups: ExpertGroups, dtype: torch.dtype
) -> Tensor:
    (acts_BM,) = dense_rows(values_BK, indices_BK, len(W_FD), groups.offsets_E1, dtype)
    return decode_dense(acts_BM, working_copy(W_FD, dtype), groups.offsets_E1, groups.order_B, W_FD.dtype)


def grouped_matmul_at_indices(
    g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, groups: ExpertGroups, dtype: torch.dtype
) -> Tensor:
    out_BM = encode_dense(g_BD.to(dtype), working_copy(W_FD, dtype), groups.offsets_E1)
    return take_in_rows(out_BM, indices_BK, groups.offsets_E1, W_FD.dtype)


def gated_decode(
    values_BK: Tensor,
    indices_BK: Tensor,
    gates_B: Tensor | None,
    W_FD: Tensor,
    groups: ExpertGroups,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acts_BM, acts_BK, values_BK, indices_BK = gated_rows(values_BK, indices_BK, gates_B, len(W_FD), groups, dtype)
    out_BD = decode_dense(acts_BM, working_copy(W_FD, dtype), groups.offsets_E1, groups.order_B, W_FD.dtype)
    return out_BD, acts_BK, values_BK, indices_BK


def gated_grads(
    values_BK: Tensor,
    indices_BK: Tensor,
    gates_B: Tensor | None,
    grad_values_BK: Tensor | None,
    grad_out_BD: Tensor,
    x_BD: Tensor,
    bias_D: Tensor | None,
    W_FD: Tensor,
    groups: ExpertGroups,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    g_BD, centered_BD = sorted_row_pair(grad_out_BD, x_BD, bias_D, groups, dtype)
    dots_BM = encode_dense(g_BD, working_copy(W_FD, dtype), groups.offsets_E1)
    gated = values_BK, indices_BK, gates_B, grad_values_BK
    acts_BM, d_pre_BM, d_gates_B = gated_row_grads(*gated, dots_BM, groups)
    found = weight_grads_dense(acts_BM, g_BD, d_pre_BM, centered_BD, groups.offsets_E1, values_BK.dtype)
    dW_dec_FD, dW_enc_FD, d_bias_F = found
    assert dW_enc_FD is not None
    assert d_bias_F is not None
    return dW_dec_FD, dW_enc_FD, d_bias_F, d_gates_B, centered_BD


def grouped_weight_grads(
    values_BK: Tensor,
    indices_BK: Tensor,
    g_BD: Tensor,
    d_pre_BK: Tensor,
    x_BD: Tensor,
    n_latents: int,
    groups: ExpertGroups,
    dtype: torch.dtype,
) -> LatentGrads:
    offsets_E1 = groups.offsets_E1
    acts_BM, d_pre_BM = dense_rows(values_BK, indices_BK, n_latents, offsets_E1, dtype, d_pre_BK)
    return weight_grads_dense(acts_BM, g_BD.to(dtype), d_pre_BM, x_BD.to(dtype), offsets_E1, values_BK.dtype)
