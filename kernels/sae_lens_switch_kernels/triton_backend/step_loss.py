"""The loss of a training step in two launches, and its gradient in one.

The first launch adds the bias, and leaves for each of P parts of the batch the sum of squared errors, the sum of errors
per column, and mean and squared deviations of x per column, from which its spread follows exactly (Chan, Golub and
LeVeque 1983): a difference of two large numbers would lose it where activations have a large mean. The second adds up.
The bias's gradient follows from the sums of errors.

Letters: P is the number of parts, N of slices of D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels import torch_loss
from sae_lens_switch_kernels.torch_loss import Loss, LossGrads, n_parts, sum_of
from sae_lens_switch_kernels.triton_backend.blocks import cdiv, next_power_of_2
from sae_lens_switch_kernels.triton_backend.launch import Traffic, launch, load_row

_COLUMNS, _TILE = 256, 2048


@triton.jit(do_not_specialize=["B", "per_part"])
def _loss_parts_kernel(
    recon,  # [B, D]
    bias,  # [D]
    x,  # [B, D]
    out,  # [B, D]
    squares,  # [P, N]
    columns,  # [P, D]
    means,  # [P, D] or None
    deviations,  # [P, D] or None
    B,
    D,
    per_part,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    p = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    shift = tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    square = tl.zeros([BLOCK_D], tl.float32)
    column = tl.zeros([BLOCK_D], tl.float32)
    mean = tl.zeros([BLOCK_D], tl.float32)
    deviation = tl.zeros([BLOCK_D], tl.float32)
    begin = p * per_part
    end = tl.minimum(B, begin + per_part)
    for first in range(begin, end, ROWS):
        b = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (b < end)[:, None] & (d < D)[None, :]
        at = b[:, None] * D + d[None, :]
        result = load_row(recon + at, inside).to(tl.float32) + shift[None, :]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
        target = load_row(x + at, inside).to(tl.float32)
        error = tl.where(inside, result - target, 0.0)
        square += tl.sum(error * error, 0)
        column += tl.sum(error, 0)
        if means is not None:
            before = (first - begin).to(tl.float32)
            now = tl.minimum(ROWS, end - first).to(tl.float32)
            mean_now = tl.sum(target, 0) / now
            apart = tl.where(inside, target - mean_now[None, :], 0.0)
            step = mean_now - mean
            deviation += tl.sum(apart * apart, 0) + step * step * (before * now / (before + now))
            mean += step * (now / (before + now))
    tl.store(squares + p * tl.num_programs(1) + tl.program_id(1), tl.sum(square, 0))
    tl.store(columns + p * D + d, column, mask=d < D)
    if means is not None:
        tl.store(means + p * D + d, mean, mask=d < D)
        tl.store(deviations + p * D + d, deviation, mask=d < D)


@triton.jit(do_not_specialize=["n_squares", "P", "B", "per_part"])
def _loss_kernel(
    squares,  # [n_squares]
    means,  # [P, D] or None
    deviations,  # [P, D] or None
    balance,  # or None
    coefficient,
    scale,
    total,
    error,
    weighted,
    factor,
    n_squares,
    P,
    B,
    D,
    per_part,
    ON_DEVICE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n_squares, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(squares + at, mask=at < n_squares, other=0.0)
    squared = tl.sum(sums, 0) / B
    addend = 0.0
    times = 0.0
    if balance is not None:
        times = scale
        if means is not None:
            p = tl.arange(0, BLOCK_P)
            n = tl.where(p < P, tl.maximum(tl.minimum(per_part, B - p * per_part), 0), 0).to(tl.float32)
            spreads = tl.zeros([BLOCK_D], tl.float32)
            for first in range(0, D, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                inside = (p < P)[:, None] & (d < D)[None, :]
                at = p[:, None] * D + d[None, :]
                part = tl.load(means + at, mask=inside, other=0.0)
                mean = tl.sum(part * n[:, None], 0) / B
                apart = tl.where(inside, part - mean[None, :], 0.0)
                deviation = tl.load(deviations + at, mask=inside, other=0.0)
                spreads += tl.sum(deviation + n[:, None] * apart * apart, 0)
            times = tl.sum(spreads, 0) / B
        times *= tl.load(coefficient).to(tl.float32) if ON_DEVICE else coefficient
        addend = times * tl.load(balance)
    tl.store(total, squared + addend)
    tl.store(error, squared)
    tl.store(weighted, addend)
    tl.store(factor, times)


@triton.jit(do_not_specialize=["P", "B"])
def _loss_backward_kernel(
    out,  # [B, D]
    x,  # [B, D]
    columns,  # [P, D]
    factor,
    grad_out,  # [B, D] or None
    of_error,  # or None
    of_balance,  # or None
    d_out,  # [B, D]
    d_bias,  # [D]
    d_balance,
    P,
    B,
    D,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (b < B)[:, None] & (d < D)[None, :]
    at = b[:, None] * D + d[None, :]
    slope = 0.0 if of_error is None else tl.load(of_error).to(tl.float32) * 2.0 / B
    gradient = slope * (load_row(out + at, inside).to(tl.float32) - load_row(x + at, inside).to(tl.float32))
    if grad_out is not None:
        gradient += load_row(grad_out + at, inside).to(tl.float32)
    tl.store(d_out + at, gradient.to(d_out.dtype.element_ty), mask=inside)
    if tl.program_id(0) == 0:
        total = tl.zeros([BLOCK_D], tl.float32)
        for p in range(0, P):
            total += tl.load(columns + p * D + d, mask=d < D, other=0.0)
        tl.store(d_bias + d, (slope * total).to(d_bias.dtype.element_ty), mask=d < D)
        if tl.program_id(1) == 0:
            given = 0.0 if of_balance is None else tl.load(of_balance).to(tl.float32)
            tl.store(d_balance, given * tl.load(factor))


def loss(
    out_BD: Tensor,
    bias_D: Tensor,
    x_BD: Tensor,
    balance: Tensor | None,
    coefficient: float | Tensor,
    scale: float | None,
) -> Loss:
    """As torch_loss's; of a float32 reconstruction."""
    if out_BD.dtype != torch.float32 or x_BD.dtype == torch.float64:
        return torch_loss.loss(out_BD, bias_D, x_BD, balance, coefficient, scale)
    (B, D), spread = out_BD.shape, balance is not None and scale is None
    BLOCK_D, ROWS = _tile(D)
    per_part = max(1, cdiv(cdiv(B, n_parts(B)), ROWS)) * ROWS
    P, empty = n_parts(B), out_BD.new_empty
    result_BD, columns_PD, squares = empty(B, D), empty(P, D), empty(P, cdiv(D, BLOCK_D))
    spreads = {name: empty(P, D) if spread else None for name in ("means", "deviations")}
    given = {"recon": out_BD.contiguous(), "bias": bias_D.contiguous(), "x": x_BD.contiguous()}
    sizes = {"B": B, "D": D, "per_part": per_part}
    launch(
        _loss_parts_kernel,
        (P, cdiv(D, BLOCK_D)),
        4,
        **given,
        **spreads,
        **sizes,
        out=result_BD,
        squares=squares,
        columns=columns_PD,
        ROWS=ROWS,
        BLOCK_D=BLOCK_D,
    )
    total, error, weighted, factor = (empty(()) for _ in range(4))
    launch(
        _loss_kernel,
        (1,),
        8,
        squares=squares,
        **spreads,
        balance=balance,
        coefficient=coefficient if isinstance(coefficient, Tensor) else float(coefficient),
        scale=1.0 if scale is None else float(scale),
        total=total,
        error=error,
        weighted=weighted,
        factor=factor,
        n_squares=squares.numel(),
        P=P,
        **sizes,
        ON_DEVICE=isinstance(coefficient, Tensor),
        BLOCK_P=next_power_of_2(P),
        BLOCK_D=64,
        BLOCK=1024,
    )
    return Loss(result_BD, total, error, weighted, factor, columns_PD)


