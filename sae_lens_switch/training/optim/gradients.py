"""Which parameters a step changes, the norm of their gradients, and by how much it is clipped."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import Optimizer

# Elsewhere torch takes the norms of all gradients in few launches.
_ONE_BY_ONE = {"cpu"}


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
    grads = list(grads)
    if grads[0].device.type not in _ONE_BY_ONE and all(g.dtype == torch.float32 for g in grads):
        return get_total_norm(grads)
    return torch.stack([_norm(g) for g in grads]).norm()


def _norm(t: Tensor) -> Tensor:
    dtype = torch.promote_types(t.dtype, torch.float32)
    t = t.T if t.ndim == 2 and not t.is_contiguous() else t
    # A matrix by its rows, which torch sums twice as fast.
    return torch.linalg.vector_norm(t, dim=-1, dtype=dtype).norm() if t.ndim else t.abs().to(dtype)
