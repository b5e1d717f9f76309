"""Is the router a down-projection of its experts' latents? Its alignment with their means, against shuffled experts."""

from dataclasses import dataclass

import torch
from sae_lens import SAE
from torch import Tensor

from sae_lens_switch.saes.switch_sae import SwitchBase


@dataclass(frozen=True)
class Alignment:
    """How well each router direction r_e agrees with the mean c_e of its own expert's directions.

    Both are centred over the experts, since a softmax is invariant to what all its logits share. The null (P
    permutations) is the same number after the latents were dealt out to experts of the same size at random.

    Alignment may be negative. One possible reason: there is no encoder bias, and encoder columns that point against the
    direction shared by an expert's tokens keep its latents from firing on all of them.

    Attributes:
        cosine_E: Cosine of r_e and c_e.
        r_squared: Share of ``sum_e ||r_e||^2`` explained by ``r_e = a c_e`` with one number a for all experts:
            ``(sum_e r_e c_e)^2 / (sum_e ||r_e||^2 sum_e ||c_e||^2)``. 1 if the router is a multiple of the means.
        null_cosine_PE: The cosines under the null.
        null_r_squared_P: The shares under the null.
    """

    cosine_E: Tensor
    r_squared: float
    null_cosine_PE: Tensor
    null_r_squared_P: Tensor

    @property
    def z_E(self) -> Tensor:
        """Standard deviations of the null by which each cosine exceeds the null's mean."""
        return (self.cosine_E - self.null_cosine_PE.mean(0)) / self.null_cosine_PE.std(0)

    @property
    def p_E(self) -> Tensor:
        """Two-sided p-value of each cosine, (1 + number of null values at least as far from 0) / (1 + P)."""
        return _p_value(self.cosine_E.abs(), self.null_cosine_PE.abs())

    @property
    def z(self) -> float:
        """Standard deviations of the null by which ``r_squared`` exceeds the null's mean."""
        return ((self.r_squared - self.null_r_squared_P.mean()) / self.null_r_squared_P.std()).item()

    @property
    def p(self) -> float:
        """One-sided p-value of ``r_squared``."""
        return _p_value(torch.tensor(self.r_squared, dtype=torch.float64), self.null_r_squared_P).item()


def _p_value(observed: Tensor, null_P: Tensor) -> Tensor:
    return (1 + (null_P >= observed).sum(0)) / (1 + len(null_P))


@dataclass(frozen=True)
class RouterAlignment:
    """Alignment of the router with the experts' mean columns of ``W_enc`` and with their mean rows of ``W_dec``."""

    encoder: Alignment
    decoder: Alignment


@torch.no_grad()
def router_alignment(sae: SAE, *, n_permutations: int = 1000, seed: int = 0) -> RouterAlignment:
    """Test whether the router points where its experts' latents do, on the SAE's device.

    Costs 4 n_permutations E F D FLOPs.

    Args:
        sae: A Switch SAE with at least two experts, for training or inference.
        n_permutations: Number of random assignments of the latents to experts. p-values are at least 1 / (1 + this).
        seed: Seed of the permutations, which are the same for encoder and decoder.

    Raises:
        ValueError: If the SAE has no router or one expert, or ``n_permutations`` is below 2.
    """
    if not isinstance(sae, SwitchBase):
        raise ValueError(f"sae must have a router; a {sae.cfg.architecture()} SAE has none")
    if sae.cfg.n_experts < 2:
        raise ValueError(f"n_experts must be at least 2 to compare experts; got {sae.cfg.n_experts}")
    if n_permutations < 2:
        raise ValueError(f"n_permutations must be at least 2; got {n_permutations}")
    router_ED, weights = sae.W_router.T, map(sae.cfg.layout.by_expert, (sae.W_enc.T, sae.W_dec))
    return RouterAlignment(*(_alignment(router_ED, W_EMD, n_permutations, seed) for W_EMD in weights))


def _alignment(router_ED: Tensor, W_EMD: Tensor, n: int, seed: int) -> Alignment:
    (E, M), W_FD = W_EMD.shape[:2], W_EMD.flatten(0, 1)
    dtype = torch.promote_types(W_FD.dtype, torch.float32)
    router_ED, W_FD = (t.to(dtype) - t.to(dtype).mean(0) for t in (router_ED, W_FD))
    generator, expert_F = torch.Generator().manual_seed(seed), torch.arange(E).repeat_interleave(M)
    observed = _agreement(router_ED, W_FD, expert_F)
    null = [_agreement(router_ED, W_FD, expert_F[torch.randperm(E * M, generator=generator)]) for _ in range(n)]
    cosine_PE, r_squared_P = (torch.stack(values) for values in zip(*null, strict=True))
    return Alignment(observed[0], observed[1].item(), cosine_PE, r_squared_P)


def _agreement(router_ED: Tensor, W_FD: Tensor, expert_F: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines [E] and r_squared, in float64 on the CPU, of experts as listed. A one-hot product beats a gather."""
    members_EF = (torch.arange(len(router_ED))[:, None] == expert_F).to(W_FD)
    mean_ED = (members_EF @ W_FD).double() * (len(router_ED) / len(W_FD))
    router_ED = router_ED.double()
    dot_E = (router_ED * mean_ED).sum(1)
    square_E = router_ED.square().sum(1), mean_ED.square().sum(1)
    r_squared = dot_E.sum() ** 2 / (square_E[0].sum() * square_E[1].sum())
    return (dot_E / (square_E[0] * square_E[1]).sqrt()).cpu(), r_squared.cpu()
