"""Which parameters a step changes, and the gradients that it uses."""

from collections.abc import Iterable

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
