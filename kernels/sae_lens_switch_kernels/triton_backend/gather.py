"""Gather rows of W: sum them (sparse_decode) or dot them with a vector (matmul_at_indices).

    out[b]    = sum_j values[b, j] W[indices[b, j]]        2BKD flops, K rows of W read per token
    out[b, j] = <g[b], W[indices[b, j]]>                   the same

With offsets, row b has codes offsets[b] to offsets[b + 1] of [S] instead of K.

Both are bound by the gather. sparse_decode runs over (tokens, slices of D), tokens fastest: concurrent programs share
a slice [F, BLOCK_D] of W, which may fit in L2 when W does not. matmul_at_indices cannot split D without adding partial
sums; it runs over (tokens, groups of j), reads g[b] once per group, and reduces once.
"""

import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.indexing import n_rows
from sae_lens_switch_kernels.triton_backend.blocks import cdiv, row_block, rows_in_flight
from sae_lens_switch_kernels.triton_backend.launch import Traffic, arch_of, launch, load_row


@triton.jit
def _codes_of(offsets, b, K):
    """Where row b's codes begin, and how many there are."""
    begin = b * K
    n = K
    if offsets is not None:
        begin = tl.load(offsets + b).to(tl.int64)
        n = (tl.load(offsets + b + 1).to(tl.int64) - begin).to(tl.int32)
    return begin, n


@triton.jit
def _sparse_decode_kernel(
    values,  # [B, K]
    indices,  # [B, K]
    offsets,  # [B + 1] or None
    W,  # [F, D]
    out,  # [B, D]
    K,
    D,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, n = _codes_of(offsets, b, K)
    acc = tl.zeros([BLOCK_D], tl.float32)
    # A tile of rows, not an unrolled loop: all its loads are issued before the first is used, in the tail as well.
    for first in range(0, n, ROWS):
        j = first + tl.arange(0, ROWS)
        latent = tl.load(indices + begin + j, mask=j < n, other=0).to(tl.int64)
        value = tl.load(values + begin + j, mask=j < n, other=0.0).to(tl.float32)
        rows = load_row(W + latent[:, None] * D + d[None, :], (j < n)[:, None] & (d < D)[None, :])
        acc += tl.sum(value[:, None] * rows.to(tl.float32), 0)
    tl.store(out + b * D + d, acc.to(out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["K"])
def _matmul_at_indices_kernel(
    g,  # [B, D]
    W,  # [F, D]
    indices,  # [B, K]
    offsets,  # [B + 1] or None
    out,  # [B, K]
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_K
    begin, n = _codes_of(offsets, b, K)
    if offsets is None:
        _dots(g, W, indices, out, b, begin, first, n, D, BLOCK_K, BLOCK_D)
    else:  # rows have about as many codes as there are programs for one, and some have more
        for j in range(first, n, tl.num_programs(1) * BLOCK_K):
            _dots(g, W, indices, out, b, begin, j, n, D, BLOCK_K, BLOCK_D)


@triton.jit
def _dots(g, W, indices, out, b, begin, first, n, D, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Codes first to first + BLOCK_K of row b, which has n and begins at ``begin``."""
    j = first + tl.arange(0, BLOCK_K)
    latent = tl.load(indices + begin + j, mask=j < n, other=0).to(tl.int64)
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        g_D = load_row(g + b * D + d, d < D).to(tl.float32)
        rows = load_row(W + latent[:, None] * D + d[None, :], (j < n)[:, None] & (d < D)[None, :])
        acc += rows.to(tl.float32) * g_D[None, :]
    tl.store(out + begin + j, tl.sum(acc, 1).to(out.dtype.element_ty), mask=j < n)


def sparse_decode(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor, offsets_B1: Tensor | None = None) -> Tensor:
    """out[b] = sum_j values[b, j] W[indices[b, j]], shape [B, D], in W's dtype."""
    B, D = n_rows(indices_BK, offsets_B1), W_FD.shape[1]
    out_BD = W_FD.new_empty(B, D)
    BLOCK_D, num_warps = row_block(D, arch_of(W_FD.device).lanes)
    launch(
        _sparse_decode_kernel,
        (B, cdiv(D, BLOCK_D)),
        num_warps,
        values=values_BK.contiguous(),
        indices=indices_BK.contiguous(),
        offsets=None if offsets_B1 is None else offsets_B1.contiguous(),
        W=W_FD.contiguous(),
        out=out_BD,
        K=indices_BK.shape[-1] if offsets_B1 is None else 0,  # codes per row; the number of all codes differs by step
        D=D,
        ROWS=rows_in_flight(W_FD.itemsize),
        BLOCK_D=BLOCK_D,
    )
    return out_BD


def sparse_decode_traffic(
    B: int, K: int, F: int, D: int, itemsize: int, index_itemsize: int = 8, lanes: int = 32
) -> Traffic:
    slices = cdiv(D, row_block(D, lanes)[0])
    return Traffic(
        flops=2 * B * K * D,
        streamed=B * K * (itemsize + index_itemsize) * slices + B * D * itemsize,
        gathered=B * K * D * itemsize,
        pool=min(F, B * K) * D * itemsize,
        passes=slices,
    )


def matmul_at_indices(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, offsets_B1: Tensor | None = None) -> Tensor:
    """out[b, j] = <g[b], W[indices[b, j]]>, in the shape of the indices and g's dtype."""
    (B, D), n_codes = g_BD.shape, indices_BK.numel()
    out_BK = g_BD.new_empty(indices_BK.shape)
    BLOCK_D, num_warps = row_block(D, arch_of(W_FD.device).lanes)
    BLOCK_K = rows_in_flight(W_FD.itemsize)
    launch(
        _matmul_at_indices_kernel,
        (B, cdiv(cdiv(n_codes, max(1, B)), BLOCK_K)),
        num_warps,
        g=g_BD.contiguous(),
        W=W_FD.contiguous(),
        indices=indices_BK.contiguous(),
        offsets=None if offsets_B1 is None else offsets_B1.contiguous(),
        out=out_BK,
        K=indices_BK.shape[-1],
        D=D,
        BLOCK_K=BLOCK_K,
        BLOCK_D=BLOCK_D,
    )
    return out_BK


def matmul_at_indices_traffic(B: int, K: int, F: int, D: int, itemsize: int, index_itemsize: int = 8) -> Traffic:
    return Traffic(
        flops=2 * B * K * D,
        streamed=B * K * (itemsize + index_itemsize) + B * D * itemsize,
        gathered=B * K * D * itemsize,
        pool=min(F, B * K) * D * itemsize,
    )
