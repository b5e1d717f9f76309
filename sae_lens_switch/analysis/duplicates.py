"""Latents that were learned more than once: pairs with nearly parallel decoder rows."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Duplicates:
    """Pairs of latents whose decoder rows have a cosine above the threshold (P pairs).

    Attributes:
        threshold: The cosine above which two latents count as duplicates.
        pairs_P2: Latents i < j of each pair, most similar pair first; at most ``max_pairs`` of them.
        cosines_P: The cosine of each pair.
        n_pairs_EE: Number of pairs between two experts or, on the diagonal, within one. Counts all pairs.
        within_F: Whether a latent has a duplicate in its own expert.
        across_F: Whether a latent has a duplicate in another expert.
    """

    threshold: float
    pairs_P2: Tensor
    cosines_P: Tensor
    n_pairs_EE: Tensor
    within_F: Tensor
    across_F: Tensor

    @property
    def n_pairs(self) -> int:
        """Total number of pairs."""
        return int(self.n_pairs_EE.triu().sum())

    @property
    def share_within(self) -> float:
        """Share of the latents with a duplicate in their own expert."""
        return self.within_F.double().mean().item()

    @property
    def share_across(self) -> float:
        """Share of the latents with a duplicate in another expert."""
        return self.across_F.double().mean().item()


@torch.no_grad()
def duplicate_latents(
    W_dec_FD: Tensor, n_experts: int = 1, *, threshold: float = 0.9, max_pairs: int = 100_000, block: int = 2048
) -> Duplicates:
    """Find latents that were learned more than once, within an expert or across experts.

    The definition is that of arXiv 2410.08201: decoder rows with a cosine above 0.9. Costs F^2 D FLOPs on the device
    of ``W_dec_FD``, in tiles of block x block cosines. Zero rows match nothing.

    Args:
        W_dec_FD: The decoder, one row per latent.
        n_experts: Number of experts, each owning F / n_experts consecutive rows.
        threshold: Cosine above which two latents count as duplicates.
        max_pairs: How many of the most similar pairs to list. All pairs are counted.
        block: Rows per tile.

    Raises:
        ValueError: Unless ``n_experts`` divides F and ``0 < threshold < 1``.
    """
    if W_dec_FD.ndim != 2:
        raise ValueError(f"W_dec must be [d_sae, d_in]; got shape {tuple(W_dec_FD.shape)}")
    F, E = len(W_dec_FD), n_experts
    if E < 1 or F % E:
        raise ValueError(f"n_experts must divide d_sae={F}; got {E}")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1; got {threshold}")
    if max_pairs < 0 or block < 1:
        raise ValueError(f"max_pairs must be at least 0 and block at least 1; got {max_pairs} and {block}")
    dtype, device = torch.promote_types(W_dec_FD.dtype, torch.float32), W_dec_FD.device
    expert_F = torch.arange(F, device=device) // (F // E)
    within_F, across_F = (torch.zeros(F, dtype=torch.bool, device=device) for _ in range(2))
    n_pairs_EE = torch.zeros(E, E, dtype=torch.int64, device=device)
    pairs, cosines = torch.empty(0, 2, dtype=torch.int64, device=device), torch.empty(0, dtype=dtype, device=device)

    def unit_rows(start: int) -> Tensor:
        return torch.nn.functional.normalize(W_dec_FD[start : start + block].to(dtype), dim=1)

    for i in range(0, F, block):
        rows_D = unit_rows(i)
        for j in range(i, F, block):
            cosine = rows_D @ (unit_rows(j) if j > i else rows_D).T
            alike = cosine > threshold
            found = (alike.triu(1) if j == i else alike).nonzero()
            if not len(found):
                continue
            new = found + torch.tensor([i, j], device=device)
            experts = expert_F[new]
            same = experts[:, 0] == experts[:, 1]
            within_F[new[same].flatten()] = True
            across_F[new[~same].flatten()] = True
            n_pairs_EE += torch.bincount(experts[:, 0] * E + experts[:, 1], minlength=E * E).view(E, E)
            pairs, cosines = torch.cat([pairs, new]), torch.cat([cosines, cosine[found[:, 0], found[:, 1]]])
            if len(pairs) > 2 * max_pairs:
                pairs, cosines = _most_similar(pairs, cosines, max_pairs)
    pairs, cosines = _most_similar(pairs, cosines, max_pairs)
    n_pairs_EE = n_pairs_EE + n_pairs_EE.T.triu(1) + n_pairs_EE.T.tril(-1)
    return Duplicates(threshold, pairs.cpu(), cosines.cpu(), n_pairs_EE.cpu(), within_F.cpu(), across_F.cpu())


def _most_similar(pairs_P2: Tensor, cosines_P: Tensor, n: int) -> tuple[Tensor, Tensor]:
    order = cosines_P.sort(descending=True, stable=True).indices[:n]
    return pairs_P2[order], cosines_P[order]
