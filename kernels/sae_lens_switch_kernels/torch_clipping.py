"""Whether a step is finite and by how much its gradients are clipped: a primitive like those of torch_backend."""

from typing import NamedTuple

import torch
from torch import Tensor


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


def clip(norm: Tensor, loss: Tensor, max_norm: float | None) -> Clipping:
    """From the norm of all gradients, which is scaled down to ``max_norm``; None: it is not."""
    is_finite = torch.maximum(norm, loss.abs()) < torch.inf  # NaN is not
    scale = torch.ones_like(norm) if max_norm is None else ((norm + 1e-6) / max_norm).clamp_min(1)
    return Clipping(is_finite, torch.logical_not(is_finite, out=torch.empty_like(norm)), scale)
