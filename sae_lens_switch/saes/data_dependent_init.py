"""What is initialised from the first batch of activations: the biases, and how sharply the router routes."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_lens_switch.saes.router import router_logits

# Rows that differ by less than this many units of rounding, of their own size, are taken for one row.
_ROUNDING_UNITS = 64


@dataclass(frozen=True)
class Spread:
    """How far the rows of a batch [B, D] lie apart.

    Attributes:
        n_rows: B.
        size: Root mean square of the rows' norms.
        spread: Root mean square of the rows' distances from their mean.
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
    # Never below that of the smallest normal number: ldexp of older versions of torch overflows at 2**128.
    exponent = (torch.frexp(x_BD.abs().max()).exponent - 1).clamp_min(-126)
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


class Start(NamedTuple):
    """What parameters start at, by name, and what to log of it."""

    values: dict[str, Tensor]
    description: str
    level: int


@torch.no_grad()
def start_from_batch(
    batch_BD: Tensor, W_router_DE: Tensor, bias_start: str, router_start_std: float | None
) -> Start | None:
    """Biases inside the data, and a router with logits of ``router_start_std``; None for a non-finite batch."""
    if not torch.isfinite(batch_BD).all():
        return None
    with torch.autocast(batch_BD.device.type, enabled=False):
        bias_D = bias_from_batch(batch_BD, bias_start)
        starts = {"b_dec": bias_D, "b_router": bias_D}
        spread = Spread.of(batch_BD)
        text = f"biases start at {bias_start} of {spread}"
        if router_start_std is not None and not spread.is_none:
            found = router_logits(batch_BD, W_router_DE, bias_D).std()
            starts["W_router"] = W_router_DE * (router_start_std / found)
            text += f"; the router's logits at a standard deviation of {router_start_std:.4g}, {found:.4g} before"
        elif router_start_std is not None:
            text += "; the router as initialised, as these are all the same: router_start_std needs some that differ"
    return Start(starts, text, logging.WARNING if spread.is_none else logging.INFO)


_Named = Iterable[tuple[str, nn.Parameter]]


class FirstBatchStart:
    """Whether an SAE's parameters are still to be initialised from a batch, and how to revert that.

    Weights written to in place, past ``load_state_dict``, leave no trace in torch: a sample of them is compared.

    Args:
        parameters: Of an SAE that is as initialised; None: of one that is not.
    """

    def __init__(self, parameters: _Named | None) -> None:
        self._as_initialized = None if parameters is None else _sample(parameters)
        self._before: dict[str, Tensor] = {}

    def is_due(self, parameters: _Named) -> bool:
        if self._as_initialized is None:
            return False
        now = _sample(parameters)
        if not all(torch.allclose(t, now[name], rtol=2e-2) for name, t in self._as_initialized.items()):  # any dtype
            self._as_initialized = None  # written to, for good: the next steps need not look, nor wait for a GPU
        return self._as_initialized is not None

    @torch.no_grad()
    def begin(self, parameters: _Named, values: Mapping[str, Tensor]) -> bool:
        """Copy ``values`` into the parameters that are not frozen; unless one would be non-finite in its dtype."""
        by_name = dict(parameters)
        if not all(torch.isfinite(t.to(by_name[name].dtype)).all() for name, t in values.items()):
            return False
        self._as_initialized, self._before = None, {}
        for name, t in values.items():
            p = by_name[name]
            if p.requires_grad:
                self._before[name] = p.detach().clone()
                p.copy_(t)
        return True

    @torch.no_grad()
    def settle(self, parameters: _Named, is_finite: Tensor | bool) -> None:
        """Keep the start if the step that followed it was finite; otherwise revert it, and be due again."""
        if self._before and not is_finite:
            by_name = dict(parameters)
            for name, t in self._before.items():
                by_name[name].copy_(t)
            self._as_initialized = _sample(by_name.items())
        self._before = {}


def _sample(parameters: _Named) -> dict[str, Tensor]:
    """Some entries of each matrix, and every vector, on the CPU in float32."""
    sampled = {}
    for name, p in parameters:
        W = p.detach()
        if p.ndim == 2 and name != "W_router":
            W = W[:: max(1, W.shape[0] // 32), :: max(1, W.shape[1] // 32)]
        sampled[name] = W.to("cpu", torch.float32, copy=True)
    return sampled
