"""Matrix products with one weight matrix per expert; rows are sorted, expert e owns offsets[e]:offsets[e + 1].

    grouped_encode:       out[r] = x[r] W_e^T       2BDM flops instead of the 2BDF of all experts
    grouped_decode:       out[r] = a[r] W_e
    grouped_weight_grad:  dW_e   = a_e^T g_e

Tiles of rows never straddle experts, so no row is computed for an expert it does not belong to. Only the device knows
how many tiles an expert has; programs are launched for the largest possible number, cdiv(B, rows) + E - 1, and find
their tile themselves: tile i of expert e is number offsets[e] // rows + e + i, a different number for every tile, since
an expert's last tile begins before offsets[e + 1].

Hopper's wide tensor-core instruction multiplies 64 rows at a time. An expert with fewer tokens than that fills it with
its latents instead: the product is computed transposed.

Letters beside the package's: C is the summed dimension of a product, N the columns of its result, R the rows of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.indexing import LatentGrads
from sae_lens_switch_kernels.triton_backend.blocks import cdiv, gemm_blocks, next_power_of_2, swaps
from sae_lens_switch_kernels.triton_backend.grouped_library import library_encode
from sae_lens_switch_kernels.triton_backend.launch import Traffic, arch_of, launch, load_row


@triton.jit
def _grouped_matmul_kernel(
    a,  # [B, C]
    W,  # [E * M, D]: C = D and N = M if TRANSPOSED, else C = M and N = D
    offsets,  # [E + 1]
    order,  # [B] or None
    out,  # [B, N], row r at order[r]
    E,
    C,
    N,
    TRANSPOSED: tl.constexpr,
    SWAPPED: tl.constexpr,  # out^T = W a^T
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n_tiles = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // n_tiles
    experts = tl.arange(0, BLOCK_E)
    first_tiles = tl.load(offsets + experts, mask=experts < E, other=0).to(tl.int32) // BLOCK_R + experts
    e = tl.max(tl.where((first_tiles <= tile) & (experts < E), experts, 0), 0)
    start = tl.load(offsets + e).to(tl.int32)
    end = tl.load(offsets + e + 1).to(tl.int32)
    start += (tile - start // BLOCK_R - e) * BLOCK_R
    if start >= end:
        return

    r = start.to(tl.int64) + tl.arange(0, BLOCK_R)
    n = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    W += tl.cast(e, tl.int64) * C * N
    acc = tl.zeros([BLOCK_N, BLOCK_R] if SWAPPED else [BLOCK_R, BLOCK_N], tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        a_RC = load_row(a + r[:, None] * C + c[None, :], (r < end)[:, None] & (c < C)[None, :])
        if TRANSPOSED:
            w_CN = tl.trans(load_row(W + n[:, None].to(tl.int64) * C + c[None, :], (n < N)[:, None] & (c < C)[None, :]))
        else:
            w_CN = load_row(W + c[:, None].to(tl.int64) * N + n[None, :], (c < C)[:, None] & (n < N)[None, :])
        if SWAPPED:
            acc = tl.dot(tl.trans(w_CN), tl.trans(a_RC), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a_RC, w_CN, acc, input_precision=PRECISION)
    if SWAPPED:
        acc = tl.trans(acc)
    to = r
    if order is not None:
        to = tl.load(order + r, mask=r < end, other=0).to(tl.int64)
    tl.store(out + to[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), (r < end)[:, None] & (n < N)[None, :])


@triton.jit
def _grouped_weight_grad_kernel(
    a,  # [B, M]
    g,  # [B, D]
    more_a,  # [B, M] or None
    more_g,  # [B, D] or None
    offsets,  # [E + 1]
    out,  # [E * M, D]
    more_out,  # [E * M, D] or None
    sums,  # [E * M] or None, of more_a
    M,
    D,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    m_tiles = tl.cdiv(M, BLOCK_M)
    d_tiles = tl.cdiv(D, BLOCK_D)
    e = tl.program_id(0) // (m_tiles * d_tiles)
    m = tl.program_id(0) // d_tiles % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % d_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(offsets + e).to(tl.int64)
    end = tl.load(offsets + e + 1).to(tl.int64)
    if more_a is not None:  # noqa: SIM102, Triton decides the outer one as it compiles
        if tl.program_id(1) == 1:
            a, g, out = more_a, more_g, more_out
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    summed = tl.zeros([BLOCK_M], tl.float32)
    for first in range(start, end, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        a_RM = load_row(a + r[:, None] * M + m[None, :], (r < end)[:, None] & (m < M)[None, :])
        g_RD = load_row(g + r[:, None] * D + d[None, :], (r < end)[:, None] & (d < D)[None, :])
        acc = tl.dot(tl.trans(a_RM), g_RD, acc, input_precision=PRECISION)
        if sums is not None:
            summed += tl.sum(a_RM.to(tl.float32), 0)
    rows = e.to(tl.int64) * M + m
    tl.store(out + rows[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), (m < M)[:, None] & (d < D)[None, :])
    if sums is not None:  # noqa: SIM102
        if (tl.program_id(1) == 1) & (tl.program_id(0) % d_tiles == 0):
            tl.store(sums + rows, summed.to(sums.dtype.element_ty), m < M)


def grouped_encode(x_BD: Tensor, W_FD: Tensor, offsets_E1: Tensor) -> Tensor:
    """out[r] = x[r] W_e^T, shape [B, M], for the expert e that owns row r."""
    found = library_encode(x_BD, W_FD, offsets_E1)
    return _grouped_matmul(x_BD, W_FD, offsets_E1, transposed=True) if found is None else found


def grouped_decode(
    a_BM: Tensor, W_FD: Tensor, offsets_E1: Tensor, order_B: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """out[order[r]] = a[r] W_e, shape [B, D], for the expert e that owns row r; in ``dtype``, or that of a."""
    return _grouped_matmul(a_BM, W_FD, offsets_E1, False, order_B, dtype)


def _grouped_matmul(
    a_BC: Tensor,
    W_FD: Tensor,
    offsets_E1: Tensor,
    transposed: bool,
    order_B: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    B, C = a_BC.shape
    E = len(offsets_E1) - 1
    N = len(W_FD) // E if transposed else W_FD.shape[1]
    out_BN = a_BC.new_empty(B, N, dtype=dtype or a_BC.dtype)
    precision = _dot_precision(a_BC, inner_contiguous=transposed)
    # Tiles of half an expert's average load: few are nearly empty because an expert has a few rows too many.
    blocks = gemm_blocks(
        cdiv(B, 2 * E),
        N,
        a_BC.dtype,
        arch_of(a_BC.device),
        tf32=precision != "ieee",
        in_parts=precision == "tf32x3",
        inner_contiguous=transposed,
    )
    tiles = cdiv(B, blocks.rows) + E - 1 if B else 0
    on_tensor_cores = a_BC.dtype.itemsize == 2 or (precision == "tf32" and transposed)
    launch(
        _grouped_matmul_kernel,
        (tiles * cdiv(N, blocks.columns),),
        blocks.num_warps,
        blocks.num_stages,
        a=a_BC.contiguous(),
        W=W_FD.contiguous(),
        offsets=offsets_E1.contiguous(),
        order=order_B,
        out=out_BN,
        E=E,
        C=C,
        N=N,
        TRANSPOSED=transposed,
        SWAPPED=on_tensor_cores and swaps(blocks, arch_of(a_BC.device)),
        PRECISION=precision,
        BLOCK_E=next_power_of_2(E),
        BLOCK_R=blocks.rows,
        BLOCK_N=blocks.columns,
        BLOCK_C=blocks.inner,
    )
    return out_BN


def grouped_weight_grad(a_BM: Tensor, g_BD: Tensor, offsets_E1: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """dW_e = a_e^T g_e, shape [F, D], in ``dtype``, or that of g; zero for an expert without rows."""
    return _grouped_weight_grads(a_BM, g_BD, None, None, offsets_E1, dtype or g_BD.dtype)[0]


def grouped_weight_grads(
    a_BM: Tensor, g_BD: Tensor, more_a_BM: Tensor, more_g_BD: Tensor, offsets_E1: Tensor, dtype: torch.dtype
) -> LatentGrads:
    """Two such products in one launch, and the sum of each column of ``more_a``."""
    return LatentGrads(*_grouped_weight_grads(a_BM, g_BD, more_a_BM, more_g_BD, offsets_E1, dtype))


def _grouped_weight_grads(
    a_BM: Tensor,
    g_BD: Tensor,
    more_a_BM: Tensor | None,
    more_g_BD: Tensor | None,
    offsets_E1: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    M, D, E = a_BM.shape[1], g_BD.shape[1], len(offsets_E1) - 1
    twice = more_a_BM is not None and more_g_BD is not None
    out_FD = g_BD.new_empty(E * M, D, dtype=dtype)
    more_out_FD = torch.empty_like(out_FD) if twice else None
    sums_F = out_FD.new_empty(E * M) if twice else None
    precision = _precision(g_BD)
    blocks = gemm_blocks(M, D, g_BD.dtype, arch_of(g_BD.device), tf32=precision == "tf32")
    launch(
        _grouped_weight_grad_kernel,
        (E * cdiv(M, blocks.rows) * cdiv(D, blocks.columns), 2 if twice else 1),
        blocks.num_warps,
        blocks.num_stages,
        a=a_BM.contiguous(),
        g=g_BD.contiguous(),
        more_a=more_a_BM.contiguous() if more_a_BM is not None and twice else None,
        more_g=more_g_BD.contiguous() if more_g_BD is not None and twice else None,
        offsets=offsets_E1.contiguous(),
        out=out_FD,
        more_out=more_out_FD,
        sums=sums_F,
        M=M,
        D=D,
        PRECISION=precision,
        BLOCK_M=blocks.rows,
        BLOCK_D=blocks.columns,
        BLOCK_R=blocks.inner,
    )
    return out_FD, more_out_FD, sums_F


def _dot_precision(t: Tensor, inner_contiguous: bool) -> str:
    """How tensor cores multiply.

    They cannot multiply plain float32; three products of TF32 parts are as exact but for the last bits. On an H200 that
    makes an encoder's product seven times as fast, but one whose operands are not contiguous along the sum slower. It
    needs the shared memory of NVIDIA's GPUs from Ampere on.
    """
    precision, arch = _precision(t), arch_of(t.device)
    in_parts = inner_contiguous and arch.lanes == 32 and arch.shared > 100_000
    return "tf32x3" if precision == "ieee" and t.dtype == torch.float32 and in_parts else precision


def _precision(t: Tensor) -> str:
    """How torch's own matrix products treat float32; without meaning for other dtypes."""
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9, allow_tf32 raises once its successor has been set.
    setting = getattr(matmul, "fp32_precision", "none")
    tf32 = matmul.allow_tf32 if setting == "none" else setting == "tf32"
    return "tf32" if tf32 and t.dtype == torch.float32 else "ieee"


def grouped_traffic(B: int, D: int, M: int, E: int, itemsize: int) -> Traffic:
    """Of any of the three: each reads or writes rows of D, rows of M and the weights of every expert."""
    return Traffic(flops=2 * B * D * M, streamed=(B * D + B * M + E * M * D) * itemsize + 8 * (E + 1))
