"""The norm of all gradients, and the few numbers that follow from it between backward pass and step, in two launches.

Letters: P is the number of programs for each gradient.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels import torch_clipping
from sae_lens_switch_kernels.torch_clipping import Clipping
from sae_lens_switch_kernels.triton_backend.blocks import cdiv
from sae_lens_switch_kernels.triton_backend.launch import Traffic, launch, load_row

_TILE, _PROGRAMS = 2048, 1024
_REST = 16  # at most so many numbers are read one by one
_AT_ONCE = 8  # tensors that a launch takes


@triton.jit
def _squares_of(t, n, P, TILE: tl.constexpr, REST: tl.constexpr):
    """Of this program's part of n numbers."""
    n = tl.program_id(0).to(tl.int64) * 0 + n
    span = tl.cdiv(tl.cdiv(n, P), TILE) * TILE
    begin = tl.program_id(0) * span
    end = tl.minimum(n, begin + span)
    whole = end // REST * REST  # loads are wide up to here, whatever n is
    squares = tl.zeros([TILE], tl.float32)
    for first in range(begin, whole, TILE):
        at = first + tl.arange(0, TILE)
        number = load_row(t + at, at < whole).to(tl.float32)
        squares += number * number
    at = whole + tl.arange(0, REST)
    number = tl.load(t + at, mask=(at >= begin) & (at < end), other=0.0).to(tl.float32)
    return tl.sum(squares, 0) + tl.sum(number * number, 0)


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3", "n4", "n5", "n6", "n7", "P"])
def _squares_kernel(
    t0,
    t1,  # each of the others a tensor or None
    t2,
    t3,
    t4,
    t5,
    t6,
    t7,
    n0,  # numbers in each
    n1,
    n2,
    n3,
    n4,
    n5,
    n6,
    n7,
    parts,  # [8, P]
    P,
    TILE: tl.constexpr,
    REST: tl.constexpr,
):
    # Not one sum over a pointer that is chosen first: on AMD, Triton 3.6 cannot choose between a tensor of more than
    # 2 GB and a smaller one.
    which, total = tl.program_id(1), 0.0
    if which == 0:
        total = _squares_of(t0, n0, P, TILE, REST)
    if t1 is not None:  # noqa: SIM102, Triton decides the outer one as it compiles
        if which == 1:
            total = _squares_of(t1, n1, P, TILE, REST)
    if t2 is not None:  # noqa: SIM102
        if which == 2:
            total = _squares_of(t2, n2, P, TILE, REST)
    if t3 is not None:  # noqa: SIM102
        if which == 3:
            total = _squares_of(t3, n3, P, TILE, REST)
    if t4 is not None:  # noqa: SIM102
        if which == 4:
            total = _squares_of(t4, n4, P, TILE, REST)
    if t5 is not None:  # noqa: SIM102
        if which == 5:
            total = _squares_of(t5, n5, P, TILE, REST)
    if t6 is not None:  # noqa: SIM102
        if which == 6:
            total = _squares_of(t6, n6, P, TILE, REST)
    if t7 is not None:  # noqa: SIM102
        if which == 7:
            total = _squares_of(t7, n7, P, TILE, REST)
    tl.store(parts + which * P + tl.program_id(0), total)


@triton.jit
def _count_if(step, finite):
    if step is not None:
        tl.store(step, tl.load(step) + finite.to(tl.float32))


@triton.jit(do_not_specialize=["n_parts"])
def _clip_kernel(
    parts,  # [n_parts]
    loss,
    skipped,  # [2] or None
    step0,  # numbers or None
    step1,
    step2,
    step3,
    step4,
    step5,
    step6,
    step7,
    max_norm,
    is_finite,
    found_inf,
    scale,
    n_parts,
    CLIPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n_parts, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(parts + at, mask=at < n_parts, other=0.0)
    norm = tl.sqrt_rn(tl.sum(sums, 0))
    # NaN is less than nothing.
    finite = (norm < float("inf")) & (tl.abs(tl.load(loss).to(tl.float32)) < float("inf"))
    tl.store(is_finite, finite)
    tl.store(found_inf, 1.0 - finite.to(tl.float32))
    divisor = 1.0
    if CLIPS:
        excess = (norm + 1e-6) / max_norm
        divisor = tl.where(excess < 1.0, 1.0, excess)
    tl.store(scale, divisor)
    if skipped is not None:
        tl.store(skipped, tl.where(finite, 0, tl.load(skipped) + 1))
        tl.store(skipped + 1, tl.load(skipped + 1) + 1 - finite.to(tl.int64))
    _count_if(step0, finite)
    _count_if(step1, finite)
    _count_if(step2, finite)
    _count_if(step3, finite)
    _count_if(step4, finite)
    _count_if(step5, finite)
    _count_if(step6, finite)
    _count_if(step7, finite)


def clip(
    grads: Sequence[Tensor],
    loss: Tensor,
    max_norm: float | None,
    skipped: Tensor | None = None,
    steps: Sequence[Tensor] = (),
) -> Clipping:
    """As torch_clipping's; for float32 gradients alone."""
    if any(g.dtype != torch.float32 for g in grads):
        return torch_clipping.clip(grads, loss, max_norm, skipped, steps)
    parts = _squares(grads)
    found = Clipping(parts.new_empty((), dtype=torch.bool), parts.new_empty(()), parts.new_empty(()))
    launch(
        _clip_kernel,
        (1,),
        4,
        parts=parts,
        loss=loss,
        skipped=skipped,
        **{f"step{i}": steps[i] if i < len(steps) else None for i in range(_AT_ONCE)},
        max_norm=1.0 if max_norm is None else float(max_norm),
        n_parts=parts.numel(),
        CLIPS=max_norm is not None,
        BLOCK=1024,
        **found._asdict(),
    )
    for step in steps[_AT_ONCE:]:
        step += found.is_finite
    return found


def _squares(grads: Sequence[Tensor]) -> Tensor:
    """Sums of squares, [len(grads), P], to be added."""
    P = max(1, min(_PROGRAMS, cdiv(max(g.numel() for g in grads), _TILE)))
    parts = grads[0].new_empty(len(grads), P)
    flat = [_in_memory_order(g) for g in grads]
    for first in range(0, len(flat), _AT_ONCE):
        some = flat[first : first + _AT_ONCE]
        tensors = {f"t{i}": some[i] if i < len(some) else None for i in range(_AT_ONCE)}
        sizes = {f"n{i}": some[i].numel() if i < len(some) else 0 for i in range(_AT_ONCE)}
        launch(_squares_kernel, (P, len(some)), 4, **tensors, **sizes, parts=parts[first:], P=P, TILE=_TILE, REST=_REST)
    return parts


def _in_memory_order(t: Tensor) -> Tensor:
    return t.T if t.ndim == 2 and t.T.is_contiguous() else t.contiguous()


def clip_traffic(sizes: Sequence[int]) -> Traffic:
    """Every gradient read once."""
    return Traffic(flops=2 * sum(sizes), streamed=4 * sum(sizes))
