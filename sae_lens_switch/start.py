"""Where the biases start: a centre of the first batch of activations."""

import torch
from torch import Tensor


def bias_from_batch(x_BD: Tensor, method: str) -> Tensor:
    """ "geometric_median", "mean" or "zeros" of a batch, shape [D], in the batch's dtype."""
    if method == "zeros":
        return x_BD.new_zeros(x_BD.shape[-1])
    x_BD = x_BD.to(torch.promote_types(x_BD.dtype, torch.float32))
    return x_BD.mean(dim=0) if method == "mean" else geometric_median(x_BD)


def geometric_median(x_BD: Tensor, max_iterations: int = 100, tolerance: float = 1e-7) -> Tensor:
    """The point with the least summed distance to the rows of x, [D], by Weiszfeld's iteration.

    Unlike the mean it is not dragged away by a few massive activations. Stops once an iteration lowers the
    summed distance by less than ``tolerance``, relative.
    """
    median_D = x_BD.mean(dim=0)
    distance_B = (x_BD - median_D).norm(dim=1)
    for _ in range(max_iterations):
        weight_B = 1 / distance_B.clamp_min(1e-12 * distance_B.max().clamp_min(1e-30))
        median_D = weight_B @ x_BD / weight_B.sum()
        previous, distance_B = distance_B.sum(), (x_BD - median_D).norm(dim=1)
        if previous - distance_B.sum() <= tolerance * distance_B.sum():
            break
    return median_D
