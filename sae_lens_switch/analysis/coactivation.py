"""Which experts are chosen together, when tokens go to several."""

from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_STEPS, _TOLERANCE = 1_000, 1e-12


@dataclass(frozen=True)
class CoActivation:
    """How often two experts were chosen for the same token.

    Attributes:
        counts_EE: Number of tokens sent to both experts, int64; on the diagonal, to the expert at all.
        expected_EE: The same if experts were chosen independently, given how often each is and that a token has A
            different ones: ``a_i a_j`` off the diagonal, with the sums of ``counts_EE``. NaN on the diagonal.
    """

    counts_EE: Tensor
    expected_EE: Tensor

    @property
    def lift_EE(self) -> Tensor:
        """Observed over expected: 1 if independent. NaN on the diagonal, and for experts never chosen."""
        return self.counts_EE / torch.where(self.expected_EE > 0, self.expected_EE, torch.nan)


def coactivation_counts(experts_NA: Tensor, n_experts: int) -> Tensor:
    """Number of tokens sent to both of two experts, [E, E] int64; on the diagonal, to each.

    Raises:
        ValueError: For experts that are not below ``n_experts``, or that a token has twice.
    """
    if experts_NA.ndim != 2:
        raise ValueError(f"experts must be [tokens, A]; got shape {tuple(experts_NA.shape)}")
    if experts_NA.numel() and not 0 <= int(experts_NA.min()) <= int(experts_NA.max()) < n_experts:
        got = f"{int(experts_NA.min())} to {int(experts_NA.max())}"
        raise ValueError(f"experts must be between 0 and {n_experts - 1}; got {got}")
    A = experts_NA.shape[1]
    pairs = (experts_NA[:, :, None] * n_experts + experts_NA[:, None]).flatten()
    counts_EE = torch.bincount(pairs, minlength=n_experts**2).view(n_experts, n_experts)
    if int(counts_EE.sum() - counts_EE.diag().sum()) != len(experts_NA) * A * (A - 1):
        raise ValueError("the experts of a token must be different; some have one twice")
    return counts_EE


def coactivation(experts_NA: Tensor, n_experts: int) -> CoActivation:
    """Count which experts are chosen together, and compare with independence.

    Args:
        experts_NA: The A different experts of each token.
        n_experts: Number of experts.

    Raises:
        ValueError: For experts that are not below ``n_experts``, or that a token has twice.
    """
    return against_independence(coactivation_counts(experts_NA, n_experts).cpu())


def against_independence(counts_EE: Tensor) -> CoActivation:
    """Fit ``a_i a_j`` to the sums of the off-diagonal counts, by iterative proportional fitting.

    The product of the shares alone would expect too many pairs: a token cannot have the same expert twice.
    """
    together_E = (counts_EE.sum(1) - counts_EE.diag()).double()
    a_E = together_E / together_E.sum().clamp(min=1).sqrt()
    for _ in range(_MOST_STEPS):
        others_E = a_E.sum() - a_E
        before, a_E = a_E, (a_E * torch.where(others_E > 0, together_E / others_E, 0)).sqrt()
        if (a_E - before).abs().max() <= _TOLERANCE * a_E.max():
            break
    return CoActivation(counts_EE, torch.outer(a_E, a_E).fill_diagonal_(torch.nan))
