"""The primitives in plain torch: the CPU path, and the fallback on every other device.

None of them makes a [B, F] tensor. They know nothing of autograd; operators.py and autoencode.py join them into
gradients. Where torch offers several routes to a result, the one taken is the fastest measured on a CPU
(benchmarks/primitives.py).

Letters beside the package's: R here counts the rows of a tile, P the latents of a part of one.
"""

import warnings

import torch
from torch import Tensor
from torch.nn import functional

from sae_lens_switch_kernels.huge_pages import empty_huge
from sae_lens_switch_kernels.indexing import (
    CodeRows,
    LatentGrads,
    LatentIndex,
    code_rows,
    expert_groups,
    latent_index,
    n_rows,
)
from sae_lens_switch_kernels.torch_adam import adam_rows, adam_tensors, lazy_adam_rows
from sae_lens_switch_kernels.torch_clipping import clip
from sae_lens_switch_kernels.torch_codes import (
    code_grads,
    codes_above,
    count_codes,
    sorted_codes,
    sorted_rows,
    unsorted_codes,
)
from sae_lens_switch_kernels.torch_grouped import (
    gated_decode,
    gated_grads,
    grouped_decode,
    grouped_encode,
    grouped_matmul_at_indices,
    grouped_weight_grad,
    grouped_weight_grads,
)
from sae_lens_switch_kernels.torch_loss import loss, loss_backward
from sae_lens_switch_kernels.torch_private import bag_dots, has_bag_dots
from sae_lens_switch_kernels.torch_routing import route, route_backward, update_expert_bias, update_loads
from sae_lens_switch_kernels.torch_topk import select_topk, topk_encode

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

# Gathered rows [rows, K, D] of the generic route also stay in cache.
_CHUNK_ELEMENTS = 1 << 18


def sparse_decode(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor, offsets_B1: Tensor | None = None) -> Tensor:
    """out[b] = sum_j v[b, j] W[i[b, j]] (DenseSparseMatmul): 2SD flops, a row of W read per code.

    With offsets, codes are [S]: token b's begin at offsets[b] and end at offsets[b + 1].
    """
    if indices_BK.numel() == 0:
        return W_FD.new_zeros(n_rows(indices_BK, offsets_B1), W_FD.shape[1])
    varies = offsets_B1 is not None
    return functional.embedding_bag(
        indices_BK,
        W_FD,
        offsets_B1.to(indices_BK.dtype) if varies else None,
        mode="sum",
        per_sample_weights=values_BK,
        include_last_offset=varies,
    )


def matmul_at_indices(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, offsets_B1: Tensor | None = None) -> Tensor:
    """out[b, j] = <g[b], W[i[b, j]]> (MatmulAtSparseIndices): 2SD flops instead of 2BFD; offsets as above."""
    if has_bag_dots(W_FD):
        n, dtype = indices_BK.numel(), indices_BK.dtype
        if offsets_B1 is None:
            rows_S = torch.arange(len(g_BD), dtype=dtype).repeat_interleave(indices_BK.shape[1], output_size=n)
        else:
            rows_S = code_rows(offsets_B1, n).row_S.to(dtype)
        return bag_dots(g_BD, W_FD, indices_BK.flatten(), rows_S).view(indices_BK.shape)
    if offsets_B1 is not None:  # the same with one code per row
        g_BD, indices_BK = g_BD[code_rows(offsets_B1, len(indices_BK)).row_S], indices_BK.unsqueeze(1)
    out_BK = g_BD.new_empty(indices_BK.shape)
    rows = max(1, _CHUNK_ELEMENTS // max(1, indices_BK.shape[1] * g_BD.shape[1]))
    for start in range(0, len(g_BD), rows):
        chunk = slice(start, start + rows)
        out_BK[chunk] = torch.bmm(W_FD[indices_BK[chunk]], g_BD[chunk].unsqueeze(2)).squeeze(2)
    return out_BK if offsets_B1 is None else out_BK.squeeze(1)


def latent_weight_grads(
    index: LatentIndex,
    values_BK: Tensor,
    g_BD: Tensor,
    d_pre_BK: Tensor | None = None,
    x_BD: Tensor | None = None,
    rows: CodeRows | None = None,
) -> LatentGrads:
    """Both weight gradients over one index: 2SD flops each instead of 2BFD, sums in the order of the index.

    With rows, codes are [S] and g has a vector per row: per token, or per level of each token.
    """
    if rows is None:
        tokens_S = rows_S = torch.div(index.order_S, max(1, values_BK.shape[1]), rounding_mode="floor")
    else:
        rows_S = rows.row_S[index.order_S]
        tokens_S = rows_S if rows.n_levels == 1 else torch.div(rows_S, rows.n_levels, rounding_mode="floor")
    dW_dec_FD = _segment_sums(values_BK.flatten()[index.order_S], rows_S, index.starts_F1, g_BD)
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
