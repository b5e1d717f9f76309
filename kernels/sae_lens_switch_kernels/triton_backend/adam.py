"""Adam over rows of a matrix in one pass: projection, step and renormalisation of a row while it is in registers.

Gradient, weight and both moments are read once, weight and moments written once: 28 bytes per float32 weight, 20 with
moments in bfloat16, and two more for a copy in bfloat16. A row too wide for registers is looped over instead; what is
read again then comes from cache. Without a constraint rows of a whole matrix mean nothing, and it is one line of
numbers.

Dense Adam steps all rows by one count of steps; lazy Adam steps some, each by its own, and reads their gradients from a
matrix of those rows alone. Both are one kernel.

Letters: D, F and R as in the package.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.triton_backend.blocks import cdiv, next_power_of_2
from sae_lens_switch_kernels.triton_backend.launch import Traffic, arch_of, launch, load_row

_WIDEST_IN_REGISTERS = 4096
_LOOPED = 1024  # numbers of a wider row at a time; with more, ptxas spills registers of all options together (sm_80)
_TILE = 1024  # numbers per program where rows mean nothing
_PER_LANE, _MAX_THREADS = 8, 512  # of each of four tensors


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, without the cancellation near 0 that would spoil the first steps' bias correction."""
    series = 1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8)))
    series = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * series))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def step_sizes(t, lr, log_beta1, log_beta2, LR_ON_DEVICE: tl.constexpr):
    """Step size, and the root of the second moment's correction, of step number t."""
    rate = tl.load(lr) if LR_ON_DEVICE else lr
    return rate / _one_minus_exp(t * log_beta1), tl.sqrt(_one_minus_exp(t * log_beta2))


@triton.jit
def _load_tile(W, grad, exp_avg, exp_avg_sq, w_at, g_at, m_at, inside):
    return (
        load_row(W + w_at, inside),
        load_row(grad + g_at, inside).to(tl.float32),
        load_row(exp_avg + m_at, inside).to(tl.float32),
        load_row(exp_avg_sq + m_at, inside).to(tl.float32),
    )


@triton.jit
def _store_weights(W, copy, at, w, inside):
    tl.store(W + at, w, mask=inside)
    if copy is not None:
        tl.store(copy + at, w.to(copy.dtype.element_ty), mask=inside)


