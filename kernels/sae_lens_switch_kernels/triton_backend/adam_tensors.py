"""Adam over several tensors in one launch: biases and the router, each too small to be worth a launch of its own."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.triton_backend.adam import adam_number, log_of_decay, step_sizes
from sae_lens_switch_kernels.triton_backend.blocks import cdiv
from sae_lens_switch_kernels.triton_backend.launch import Traffic, launch, load_row

_TILE = 1024
_AT_ONCE = 4  # tensors that a launch takes


@triton.jit
def _adam_tensors_kernel(
    W0,
    W1,  # the others may be None
    W2,
    W3,
    grad0,
    grad1,
    grad2,
    grad3,
    m0,
    m1,
    m2,
    m3,
    v0,
    v1,
    v2,
    v3,
    step0,
    step1,
    step2,
    step3,
    n0,  # numbers in each
    n1,
    n2,
    n3,
    end0,  # programs for the first, for the first two, ...
    end1,
    end2,
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
    LR_ON_DEVICE: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    W, grad, exp_avg, exp_avg_sq, step, n, first = W0, grad0, m0, v0, step0, program * 0 + n0, program * 0
    if W1 is not None:  # noqa: SIM102, Triton decides the outer one as it compiles
        if program >= end0:
            W, grad, exp_avg, exp_avg_sq, step = W1, grad1, m1, v1, step1
            n, first = program * 0 + n1, program * 0 + end0
    if W2 is not None:  # noqa: SIM102
        if program >= end1:
            W, grad, exp_avg, exp_avg_sq, step = W2, grad2, m2, v2, step2
            n, first = program * 0 + n2, program * 0 + end1
    if W3 is not None:  # noqa: SIM102
        if program >= end2:
            W, grad, exp_avg, exp_avg_sq, step = W3, grad3, m3, v3, step3
            n, first = program * 0 + n3, program * 0 + end2
    if found_inf is not None:
        n = tl.where(tl.load(found_inf) == 0, n, 0)
    scale = 1.0 if grad_scale is None else tl.load(grad_scale)
    step_size, root = step_sizes(tl.load(step), lr, log_beta1, log_beta2, LR_ON_DEVICE)
    at = (program - first) * TILE + tl.arange(0, TILE)
    inside = at < n
    w, m, v = load_row(W + at, inside), load_row(exp_avg + at, inside), load_row(exp_avg_sq + at, inside)
    g = load_row(grad + at, inside) / scale
    w, m, v = adam_number(w, g, m, v, step_size, root, beta1, beta2, rest1, rest2, eps)
    tl.store(W + at, w, mask=inside)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)


def adam_tensors(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """As torch_adam's; all float32 and contiguous."""
    lists = [parameters, grads, exp_avgs, exp_avg_sqs, steps]
    filled = [i for i, p in enumerate(parameters) if p.numel()]
    for start in range(0, len(filled), _AT_ONCE):
        some = filled[start : start + _AT_ONCE]
        tensors = {
            f"{name}{i}": tensors[some[i]] if i < len(some) else None
            for name, tensors in zip(("W", "grad", "m", "v", "step"), lists, strict=True)
            for i in range(_AT_ONCE)
        }
        sizes = [parameters[i].numel() for i in some] + [0] * (_AT_ONCE - len(some))
        ends = [sum(cdiv(n, _TILE) for n in sizes[: i + 1]) for i in range(_AT_ONCE)]
        launch(
            _adam_tensors_kernel,
            (ends[-1],),
            4,
            **tensors,
            **{f"n{i}": n for i, n in enumerate(sizes)},
            **{f"end{i}": end for i, end in enumerate(ends[:-1])},
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
            LR_ON_DEVICE=isinstance(lr, Tensor),
            TILE=_TILE,
        )


def adam_tensors_traffic(sizes: Sequence[int]) -> Traffic:
    return Traffic(flops=16 * sum(sizes), streamed=28 * sum(sizes))
