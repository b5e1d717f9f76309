"""Latents that were learned more than once: pairs with nearly parallel decoder rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lens_switch.analysis.cosines import BFLOAT16_ERROR, Tile, checked_layout, cosine_tiles, cosines_of
from sae_lens_switch.analysis.neighbours import NearestSoFar, Neighbours
from sae_lens_switch.saes.expert_layout import ExpertLayout


@dataclass(frozen=True)
class Duplicates:
    """Pairs of latents whose decoder rows have a cosine above the threshold (P pairs).

    Attributes:
        threshold: The cosine above which two latents count as duplicates.
        pairs_P2: Latents i < j of each pair, most similar pair first; at most ``max_pairs`` of them.
        cosines_P: The cosine of each pair.
        n_pairs_EE: Number of pairs between two experts or, on the diagonal, within one. Counts all pairs. Shared
            latents, if there are any, have the last row and column.
        within_F: Whether a latent has a duplicate in its own expert.
        across_F: Whether a latent has a duplicate in another expert.
        nearest: Each latent's nearest neighbours, from the same pass over the cosines.
    """

    threshold: float
    pairs_P2: Tensor
    cosines_P: Tensor
    n_pairs_EE: Tensor
    within_F: Tensor
    across_F: Tensor
    nearest: Neighbours

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
    W_dec_FD: Tensor,
    n_experts: int = 1,
    *,
    n_shared: int = 0,
    threshold: float = 0.9,
    max_pairs: int = 100_000,
    block: int = 2048,
    bfloat16: bool = False,
) -> Duplicates:
    """Find latents that were learned more than once, within an expert or across experts, and nearest neighbours.

    The definition is that of arXiv 2410.08201: decoder rows with a cosine above 0.9. Costs F^2 D FLOPs on the device
    of ``W_dec_FD``, in tiles of block x block cosines; memory is that of ``nearest_neighbours`` and 24 bytes for each
    of up to 2 ``max_pairs`` pairs. Zero rows match nothing.

    Args:
        W_dec_FD: The decoder, one row per latent.
        n_experts: Number of experts, each owning (F - n_shared) / n_experts consecutive rows.
        n_shared: Rows before these, of shared latents, which count as one more expert.
        threshold: Cosine above which two latents count as duplicates.
        max_pairs: How many of the most similar pairs to list. All pairs are counted.
        block: Rows per tile.
        bfloat16: Search in bfloat16, as ``nearest_neighbours`` does. Pairs and cosines are those of float32: what is
            near the threshold is computed again.

    Raises:
        ValueError: Unless ``n_experts`` divides F - n_shared and ``0 < threshold < 1``.
    """
    layout = checked_layout("W_dec", W_dec_FD, n_experts, n_shared, block)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1; got {threshold}")
    if max_pairs < 0:
        raise ValueError(f"max_pairs must be at least 0; got {max_pairs}")
    pairs = _PairsSoFar(W_dec_FD, layout, threshold, max_pairs, bfloat16)
    nearest = NearestSoFar(W_dec_FD, layout, bfloat16)
    for tile in cosine_tiles(W_dec_FD, block, bfloat16=bfloat16):
        nearest.add(tile)
        pairs.add(tile)
    return pairs.result(nearest.result())


class _PairsSoFar:
    """The pairs above the threshold in the tiles so far."""

    def __init__(self, W_FD: Tensor, layout: ExpertLayout, threshold: float, max_pairs: int, bfloat16: bool) -> None:
        self.W_FD, self.layout, self.bfloat16 = W_FD, layout, bfloat16
        self.threshold, self.max_pairs = threshold, max_pairs
        E = layout.n_experts + (layout.shared_width > 0)
        device, dtype = W_FD.device, torch.promote_types(W_FD.dtype, torch.float32)
        self.within_F, self.across_F = (torch.zeros(len(W_FD), dtype=torch.bool, device=device) for _ in range(2))
        self.n_pairs_EE = torch.zeros(E, E, dtype=torch.int64, device=device)
        self.pairs_P2 = torch.empty(0, 2, dtype=torch.int64, device=device)
        self.cosines_P = torch.empty(0, dtype=dtype, device=device)

    def add(self, tile: Tile) -> None:
        pairs_P2, cosines_P = self._alike(tile)
        if not len(pairs_P2):
            return
        E = len(self.n_pairs_EE)
        experts_P2 = self.layout.experts_of(pairs_P2) % E  # that of shared latents is -1
        same_P = experts_P2[:, 0] == experts_P2[:, 1]
        self.within_F[pairs_P2[same_P].flatten()] = True
        self.across_F[pairs_P2[~same_P].flatten()] = True
        between_P = experts_P2[:, 0] * E + experts_P2[:, 1]
        self.n_pairs_EE += torch.bincount(between_P, minlength=E**2).view(E, E)
        self.pairs_P2, self.cosines_P = torch.cat([self.pairs_P2, pairs_P2]), torch.cat([self.cosines_P, cosines_P])
        if len(self.pairs_P2) > 2 * self.max_pairs:
            self._keep_most_similar()

    def _alike(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Pairs of the tile above the threshold, and their cosines. Only rows with such a pair are searched."""
        least = self.threshold - (BFLOAT16_ERROR if self.bfloat16 else 0)
        rows = (tile.cosine_IJ.amax(1) > least).nonzero().flatten()
        if not len(rows):
            return self.pairs_P2[:0], self.cosines_P[:0]
        row, column = (tile.cosine_IJ[rows] > least).nonzero(as_tuple=True)
        row = rows[row]
        pairs_P2 = torch.stack([tile.i + row, tile.j + column], dim=1)
        once = pairs_P2[:, 0] < pairs_P2[:, 1]
        pairs_P2, cosines_P = pairs_P2[once], tile.cosine_IJ[row[once], column[once]]
        if self.bfloat16 and len(pairs_P2):
            cosines_P = cosines_of(self.W_FD, pairs_P2[:, 0], pairs_P2[:, 1])
            pairs_P2, cosines_P = pairs_P2[cosines_P > self.threshold], cosines_P[cosines_P > self.threshold]
        return pairs_P2, cosines_P

    def _keep_most_similar(self) -> None:
        order = self.cosines_P.sort(descending=True, stable=True).indices[: self.max_pairs]
        self.pairs_P2, self.cosines_P = self.pairs_P2[order], self.cosines_P[order]

    def result(self, nearest: Neighbours) -> Duplicates:
        self._keep_most_similar()
        n_pairs_EE = self.n_pairs_EE + self.n_pairs_EE.T.triu(1) + self.n_pairs_EE.T.tril(-1)
        pairs_P2, cosines_P, n_pairs_EE = self.pairs_P2.cpu(), self.cosines_P.cpu(), n_pairs_EE.cpu()
        within_F, across_F = self.within_F.cpu(), self.across_F.cpu()
        return Duplicates(self.threshold, pairs_P2, cosines_P, n_pairs_EE, within_F, across_F, nearest)
