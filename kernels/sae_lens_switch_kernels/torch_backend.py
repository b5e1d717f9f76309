"""The primitives in plain torch: the CPU path, and the fallback on every other device.

None of them makes a [B, F] tensor. They know nothing of autograd; operators.py and autoencode.py join them into
gradients. Where torch offers several routes to a result, the one taken is the fastest measured on a CPU
(benchmarks/primitives.py).

Letters beside the package's: R here counts the rows of a tile, P the latents of a tile or of a part of one.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sae_lens_switch_kernels.float8 import FLOAT8, Float8Rows, float8_operands, operands
from sae_lens_switch_kernels.huge_pages import empty_huge
from sae_lens_switch_kernels.indexing import ExpertGroups, LatentGrads, LatentIndex, expert_groups, latent_index
from sae_lens_switch_kernels.torch_adam import adam_rows, adam_tensors, lazy_adam_rows
from sae_lens_switch_kernels.torch_clipping import clip
from sae_lens_switch_kernels.torch_codes import (
    code_grads,
    count_codes,
    sorted_codes,
    sorted_rows,
    unsorted_codes,
)
from sae_lens_switch_kernels.torch_grouped import (
    gated_decode,
    gated_grads,
    grouped_decode,
    grouped_matmul_at_indices,
    grouped_weight_grad,
    grouped_weight_grads,
    offsets_of,
    row_tiles,
    tile_rows,
)
from sae_lens_switch_kernels.torch_loss import loss, loss_backward
from sae_lens_switch_kernels.torch_private import has_onednn_linear, onednn_linear
from sae_lens_switch_kernels.torch_routing import route, route_backward, update_expert_bias, update_loads
from sae_lens_switch_kernels.torch_topk import select_topk

__all__ = [
    "adam_rows",
    "adam_tensors",
    "clip",
    "code_grads",
    "count_codes",
    "expert_groups",
    "gated_decode",
    "gated_grads",
    "grouped_decode",
    "grouped_matmul_at_indices",
    "grouped_weight_grad",
    "grouped_weight_grads",
    "latent_index",
    "latent_weight_grads",
    "lazy_adam_rows",
    "loss",
    "loss_backward",
    "matmul_at_indices",
    "route",
    "route_backward",
    "select_topk",
    "sorted_codes",
    "sorted_rows",
    "sparse_decode",
    "topk_encode",
    "unsorted_codes",
    "update_expert_bias",
    "update_loads",
]

# Pre-activations are computed in tiles: enough rows for the matrix product to run at full speed, few enough latents
# that a dictionary of any width takes the same memory. On a CPU the product runs over blocks of latents that stay in
# cache with their weights, for the same reason.
_TILE_LATENTS = 1 << 15
_PRODUCT_LATENTS, _PRODUCT_ELEMENTS = 1 << 10, 1 << 20
_MANY_LATENTS, _ROWS_PER_KERNEL = 512, 16
# Gathered rows [rows, K, D] of the generic route also stay in cache.
_CHUNK_ELEMENTS = 1 << 18


def sparse_decode(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor) -> Tensor:
    """out[b] = sum_j v[b, j] W[i[b, j]] (DenseSparseMatmul): 2BKD flops, K rows of W read per token."""
    if indices_BK.numel() == 0:
        return W_FD.new_zeros(len(indices_BK), W_FD.shape[1])
    return functional.embedding_bag(indices_BK, W_FD, mode="sum", per_sample_weights=values_BK)


def matmul_at_indices(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    """out[b, j] = <g[b], W[i[b, j]]> (MatmulAtSparseIndices): 2BKD flops instead of 2BFD."""
    B, K = indices_BK.shape
    if _has_csr(g_BD):
        starts_B1 = torch.arange(B + 1) * K
        pattern = _csr(starts_B1, indices_BK.flatten(), g_BD.new_zeros(B * K), (B, len(W_FD)))
        return torch.sparse.sampled_addmm(pattern, g_BD, W_FD.T, beta=0).values().view(B, K)
    out_BK = g_BD.new_empty(B, K)
    rows = max(1, _CHUNK_ELEMENTS // max(1, K * g_BD.shape[1]))
    for start in range(0, B, rows):
        chunk = slice(start, start + rows)
        out_BK[chunk] = torch.bmm(W_FD[indices_BK[chunk]], g_BD[chunk].unsqueeze(2)).squeeze(2)
    return out_BK


def latent_weight_grads(
    index: LatentIndex, values_BK: Tensor, g_BD: Tensor, d_pre_BK: Tensor | None = None, x_BD: Tensor | None = None
) -> LatentGrads:
    """Both weight gradients over one index: 2BKD flops each instead of 2BFD, sums in the order of the index."""
    tokens_S = torch.div(index.order_S, max(1, values_BK.shape[1]), rounding_mode="floor")
    dW_dec_FD = _segment_sums(values_BK.flatten()[index.order_S], tokens_S, index.starts_F1, g_BD)
    if d_pre_BK is None or x_BD is None:
        return LatentGrads(dW_dec_FD, None, None)
    d_pre_S = d_pre_BK.flatten()[index.order_S]
    dW_enc_FD = _segment_sums(d_pre_S, tokens_S, index.starts_F1, x_BD)
    return LatentGrads(dW_dec_FD, dW_enc_FD, index.sums(d_pre_S))


def _segment_sums(values_S: Tensor, tokens_S: Tensor, starts_F1: Tensor, y_BD: Tensor) -> Tensor:
    """out[f] = sum over segment f of values[s] y[tokens[s]]."""
    n_latents, D = len(starts_F1) - 1, y_BD.shape[1]
    if not len(values_S):
        return y_BD.new_zeros(n_latents, D)
    if not _has_csr(y_BD):
        return functional.embedding_bag(tokens_S, y_BD, starts_F1[:-1], mode="sum", per_sample_weights=values_S)
    out_FD = empty_huge(n_latents, D, dtype=y_BD.dtype, device=y_BD.device)
    matrix_FB = _csr(starts_F1, tokens_S, values_S, (n_latents, len(y_BD)))
    return torch.addmm(out_FD, matrix_FB, y_BD, beta=0, out=out_FD)


def _has_csr(t: Tensor) -> bool:
    """Whether torch has compressed sparse products for it. On a CPU they come from MKL, which Arm builds lack."""
    return t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64) and torch.backends.mkl.is_available()


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():  # torch warns once per process that the layout is in beta
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def topk_encode(
    x_BD: Tensor,
    W_FD: Tensor,
    k: int,
    groups: ExpertGroups,
    bias_F: Tensor | None,
    scale_F: Tensor | None,
    dtype: torch.dtype,
    relu: bool = False,
    select: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest of (x W_e^T + bias) * scale per row: pre-activations without the scale, and indices over all F.

    2BDM flops in ``dtype``: only the block of a row's own expert is computed, one tile of rows at a time. With ``relu``
    pre-activations that are chosen, and negative, are 0. ``select`` searches a tile; default: ``select_topk``.
    """
    E, device = len(groups.offsets_E1) - 1, x_BD.device
    M = len(W_FD) // E
    values_BK = W_FD.new_empty(len(x_BD), k)
    indices_BK = torch.empty(len(x_BD), k, dtype=torch.long, device=device)
    # Several experts share a tile, and one search, where they differ in nothing but their weights.
    alone = E == 1 or M > _TILE_LATENTS or bias_F is not None or scale_F is not None
    rows = tile_rows(device)
    offsets = offsets_of(groups, len(x_BD))
    # In low precision, the whole of W is converted once: less than half of it is then read once per tile.
    float8 = float8_operands(x_BD, W_FD) if dtype == FLOAT8 else None
    x, W = operands(x_BD, W_FD, dtype) if float8 is None else float8
    product_dtype = torch.bfloat16 if dtype == FLOAT8 else dtype
    buffer = empty_huge(min(rows, len(x_BD)), min(M, _TILE_LATENTS), dtype=product_dtype, device=device)
    for tile in row_tiles(offsets, rows, alone):
        low, high, expert = tile[0].start, tile[-1].end, tile[0].expert
        found = []
        for part in range(0, M, _TILE_LATENTS):
            width = min(M - part, _TILE_LATENTS)
            pre_RP = buffer[: high - low, :width]
            for e, start, end in tile:
                block = slice(e * M + part, e * M + part + width)
                _product(x[start:end], W[block], pre_RP[start - low : end - low])
            block = slice(expert * M + part, expert * M + part + width)
            bias, scale = (None if t is None else t[block] for t in (bias_F, scale_F))
            values, indices = (select or select_topk)(pre_RP, min(k, width), bias, scale)
            found.append((values.to(W_FD.dtype), indices.add_(part)))
        scale = None if scale_F is None else scale_F[expert * M : (expert + 1) * M]
        values_BK[low:high], indices_BK[low:high] = found[0] if len(found) == 1 else _best(found, k, scale)
    values_BK = values_BK.relu_() if relu else values_BK
    return values_BK, indices_BK if E == 1 else indices_BK.add_(groups.first_latents(len(x_BD), len(W_FD)))


