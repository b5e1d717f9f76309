"""A router fitted to where tokens should go: multinomial logistic regression without a bias of its own."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_switch.saes.router import router_logits

_STEPS, _BATCH, _LEARNING_RATE = 400, 2048, 0.05
# Directions whose variance is less than this share of the largest are not amplified further.
_LEAST_VARIANCE = 1e-4


class FittedRouter(NamedTuple):
    """Parameters of ``softmax((x - b_router) @ W_router)``, float32 at least."""

    W_router_DE: Tensor
    b_router_D: Tensor

    def probs(self, x_ND: Tensor) -> Tensor:
        """[N, E]."""
        return router_logits(x_ND, self.W_router_DE, self.b_router_D).softmax(dim=1)


def fit_router(x_ND: Tensor, target_NE: Tensor, weight_N: Tensor, seed: int = 0) -> FittedRouter:
    """Minimise the mean over N tokens of ``weight * cross_entropy(softmax((x - b_router) @ W_router), target)``.

    Adam on whitened activations, where all directions learn equally fast, from the linear discriminant. A bias c of
    the logits has no place in a Switch SAE's router: it becomes a shift of b_router, ``-b_shift @ W_router = c``.

    Args:
        x_ND: What the router will see.
        target_NE: Probabilities, rows that sum to 1.
        weight_N: Weights of the tokens, of mean 1.
        seed: Of the order of the tokens.
    """
    x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    target_NE, weight_N = target_NE.to(x_ND.dtype), weight_N.to(x_ND.dtype)
    mean_D = x_ND.mean(dim=0)
    whiten_DD = _whitening(x_ND - mean_D)
    A_DE, c_E = _logistic_regression((x_ND - mean_D) @ whiten_DD, target_NE, weight_N, seed)
    W_DE = whiten_DD @ A_DE
    c_E = c_E - c_E.mean()
    shift_D = torch.linalg.lstsq(W_DE.T.double().cpu(), -c_E.double().cpu().unsqueeze(1), driver="gelsd").solution[:, 0]
    return FittedRouter(W_DE, mean_D + shift_D.to(mean_D))


def _whitening(centered_ND: Tensor) -> Tensor:
    """[D, D], symmetric: the inverse root of the covariance, small variances raised."""
    covariance_DD = (centered_ND.T @ centered_ND).double() / len(centered_ND)
    variance_D, axes_DD = torch.linalg.eigh(covariance_DD)
    variance_D = variance_D.clamp_min(_LEAST_VARIANCE * float(variance_D[-1]) + 1e-30)
    return ((axes_DD * variance_D.rsqrt()) @ axes_DD.T).to(centered_ND.dtype)


@torch.enable_grad()
def _logistic_regression(z_ND: Tensor, target_NE: Tensor, weight_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Weights [D, E] and biases [E]."""
    N, E = target_NE.shape
    mass_E = target_NE.sum(dim=0).clamp_min(1e-6)
    A_DE = ((z_ND.T @ target_NE) / mass_E).requires_grad_()
    c_E = (mass_E / N).log().requires_grad_()
    optimizer = torch.optim.Adam([A_DE, c_E], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_STEPS):
        rows = torch.randint(N, (min(N, _BATCH),), generator=generator).to(z_ND.device)
        log_probs_BE = (z_ND[rows] @ A_DE + c_E).log_softmax(dim=1)
        loss = -(weight_N[rows] * (target_NE[rows] * log_probs_BE).sum(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return A_DE.detach(), c_E.detach()
