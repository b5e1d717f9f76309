"""Dense products within each expert in plain torch: primitives like those of torch_backend.

Letters beside the package's: R here counts the rows of a tile.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sae_lens_switch_kernels.huge_pages import empty_huge
from sae_lens_switch_kernels.indexing import ExpertGroups, LatentGrads
from sae_lens_switch_kernels.torch_codes import code_grads, latent_sums, sorted_codes, sorted_rows, unsorted_codes
from sae_lens_switch_kernels.torch_tiles import (
    group_offsets,
    pre_activation_tiles,
    product_dtype,
    row_tiles,
    tile_rows,
)
from sae_lens_switch_kernels.working_copy import working_copy


def grouped_encode(x_BD: Tensor, W_FD: Tensor, groups: ExpertGroups, dtype: torch.dtype) -> Tensor:
    """The product of each row with all latents of its own expert, [B, M]: 2BMD flops in ``dtype``, rows sorted."""
    out_BM = W_FD.new_empty(len(x_BD), len(W_FD) // (len(groups.offsets_E1) - 1), dtype=product_dtype(dtype))
    for tile in pre_activation_tiles(x_BD, W_FD, groups, dtype, alone=True):
        start = tile.latents.start - tile.expert * out_BM.shape[1]
        out_BM[tile.rows, start : start + tile.pre_RP.shape[1]] = tile.pre_RP
    return out_BM


def grouped_decode(
    values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor, groups: ExpertGroups, dtype: torch.dtype
) -> Tensor:
    """sparse_decode as one dense product per expert, 2BMD flops: faster while M / K is small.

    Codes are sorted by expert, as everywhere; what they decode to is in the order of the tokens.
    """
    out_BD = W_FD.new_empty(len(values_BK), W_FD.shape[1])
    for block, tile, buffer_RM in _tiles(len(values_BK), len(W_FD), groups, dtype):
        acts_RM = _scatter(buffer_RM, values_BK[tile], indices_BK[tile] - block.start)
        _mm(out_BD[tile], acts_RM, working_copy(W_FD[block], dtype))
    return groups.unsorted(out_BD)


def grouped_matmul_at_indices(
    g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, groups: ExpertGroups, dtype: torch.dtype
) -> Tensor:
    """matmul_at_indices as one dense product per expert."""
    out_BK = g_BD.new_empty(indices_BK.shape)
    for block, tile, buffer_RM in _tiles(len(g_BD), len(W_FD), groups, dtype):
        torch.mm(g_BD[tile].to(dtype), working_copy(W_FD[block], dtype).T, out=buffer_RM)
        out_BK[tile] = buffer_RM.gather(1, indices_BK[tile] - block.start)
    return out_BK


def grouped_weight_grad(
    values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_latents: int, groups: ExpertGroups, dtype: torch.dtype
) -> Tensor:
    """latent_weight_grad as one dense product per expert."""
    grad_FD = empty_huge(n_latents, g_BD.shape[1], dtype=g_BD.dtype, device=g_BD.device)
    written = 0
    for block, tile, buffer_RM in _tiles(len(g_BD), n_latents, groups, dtype):
        acts_RM = _scatter(buffer_RM, values_BK[tile], indices_BK[tile] - block.start)
        g_RD = g_BD[tile].to(dtype)
        if block.stop > written:  # the first tile of this expert
            grad_FD[written : block.start] = 0  # experts without tokens
            _mm(grad_FD[block], acts_RM.T, g_RD)
            written = block.stop
        elif dtype == grad_FD.dtype:
            grad_FD[block].addmm_(acts_RM.T, g_RD)
        else:
            grad_FD[block] += acts_RM.T @ g_RD
    grad_FD[written:] = 0
    return grad_FD


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
    """latent_weight_grads as two dense products per expert; in the dtype of the values."""
    return LatentGrads(
        grouped_weight_grad(values_BK, indices_BK, g_BD, n_latents, groups, dtype),
        grouped_weight_grad(d_pre_BK, indices_BK, x_BD, n_latents, groups, dtype),
        latent_sums(d_pre_BK, indices_BK, n_latents),
    )


def gated_decode(
    values_BK: Tensor,
    indices_BK: Tensor,
    gates_B: Tensor | None,
    W_FD: Tensor,
    groups: ExpertGroups,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grouped_decode of values times gates; these, values and indices, in the order of the tokens."""
    sorted_acts_BK, acts_BK, values_BK, unsorted_BK = unsorted_codes(values_BK, indices_BK, gates_B, groups)
    return grouped_decode(sorted_acts_BK, indices_BK, W_FD, groups, dtype), acts_BK, values_BK, unsorted_BK


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
    """The backward pass of an expert's encoder, ReLU, gate and decoder ``W_FD``, by dense products.

    All tensors are in the order of the tokens. Returns dW_dec, dW_enc, the gradients of the encoder's bias and of the
    gates, and x - bias, rows sorted by expert.
    """
    acts_BK, values_BK, indices_BK = sorted_codes(values_BK, indices_BK, gates_B, groups)
    g_BD, centered_BD = sorted_rows(grad_out_BD, None, groups, dtype), sorted_rows(x_BD, bias_D, groups, dtype)
    d_acts_BK = grouped_matmul_at_indices(g_BD, W_FD, indices_BK, groups, dtype)
    d_pre_BK, d_gates_B = code_grads(values_BK, d_acts_BK, gates_B, grad_values_BK, groups)
    codes = acts_BK, indices_BK, g_BD, d_pre_BK, centered_BD
    dW_dec_FD, dW_enc_FD, d_bias_F = grouped_weight_grads(*codes, len(W_FD), groups, dtype)
    assert dW_enc_FD is not None
    assert d_bias_F is not None
    return dW_dec_FD, dW_enc_FD, d_bias_F, d_gates_B, centered_BD


def _tiles(
    n_tokens: int, n_latents: int, groups: ExpertGroups, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Each expert's latents with each tile of its rows, and a buffer [rows, M] that all tiles share."""
    device = groups.offsets_E1.device
    M = n_latents // (len(groups.offsets_E1) - 1)
    rows = tile_rows(device)
    buffer = empty_huge(min(rows, n_tokens), M, dtype=dtype, device=device)
    for (tile,) in row_tiles(group_offsets(groups, n_tokens), rows, alone=True):
        block, own_rows = slice(tile.expert * M, (tile.expert + 1) * M), slice(tile.start, tile.end)
        yield block, own_rows, buffer[: tile.end - tile.start]


def _scatter(buffer_RM: Tensor, values_RK: Tensor, indices_RK: Tensor) -> Tensor:
    return buffer_RM.zero_().scatter_add_(1, indices_RK, values_RK.to(buffer_RM.dtype))


def _mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