@triton.jit
def _random_bits(place, t):
    """As stochastic_rounding.random_bits; unsigned."""
    x = place.to(tl.uint32) * 0x9E3779B1 + t.to(tl.int32).to(tl.uint32) * 0x85EBCA77
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _rounded(x, bits):
    return ((x.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _store_moments(exp_avg, exp_avg_sq, m_at, m, v, w_at, t, inside):
    """Rounded stochastically if they are kept in bfloat16."""
    if exp_avg.dtype.element_ty == tl.bfloat16:
        bits = _random_bits(w_at, t)
        m, v = _rounded(m, bits & 0xFFFF), _rounded(v, bits >> 16)
    tl.store(exp_avg + m_at, m.to(exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + m_at, v.to(exp_avg_sq.dtype.element_ty), mask=inside)


@triton.jit
def adam_number(w, g, m, v, step_size, root, beta1, beta2, rest1, rest2, eps):
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return w - step_size * m / (tl.sqrt(v) / root + eps), m, v


@triton.jit
def _to_unit(squares):
    """What a row is multiplied by. A row of unit norm, up to rounding, and a row of zeros stay as they are."""
    norm = tl.sqrt_rn(squares)
    inverse = 1.0 / tl.maximum(norm, 1.1754943508222875e-38)
    return tl.where(tl.abs(norm - 1.0) <= 8 * 1.1920928955078125e-07, 1.0, inverse)


@triton.jit(do_not_specialize=["n_rows"])
def _adam_rows_kernel(
    W,  # [F, D]
    copy,  # [F, D] or None
    grad,  # [F, D], or [R, D] of the rows
    exp_avg,  # [F, D]
    exp_avg_sq,  # [F, D]
    rows,  # [R] or None: all
    radial,  # [F] or [R], or None
    step,  # this step's number; with rows, [F]: how many steps each row has taken
    lr,
    grad_scale,
    found_inf,
    log_beta1,
    log_beta2,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    n_rows,  # F or R
    D,
    last,  # numbers in the last row
    moments_stride,  # from row to row
    LR_ON_DEVICE: tl.constexpr,
    PROJECT: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    f = r if rows is None else tl.load(rows + r).to(tl.int64)
    t = tl.load(step) if rows is None else tl.load(step + f) + 1.0
    step_size, root = step_sizes(t, lr, log_beta1, log_beta2, LR_ON_DEVICE)
    scale = 1.0 if grad_scale is None else tl.load(grad_scale)
    width = tl.where(r < n_rows - 1, D, last)
    if found_inf is not None:
        width = tl.where(tl.load(found_inf) == 0, width, 0)
    d = tl.arange(0, BLOCK_D)
    w_at, g_at, m_at = f * D + d, r * D + d, f * moments_stride + d
    along = 0.0
    if PROJECT and radial is not None:
        along = tl.load(radial + r)
    if not WIDE:
        w, g, m, v = _load_tile(W, grad, exp_avg, exp_avg_sq, w_at, g_at, m_at, d < width)
        if PROJECT:
            along = tl.sum(g * w, 0) if radial is None else along
            g -= along * w
        w, m, v = adam_number(w, g / scale, m, v, step_size, root, beta1, beta2, rest1, rest2, eps)
        if UNIT:
            w *= _to_unit(tl.sum(tl.where(d < width, w * w, 0.0), 0))
        _store_weights(W, copy, w_at, w, d < width)
        _store_moments(exp_avg, exp_avg_sq, m_at, m, v, w_at, t, d < width)
    else:
        if PROJECT and radial is None:
            dots = tl.zeros([BLOCK_D], tl.float32)
            for start in range(0, width, BLOCK_D):
                inside = start + d < width
                g = load_row(grad + g_at + start, inside).to(tl.float32)
                dots += load_row(W + w_at + start, inside) * g
            along = tl.sum(dots, 0)
        squares = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, width, BLOCK_D):
            inside = start + d < width
            w, g, m, v = _load_tile(W, grad, exp_avg, exp_avg_sq, w_at + start, g_at + start, m_at + start, inside)
            if PROJECT:
                g -= along * w
            w, m, v = adam_number(w, g / scale, m, v, step_size, root, beta1, beta2, rest1, rest2, eps)
            if UNIT:
                squares += tl.where(inside, w * w, 0.0)
                tl.store(W + w_at + start, w, mask=inside)
            else:
                _store_weights(W, copy, w_at + start, w, inside)
            _store_moments(exp_avg, exp_avg_sq, m_at + start, m, v, w_at + start, t, inside)
        if UNIT:
            factor = _to_unit(tl.sum(squares, 0))
            tl.debug_barrier()  # the row that other threads have just written is read
            for start in range(0, width, BLOCK_D):
                inside = start + d < width
                _store_weights(W, copy, w_at + start, load_row(W + w_at + start, inside) * factor, inside)
    if rows is not None:
        tl.debug_barrier()  # all threads have read the count
        tl.store(step + f, t)


def adam_rows(
    W_FD: Tensor,
    grad_FD: Tensor,
    m_FD: Tensor,
    v_FD: Tensor,
    step: Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    radial_F: Tensor | None = None,
    unit_rows: bool = False,
    project: bool = False,
    copy_FD: Tensor | None = None,
) -> None:
    """As torch_backend's; everything but copy and moments float32, the matrices contiguous."""
    by_row = unit_rows or project
    if not W_FD.numel():
        return
    n_rows, width = W_FD.shape if by_row else (cdiv(W_FD.numel(), _TILE), _TILE)
    _launch(
        *(W_FD, copy_FD, grad_FD, m_FD, v_FD, None, radial_F, step, lr, grad_scale, found_inf, beta1, beta2, eps),
        n_rows=n_rows,
        D=width,
        last=W_FD.numel() - (n_rows - 1) * width,
        moments_stride=width,
        UNIT=unit_rows,
        PROJECT=project,
    )


def lazy_adam_rows(
    W_FD: Tensor,
    grad_RD: Tensor,
    m_FD: Tensor,
    v_FD: Tensor,
    step_F: Tensor,
    rows_R: Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: Tensor | None = None,
    radial_R: Tensor | None = None,
    unit_rows: bool = False,
    project: bool = False,
    copy_FD: Tensor | None = None,
) -> None:
    """As torch_backend's; weights and counts float32, the rows of both moments equally far apart."""
    R, D = grad_RD.shape
    if not D:
        return
    _launch(
        *(W_FD, copy_FD, grad_RD.contiguous(), m_FD, v_FD, rows_R.contiguous(), radial_R, step_F, lr, grad_scale),
        *(None, beta1, beta2, eps),
        n_rows=R,
        D=D,
        last=D,
        moments_stride=m_FD.stride(0),
        UNIT=unit_rows,
        PROJECT=project,
    )


def _launch(
    W: Tensor,
    copy: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor | None,
    radial: Tensor | None,
    step: Tensor,
    lr: float | Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    *,
    n_rows: int,
    D: int,
    PROJECT: bool,
    **sizes: int,
) -> None:
    """One program per row."""
    BLOCK_D = next_power_of_2(D) if D <= _WIDEST_IN_REGISTERS else _LOOPED
    launch(
        _adam_rows_kernel,
        (n_rows,),
        _warps(BLOCK_D, arch_of(W.device).lanes),
        W=W,
        copy=copy,
        grad=grad,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        rows=rows,
        radial=None if radial is None or not PROJECT else radial.contiguous(),
        step=step,
        lr=lr if isinstance(lr, Tensor) else float(lr),
        grad_scale=grad_scale,
        found_inf=found_inf,
        log_beta1=log_of_decay(beta1),
        log_beta2=log_of_decay(beta2),
        beta1=float(beta1),
        beta2=float(beta2),
        rest1=1.0 - beta1,
        rest2=1.0 - beta2,
        eps=float(eps),
        n_rows=n_rows,
        D=D,
        LR_ON_DEVICE=isinstance(lr, Tensor),
        PROJECT=PROJECT,
        WIDE=D > _WIDEST_IN_REGISTERS,
        BLOCK_D=BLOCK_D,
        **sizes,
    )


def _warps(block: int, lanes: int) -> int:
    return max(1, min(_MAX_THREADS, block // _PER_LANE) // lanes)


def log_of_decay(beta: float) -> float:
    """Of a decay; of 0, whose bias correction is 1 at every step, a number whose exponential is 0."""
    return math.log(beta) if beta > 0 else -1e4


def adam_rows_traffic(F: int, D: int, constrained: bool, copy_itemsize: int = 0, moment_itemsize: int = 4) -> Traffic:
    """Sixteen operations per weight, six more with the constraint, whose component along a row is given."""
    streamed = (12 + 4 * moment_itemsize + copy_itemsize) * F * D + (4 * F if constrained else 0)
    return Traffic(flops=(22 if constrained else 16) * F * D, streamed=streamed)


def lazy_adam_rows_traffic(
    R: int, D: int, constrained: bool, copy_itemsize: int = 0, moment_itemsize: int = 4
) -> Traffic:
    """As dense Adam over R rows; each also reads its index, and reads and writes its count of steps."""
    dense = adam_rows_traffic(R, D, constrained, copy_itemsize, moment_itemsize)
    return dense._replace(streamed=dense.streamed + (8 + 4 + 4) * R)