def _product(x_RD: Tensor | Float8Rows, W_PD: Tensor | Float8Rows, out_RP: Tensor) -> None:
    if isinstance(x_RD, Float8Rows) or isinstance(W_PD, Float8Rows):
        assert isinstance(x_RD, Float8Rows)
        assert isinstance(W_PD, Float8Rows)
        out_RP.copy_(x_RD.times(W_PD))
        return
    if len(W_PD) >= _MANY_LATENTS and x_RD.dtype == torch.float32 and has_onednn_linear(x_RD.device):
        # MKL, behind torch.mm, copies the weights first, which does not pay for the few rows of a tile. oneDNN compiles
        # one kernel per number of rows, so that number is rounded up.
        padded_RD = functional.pad(x_RD, (0, 0, 0, -len(x_RD) % _ROWS_PER_KERNEL))
        block = max(_PRODUCT_LATENTS, _PRODUCT_ELEMENTS // max(len(padded_RD), 1))
        for low in range(0, len(W_PD), block):
            part_RP = onednn_linear(padded_RD, W_PD[low : low + block])
            out_RP[:, low : low + block].copy_(part_RP[: len(x_RD)])
        return
    # oneDNN's products in 16 bits find their own blocks.
    block = _PRODUCT_LATENTS if x_RD.device.type == "cpu" and x_RD.dtype.itemsize > 2 else len(W_PD)
    for low in range(0, len(W_PD), block):
        torch.mm(x_RD, W_PD[low : low + block].T, out=out_RP[:, low : low + block])


def _best(found: list[tuple[Tensor, Tensor]], k: int, scale_F: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k best overall, which are among the k best of each part."""
    values, indices = (torch.cat(t, dim=1) for t in zip(*found, strict=True))
    best_RK = (values if scale_F is None else values * scale_F[indices]).topk(k, dim=1, sorted=False).indices
    return values.gather(1, best_RK), indices.gather(1, best_RK)
