"""Where the biases start, and how sharply the router does: both are taken from a first batch of activations."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows that differ by less than this many units of rounding, of their own size, are taken for one row.
_ROUNDING_UNITS = 64


@dataclass(frozen=True)
class Spread:
    """How far the rows of a batch [B, D] lie apart.

    size:   root mean square of the rows' norms
    spread: root mean square of the rows' distances from their mean
    """

    n_rows: int
    size: float
    spread: float

    @classmethod
    def of(cls, x_BD: Tensor) -> "Spread":
        x_BD = x_BD.detach().cpu().double()
        centered_BD = x_BD - x_BD.mean(dim=0)
        size, spread = (t.square().sum(dim=1).mean().sqrt().item() for t in (x_BD, centered_BD))
        return cls(len(x_BD), size, spread)

    @property
    def is_none(self) -> bool:
        """Whether all rows are the same one, but for float32's rounding, or for what it loses when it is squared."""
        info = torch.finfo(torch.float32)
        return self.spread <= max(_ROUNDING_UNITS * info.eps * self.size, info.tiny**0.5)

    def __str__(self) -> str:
        rows = f"{self.n_rows} activations of norm {self.size:.4g}"
        return rows if self.n_rows < 2 else f"{rows}, {self.spread:.4g} from their mean"


def bias_from_batch(x_BD: Tensor, method: str) -> Tensor:
    """ "geometric_median", "mean" or "zeros" of a finite batch, shape [D], finite; float32 at least."""
    if method == "zeros":
        return x_BD.new_zeros(x_BD.shape[-1])
    x_BD = x_BD.to(torch.promote_types(x_BD.dtype, torch.float32))
    # By a power of two, which rounds nothing, to a size whose squares neither overflow nor are lost.
    exponent = torch.frexp(x_BD.abs().max()).exponent - 1
    x_BD = torch.ldexp(x_BD, -exponent)
    return torch.ldexp(x_BD.mean(dim=0) if method == "mean" else geometric_median(x_BD), exponent)


def geometric_median(x_BD: Tensor, max_iterations: int = 100, tolerance: float = 1e-7) -> Tensor:
    """The point with the least summed distance to the rows of x, [D], by Weiszfeld's iteration.

    Unlike the mean it is not dragged away by a few massive activations. Stops once an iteration lowers the
    summed distance by less than ``tolerance``, relative.
    """
    median_D = x_BD.mean(dim=0)
    distance_B = (x_BD - median_D).norm(dim=1)
    for _ in range(max_iterations):
        if distance_B.max() == 0:  # all rows are the median
            break
        weight_B = 1 / (distance_B / distance_B.max()).clamp_min(1e-12)
        median_D = weight_B @ x_BD / weight_B.sum()
        previous, distance_B = distance_B.sum(), (x_BD - median_D).norm(dim=1)
        if previous - distance_B.sum() <= tolerance * distance_B.sum():
            break
    return median_D
