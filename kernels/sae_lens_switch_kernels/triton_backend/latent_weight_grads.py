"""Sums over the tokens of each latent: both weight gradients and the gradient of the encoder bias in one walk.

    dW_dec[f] = sum values[b, j] g[b]
    dW_enc[f] = sum d_pre[b, j] x[b]
    d_b_enc[f] = sum d_pre[b, j]             over all (b, j) of latent f

One program owns a latent and a slice of D, and stores its rows whole: no atomics, no zero-fill, nothing that depends
on the order in which programs run. A latent that fires on thousands of tokens would keep one program walking long
after all others are done, so entries past its first PIECE are summed PIECE at a time by programs of their own, into
scratch rows that the owner adds in order.

Codes [S] whose number varies by row say which row each is of; with L levels, x has one row for L rows of g.

Where the pieces are, without asking the device: a piece that is not its latent's first begins PIECE entries or more
after the latent does, so the latent also owns the multiple of PIECE at or below the piece's begin, and no two
pieces share that multiple. Row p of scratch therefore belongs to the latent that owns position (p + 1) * PIECE.

Letters beside the package's: P is the number of scratch rows, one per piece.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.indexing import CodeRows, LatentGrads, LatentIndex
from sae_lens_switch_kernels.triton_backend.blocks import cdiv, row_block, rows_in_flight
from sae_lens_switch_kernels.triton_backend.launch import Traffic, arch_of, launch, load_row

PIECE = 64


@triton.jit
def _sum_entries(
    order,
    values,
    row_of,
    g,
    d_pre,
    x,
    begin,
    end,
    d,
    D,
    multiplier,  # see reciprocal
    shift,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over entries begin to end of the index, ROWS rows in flight at a time."""
    dec = tl.zeros([BLOCK_D], tl.float32)
    enc = tl.zeros([BLOCK_D], tl.float32)
    bias = tl.full([], 0.0, tl.float32)
    for first in range(begin, end, ROWS):
        entry = first + tl.arange(0, ROWS)
        live = entry < end
        position = tl.load(order + entry, mask=live, other=0).to(tl.int64)
        value = tl.load(values + position, mask=live, other=0.0).to(tl.float32)
        row = position * multiplier >> shift
        if row_of is not None:
            row = tl.load(row_of + position, mask=live, other=0).to(tl.int64)
        rows = row[:, None] * D + d[None, :]
        mask = live[:, None] & (d < D)[None, :]
        dec += tl.sum(value[:, None] * load_row(g + rows, mask).to(tl.float32), 0)
        if d_pre is not None:
            slope = tl.load(d_pre + position, mask=live, other=0.0).to(tl.float32)
            if L > 1:
                rows = (row // L)[:, None] * D + d[None, :]
            enc += tl.sum(slope[:, None] * load_row(x + rows, mask).to(tl.float32), 0)
            bias += tl.sum(slope, 0)
    return dec, enc, bias


@triton.jit(do_not_specialize=["multiplier", "shift", "F"])
def _latent_weight_grads_pieces_kernel(
    order,  # [S]
    starts,  # [F + 1]
    values,  # [B, K]
    row_of,  # [S] or None
    g,  # [B, D]
    d_pre,  # [B, K] or None
    x,  # [B, D] or None
    part_dec,  # [P, D]
    part_enc,  # [P, D] or None
    part_bias,  # [P] or None
    F,
    D,
    multiplier,
    shift,
    L: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64)
    # The latent that owns position (p + 1) * PIECE: the last that starts at or before it.
    low = p * 0
    high = low + F
    while low < high:
        middle = (low + high + 1) // 2
        starts_later = tl.load(starts + middle).to(tl.int64) > (p + 1) * PIECE
        low, high = tl.where(starts_later, low, middle), tl.where(starts_later, middle - 1, high)
    f = low
    start = tl.load(starts + f).to(tl.int64)
    end = tl.load(starts + f + 1).to(tl.int64)
    begin = start + ((p + 1) * PIECE - start + PIECE - 1) // PIECE * PIECE
    if (begin == start) | (begin >= end):
        return
    end = tl.minimum(end, begin + PIECE)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dec, enc, bias = _sum_entries(
        order, values, row_of, g, d_pre, x, begin, end, d, D, multiplier, shift, L, ROWS, BLOCK_D
    )
    tl.store(part_dec + p * D + d, dec, mask=d < D)
    if d_pre is not None:
        tl.store(part_enc + p * D + d, enc, mask=d < D)
        if tl.program_id(1) == 0:
            tl.store(part_bias + p, bias)


@triton.jit(do_not_specialize=["multiplier", "shift"])
def _latent_weight_grads_kernel(
    order,  # [S]
    starts,  # [F + 1]
    values,  # [B, K]
    row_of,  # [S] or None
    g,  # [B, D]
    d_pre,  # [B, K] or None
    x,  # [B, D] or None
    part_dec,  # [P, D]
    part_enc,  # [P, D] or None
    part_bias,  # [P] or None
    dW_dec,  # [F, D]
    dW_enc,  # [F, D] or None
    d_b_enc,  # [F] or None
    D,
    multiplier,
    shift,
    L: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(starts + f).to(tl.int64)
    end = tl.load(starts + f + 1).to(tl.int64)
    first_end = tl.minimum(end, start + PIECE)
    dec, enc, bias = _sum_entries(
        order, values, row_of, g, d_pre, x, start, first_end, d, D, multiplier, shift, L, ROWS, BLOCK_D
    )
    first_part = start // PIECE
    end_part = first_part + tl.maximum(end - start - 1, 0) // PIECE
    for first in range(first_part, end_part, ROWS):
        p = first + tl.arange(0, ROWS)
        rows = p[:, None] * D + d[None, :]
        mask = (p < end_part)[:, None] & (d < D)[None, :]
        if d_pre is not None:  # before the rows: behind them, the compiler spills registers on sm_90
            bias += tl.sum(tl.load(part_bias + p, mask=p < end_part, other=0.0), 0)
        dec += tl.sum(load_row(part_dec + rows, mask), 0)
        if d_pre is not None:
            enc += tl.sum(load_row(part_enc + rows, mask), 0)
    tl.store(dW_dec + f * D + d, dec.to(dW_dec.dtype.element_ty), mask=d < D)
    if d_pre is not None:
        tl.store(dW_enc + f * D + d, enc.to(dW_enc.dtype.element_ty), mask=d < D)
        if tl.program_id(1) == 0:
            tl.store(d_b_enc + f, bias.to(d_b_enc.dtype.element_ty))


def reciprocal(K: int) -> tuple[int, int]:
    """Multiplier and shift: position // K is position * multiplier >> shift, of positions below 2^31.

    As fast as by a constant, and no K is compiled for: with AuxK it is the number of dead latents if those are few.
    """
    shift = 31 + (K - 1).bit_length()
    return cdiv(1 << shift, K), shift


def latent_weight_grads(
    index: LatentIndex,
    values_BK: Tensor,
    g_BD: Tensor,
    d_pre_BK: Tensor | None = None,
    x_BD: Tensor | None = None,
    rows: CodeRows | None = None,
) -> LatentGrads:
    """dW_dec [F, D]; also dW_enc [F, D] and d_b_enc [F] if d_pre and x are given. In g's dtype.

    The same bits on every run: each sum has one fixed order.
    """
    if d_pre_BK is not None and x_BD is not None and x_BD.shape[1] != g_BD.shape[1]:
        return _in_two_walks(index, values_BK, g_BD, d_pre_BK, x_BD, rows)
    D, F = g_BD.shape[1], len(index.starts_F1) - 1
    multiplier, shift = reciprocal(max(1, values_BK.shape[-1]))  # where there is nothing to divide, K may be 0
    n_pieces = max(0, values_BK.numel() - 1) // PIECE
    encoder = d_pre_BK is not None and x_BD is not None
    BLOCK_D, num_warps = row_block(D, arch_of(g_BD.device).lanes, max_warps=4)
    slices = cdiv(D, BLOCK_D)

    def rows_of(n: int, dtype: torch.dtype) -> LatentGrads:
        """For n latents or pieces."""
        return LatentGrads(
            g_BD.new_empty(n, D, dtype=dtype),
            g_BD.new_empty(n, D, dtype=dtype) if encoder else None,
            g_BD.new_empty(n, dtype=dtype) if encoder else None,
        )

    out, parts = rows_of(F, g_BD.dtype), rows_of(n_pieces, torch.float32)
    arguments = {
        "order": index.order_S.contiguous(),
        "starts": index.starts_F1.contiguous(),
        "values": values_BK.contiguous(),
        "row_of": None if rows is None else rows.row_S.contiguous(),
        "g": g_BD.contiguous(),
        "d_pre": d_pre_BK.contiguous() if d_pre_BK is not None and encoder else None,
        "x": x_BD.contiguous() if x_BD is not None and encoder else None,
        "part_dec": parts.dW_dec_FD,
        "part_enc": parts.dW_enc_FD,
        "part_bias": parts.d_b_enc_F,
        "D": D,
        "multiplier": multiplier,
        "shift": shift,
        "L": 1 if rows is None else rows.n_levels,
        "PIECE": PIECE,
        "ROWS": rows_in_flight(g_BD.itemsize) // 2,  # rows of g and of x at a time
        "BLOCK_D": BLOCK_D,
    }
    if n_pieces:
        launch(_latent_weight_grads_pieces_kernel, (n_pieces, slices), num_warps, F=F, **arguments)
    results = {"dW_dec": out.dW_dec_FD, "dW_enc": out.dW_enc_FD, "d_b_enc": out.d_b_enc_F}
    launch(_latent_weight_grads_kernel, (F, slices), num_warps, **results, **arguments)
    return out


def _in_two_walks(
    index: LatentIndex, values_BK: Tensor, g_BD: Tensor, d_pre_BK: Tensor, x_BD: Tensor, rows: CodeRows | None
) -> LatentGrads:
    """Of g and x of different widths, as a transcoder's are."""
    of_tokens = None if rows is None else CodeRows(rows.offsets_B1, rows.row_S // rows.n_levels, 1)
    dW_dec_FD = latent_weight_grads(index, values_BK, g_BD, rows=rows).dW_dec_FD
    dW_enc_FD = latent_weight_grads(index, d_pre_BK, x_BD, rows=of_tokens).dW_dec_FD
    return LatentGrads(dW_dec_FD, dW_enc_FD, index.sums(d_pre_BK.flatten()[index.order_S]))


def latent_weight_grads_traffic(
    B: int, K: int, F: int, D: int, itemsize: int, encoder: bool = True, lanes: int = 32
) -> Traffic:
    """Without the scratch rows: the data decides how many there are, at most BK / 64."""
    sums = 2 if encoder else 1
    slices = cdiv(D, row_block(D, lanes, max_warps=4)[0])
    index = 8 * B * K + 8 * (F + 1)
    return Traffic(
        flops=sums * 2 * B * K * D,
        streamed=(index + sums * B * K * itemsize) * slices + sums * F * D * itemsize + (sums - 1) * F * itemsize,
        gathered=sums * B * K * D * itemsize,
        pool=sums * min(B, B * K) * D * itemsize,
        passes=slices,
    )
