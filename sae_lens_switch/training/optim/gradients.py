"""Which parameters a step changes, the norm of their gradients, and by how much it is clipped."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """All but the frozen ones (``requires_grad=False``), which no part of a step may touch."""
    return [p for p in parameters if p.requires_grad]


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that a step uses: not one left from before its parameter was frozen."""
    return [p.grad for p in trained(parameters) if p.grad is not None]


@torch.no_grad()
def total_norm(grads: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients together, at least float32. One pass over each, in memory order."""
    return torch.stack([_norm(g) for g in grads]).norm()


def _norm(t: Tensor) -> Tensor:
    dtype = torch.promote_types(t.dtype, torch.float32)
    t = t.T if t.ndim == 2 and not t.is_contiguous() else t
    # A matrix by its rows, which torch sums twice as fast.
    return torch.linalg.vector_norm(t, dim=-1, dtype=dtype).norm() if t.ndim else t.abs().to(dtype)


def clipping(loss: Tensor, norm: Tensor, max_norm: float | None) -> tuple[Tensor, Tensor]:
    """Whether loss and gradients are finite, and what to divide the gradients by. Neither waits for the device."""
    is_finite = torch.isfinite(norm) & torch.isfinite(loss.detach())
    scale = torch.ones_like(norm) if max_norm is None else ((norm + 1e-6) / max_norm).clamp_min(1)
    return is_finite, scale