def loss_backward(
    out_BD: Tensor,
    x_BD: Tensor,
    factor: Tensor,
    columns_PD: Tensor,
    grad_out_BD: Tensor | None,
    grad_total: Tensor | None,
    grad_error: Tensor | None,
    grad_balance: Tensor | None,
) -> LossGrads:
    """As torch_loss's."""
    if columns_PD.numel() == 0:
        grads = grad_out_BD, grad_total, grad_error, grad_balance
        return torch_loss.loss_backward(out_BD, x_BD, factor, columns_PD, *grads)
    B, D = out_BD.shape
    BLOCK_D, ROWS = _tile(D)
    found = LossGrads(torch.empty_like(out_BD), out_BD.new_empty(D), torch.empty_like(factor))
    launch(
        _loss_backward_kernel,
        (cdiv(B, ROWS), cdiv(D, BLOCK_D)),
        4,
        out=out_BD,
        x=x_BD.contiguous(),
        columns=columns_PD,
        factor=factor,
        grad_out=None if grad_out_BD is None else grad_out_BD.contiguous(),
        of_error=sum_of(grad_total, grad_error),
        of_balance=sum_of(grad_total, grad_balance),
        d_out=found.out_BD,
        d_bias=found.bias_D,
        d_balance=found.balance,
        P=len(columns_PD),
        B=B,
        D=D,
        ROWS=ROWS,
        BLOCK_D=BLOCK_D,
    )
    return found if grad_out_BD is None else found._replace(bias_D=found.bias_D + grad_out_BD.sum(0))


def _tile(D: int) -> tuple[int, int]:
    """Columns and rows."""
    columns = min(_COLUMNS, next_power_of_2(D))
    return columns, _TILE // columns


def loss_traffic(B: int, D: int, itemsize: int) -> Traffic:
    """Two matrices read, one written; without the sums over parts of the batch."""
    return Traffic(flops=8 * B * D, streamed=3 * B * D * itemsize)


def loss_backward_traffic(B: int, D: int, itemsize: int) -> Traffic:
    return Traffic(flops=2 * B * D, streamed=3 * B * D * itemsize)
