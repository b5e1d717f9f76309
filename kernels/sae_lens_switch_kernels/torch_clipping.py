"""Whether a step is finite and by how much its gradients are clipped: a primitive like those of torch_backend."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

# Elsewhere torch takes the norms of all gradients in few launches.
_ONE_BY_ONE = {"cpu"}


class Clipping(NamedTuple):
    """Numbers on the device, which nothing waits for.

    Attributes:
        is_finite: Whether loss and gradients are finite; bool.
        found_inf: 1 if not, 0 if so, in the norm's dtype.
        scale: What to divide the gradients by.
    """

    is_finite: Tensor
    found_inf: Tensor
    scale: Tensor


def clip(
    grads: Sequence[Tensor],
    loss: Tensor,
    max_norm: float | None,
    skipped: Tensor | None = None,
    steps: Sequence[Tensor] = (),
) -> Clipping:
    """From the norm of all gradients, which is scaled down to ``max_norm``; None: it is not.

    Args:
        grads: All gradients of a step.
        loss: What was differentiated; one number.
        max_norm: See above.
        skipped: How many steps in a row, and in all, were not finite, [2]: this one is added.
        steps: Numbers to be increased by one if the step is finite.
    """
    norm = total_norm(grads)
    is_finite = torch.maximum(norm, loss.abs()) < torch.inf  # NaN is not
    scale = torch.ones_like(norm) if max_norm is None else ((norm + 1e-6) / max_norm).clamp_min(1)
    found_inf = torch.logical_not(is_finite, out=torch.empty_like(norm))
    if skipped is not None:
        skipped += ~is_finite
        skipped[0].mul_(~is_finite)
    for step in steps:
        step += is_finite
    return Clipping(is_finite, found_inf, scale)


@torch.no_grad()
def total_norm(grads: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients together, at least float32. One pass over each, in memory order."""
    grads = list(grads)
    if grads[0].device.type not in _ONE_BY_ONE and all(g.dtype == torch.float32 for g in grads):
        return get_total_norm(grads)
    return torch.stack([_norm(g) for g in grads]).norm()


def _norm(t: Tensor) -> Tensor:
    dtype = torch.promote_types(t.dtype, torch.float32)
    t = t.T if t.ndim == 2 and not t.is_contiguous() else t
    # A matrix by its rows, which torch sums twice as fast.
    return torch.linalg.vector_norm(t, dim=-1, dtype=dtype).norm() if t.ndim else t.abs().to(dtype)
