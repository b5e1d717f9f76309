"""Adam over a matrix in one pass: projection, step and renormalisation of a row while it is in registers.

Gradient, weight and both moments are read once, weight and moments written once: 28 bytes per float32 weight. A row
too wide for registers is looped over instead; what is read again then comes from cache. Without a constraint rows mean
nothing, and the matrix is one line of numbers.

Letters: D and F as in the package.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.triton_backend.blocks import cdiv, next_power_of_2
from sae_lens_switch_kernels.triton_backend.launch import Traffic, arch_of, launch, load_row

_WIDEST_IN_REGISTERS = 4096
_TILE = 1024  # numbers per program where rows mean nothing
_PER_LANE, _MAX_THREADS = 8, 512  # of each of four tensors


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, without the cancellation near 0 that would spoil the first steps' bias correction."""
    series = 1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8)))
    series = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * series))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _scalars(step, lr, grad_scale, found_inf, log_beta1, log_beta2, LR_ON_DEVICE: tl.constexpr):
    """Step size, root of the second moment's correction, the gradients' scale, and whether to step at all."""
    t = tl.load(step)
    rate = tl.load(lr) if LR_ON_DEVICE else lr
    scale = 1.0 if grad_scale is None else tl.load(grad_scale)
    steps = True if found_inf is None else tl.load(found_inf) == 0
    return rate / _one_minus_exp(t * log_beta1), tl.sqrt(_one_minus_exp(t * log_beta2)), scale, steps


@triton.jit
def _adam(w, g, m, v, step_size, root, beta1, beta2, rest1, rest2, eps):
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return w - step_size * m / (tl.sqrt(v) / root + eps), m, v


@triton.jit
def _to_unit(squares):
    """What a row is multiplied by. A row of unit norm, up to rounding, and a row of zeros stay as they are."""
    norm = tl.sqrt_rn(squares)
    inverse = 1.0 / tl.maximum(norm, 1.1754943508222875e-38)
    return tl.where(tl.abs(norm - 1.0) <= 8 * 1.1920928955078125e-07, 1.0, inverse)


@triton.jit
def _adam_rows_kernel(
    W,  # [F, D]
    grad,  # [F, D]
    exp_avg,  # [F, D]
    exp_avg_sq,  # [F, D]
    radial,  # [F] or None
    step,
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
    F,
    D,
    last,  # numbers in the last row
    LR_ON_DEVICE: tl.constexpr,
    PROJECT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    step_size, root, scale, steps = _scalars(step, lr, grad_scale, found_inf, log_beta1, log_beta2, LR_ON_DEVICE)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < tl.where(steps, tl.where(row < F - 1, D, last), 0)
    at = row * D + d
    w = load_row(W + at, inside)
    g = load_row(grad + at, inside)
    m = load_row(exp_avg + at, inside)
    v = load_row(exp_avg_sq + at, inside)
    if PROJECT:
        along = tl.sum(g * w, 0) if radial is None else tl.load(radial + row)
        g -= along * w
    w, m, v = _adam(w, g / scale, m, v, step_size, root, beta1, beta2, rest1, rest2, eps)
    if UNIT:
        w *= _to_unit(tl.sum(tl.where(inside, w * w, 0.0), 0))
    tl.store(W + at, w, mask=inside)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)


@triton.jit
def _adam_wide_rows_kernel(
    W,  # [F, D]
    grad,  # [F, D]
    exp_avg,  # [F, D]
    exp_avg_sq,  # [F, D]
    radial,  # [F] or None
    step,
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
    D,
    LR_ON_DEVICE: tl.constexpr,
    PROJECT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    step_size, root, scale, steps = _scalars(step, lr, grad_scale, found_inf, log_beta1, log_beta2, LR_ON_DEVICE)
    row = tl.program_id(0).to(tl.int64)
    width = tl.where(steps, D, 0)
    along = 0.0
    if PROJECT:
        if radial is None:
            dots = tl.zeros([BLOCK_D], tl.float32)
            for start in range(0, width, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                at = row * D + d
                dots += load_row(W + at, d < D) * load_row(grad + at, d < D)
            along = tl.sum(dots, 0)
        else:
            along = tl.load(radial + row)
    squares = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        at = row * D + d
        w = load_row(W + at, d < D)
        g = load_row(grad + at, d < D)
        m = load_row(exp_avg + at, d < D)
        v = load_row(exp_avg_sq + at, d < D)
        if PROJECT:
            g -= along * w
        w, m, v = _adam(w, g / scale, m, v, step_size, root, beta1, beta2, rest1, rest2, eps)
        squares += tl.where(d < D, w * w, 0.0)
        tl.store(W + at, w, mask=d < D)
        tl.store(exp_avg + at, m, mask=d < D)
        tl.store(exp_avg_sq + at, v, mask=d < D)
    if UNIT:
        factor = _to_unit(tl.sum(squares, 0))
        tl.debug_barrier()  # the row that other threads have just written is read
        for start in range(0, width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            at = row * D + d
            tl.store(W + at, load_row(W + at, d < D) * factor, mask=d < D)


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
) -> None:
    """As torch_backend's; everything float32, the matrices contiguous."""
    F, D = W_FD.shape
    by_row = unit_rows or project
    n_rows, width = (F, D) if by_row else (cdiv(W_FD.numel(), _TILE), _TILE)
    if not W_FD.numel():
        return
    in_registers = width <= _WIDEST_IN_REGISTERS
    BLOCK_D = next_power_of_2(min(width, _WIDEST_IN_REGISTERS))
    sizes = {"F": n_rows, "last": W_FD.numel() - (n_rows - 1) * width} if in_registers else {}
    launch(
        _adam_rows_kernel if in_registers else _adam_wide_rows_kernel,
        (n_rows,),
        _warps(BLOCK_D, arch_of(W_FD.device).lanes),
        W=W_FD,
        grad=grad_FD,
        exp_avg=m_FD,
        exp_avg_sq=v_FD,
        radial=None if radial_F is None or not project else radial_F.contiguous(),
        step=step,
        lr=lr if isinstance(lr, Tensor) else float(lr),
        grad_scale=grad_scale,
        found_inf=found_inf,
        log_beta1=_log(beta1),
        log_beta2=_log(beta2),
        beta1=float(beta1),
        beta2=float(beta2),
        rest1=1.0 - beta1,
        rest2=1.0 - beta2,
        eps=float(eps),
        D=width,
        LR_ON_DEVICE=isinstance(lr, Tensor),
        PROJECT=project,
        UNIT=unit_rows,
        BLOCK_D=BLOCK_D,
        **sizes,
    )


def _warps(block: int, lanes: int) -> int:
    return max(1, min(_MAX_THREADS, block // _PER_LANE) // lanes)


def _log(beta: float) -> float:
    """Of a decay; of 0, whose bias correction is 1 at every step, a number whose exponential is 0."""
    return math.log(beta) if beta > 0 else -1e4


def adam_rows_traffic(F: int, D: int, constrained: bool) -> Traffic:
    """Sixteen operations per weight, six more with the constraint, whose component along a row is given."""
    return Traffic(flops=(22 if constrained else 16) * F * D, streamed=28 * F * D + (4 * F if constrained else 0))
