"""The nearest other latent of every latent, in its own expert and in another."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lens_switch.analysis.cosines import Tile, checked_layout, cosine_tiles, cosines_of
from sae_lens_switch.saes.expert_layout import ExpertLayout


@dataclass(frozen=True)
class Neighbours:
    """The latents with the highest cosine. Where there is none, the cosine is NaN and the index -1.

    There is none for rows of zeros, within experts of one latent, and across experts if there is one expert.

    Attributes:
        within_F: Cosine with the nearest other latent of the same expert.
        within_index_F: Which latent that is, int64.
        across_F: Cosine with the nearest latent of any other expert.
        across_index_F: Which latent that is, int64.
    """

    within_F: Tensor
    within_index_F: Tensor
    across_F: Tensor
    across_index_F: Tensor

    def share_within(self, threshold: float) -> float:
        """Share of the latents whose nearest latent of their own expert has a cosine above the threshold."""
        return (self.within_F > threshold).double().mean().item()

    def share_across(self, threshold: float) -> float:
        """Share of the latents whose nearest latent of another expert has a cosine above the threshold."""
        return (self.across_F > threshold).double().mean().item()


@torch.no_grad()
def nearest_neighbours(
    W_FD: Tensor, n_experts: int = 1, *, n_shared: int = 0, block: int = 2048, bfloat16: bool = False
) -> Neighbours:
    """Find each latent's nearest neighbour in its own expert and in the others.

    Costs F^2 D FLOPs on the device of ``W_FD``, half of all pairs at 2 D each, in tiles of block x block cosines.
    Memory beside the weights does not grow with F but for 24 bytes per latent: some numbers per pair of a tile.

    Args:
        W_FD: One row per latent: ``W_dec``, or the transpose of ``W_enc``.
        n_experts: Number of experts, each owning (F - n_shared) / n_experts consecutive rows.
        n_shared: Rows before these, of shared latents, which count as one more expert.
        block: Rows per tile.
        bfloat16: Search in bfloat16, which is several times faster on CPUs and GPUs with matrix units for it. The
            cosines are those in float32 of the latents found, which are at most 2^-6 less than the nearest.

    Raises:
        ValueError: Unless W is a matrix and ``n_experts`` divides F - n_shared.
    """
    nearest = NearestSoFar(W_FD, checked_layout("W", W_FD, n_experts, n_shared, block), bfloat16)
    for tile in cosine_tiles(W_FD, block, bfloat16=bfloat16):
        nearest.add(tile)
    return nearest.result()


class NearestSoFar:
    """The best neighbours in the tiles so far."""

    def __init__(self, W_FD: Tensor, layout: ExpertLayout, bfloat16: bool) -> None:
        self.W_FD, self.layout, self.bfloat16 = W_FD, layout, bfloat16
        self.within, self.across = _Best(W_FD, bfloat16), _Best(W_FD, bfloat16)

    def add(self, tile: Tile) -> None:
        cosine_IJ, (n_rows, n_columns), owner = tile.cosine_IJ, tile.cosine_IJ.shape, self.layout.expert_of
        if owner(tile.i + n_rows - 1) < owner(tile.j):  # no expert has rows and columns
            self.across.offer(tile)
        elif owner(tile.i) == owner(tile.j + n_columns - 1):  # one expert has them all
            self.within.offer(tile)
        else:
            expert_F = self.layout.experts_of(torch.arange(len(self.W_FD), device=cosine_IJ.device))
            same_IJ = expert_F[tile.i : tile.i + n_rows, None] == expert_F[tile.j : tile.j + n_columns]
            self.within.offer(Tile(tile.i, tile.j, cosine_IJ.masked_fill(~same_IJ, -torch.inf)))
            self.across.offer(Tile(tile.i, tile.j, cosine_IJ.masked_fill(same_IJ, -torch.inf)))

    def result(self) -> Neighbours:
        return Neighbours(*self.within.result(self.W_FD), *self.across.result(self.W_FD))


class _Best:
    """The highest cosine of each latent so far, and with which other."""

    def __init__(self, W_FD: Tensor, bfloat16: bool) -> None:
        dtype = torch.bfloat16 if bfloat16 else torch.promote_types(W_FD.dtype, torch.float32)
        self.cosine_F = torch.full((len(W_FD),), -torch.inf, dtype=dtype, device=W_FD.device)
        self.index_F = torch.full((len(W_FD),), -1, device=W_FD.device)

    def offer(self, tile: Tile) -> None:
        self._improve(tile.i, tile.j, tile.cosine_IJ, tile.cosine_IJ.amax(1))
        if tile.j > tile.i:
            self._improve(tile.j, tile.i, tile.cosine_IJ.T, tile.cosine_IJ.amax(0))

    def _improve(self, start: int, other: int, cosine_RC: Tensor, highest_R: Tensor) -> None:
        """Maxima alone are many times cheaper than with their places, and few rows have a new one."""
        better = (highest_R > self.cosine_F[start : start + len(highest_R)]).nonzero().flatten()
        if len(better):
            self.cosine_F[start + better] = highest_R[better]
            self.index_F[start + better] = other + cosine_RC[better].argmax(1)

    def result(self, W_FD: Tensor) -> tuple[Tensor, Tensor]:
        cosine_F, found = self.cosine_F, (self.index_F >= 0).nonzero().flatten()
        if cosine_F.dtype == torch.bfloat16:
            cosine_F = torch.full_like(cosine_F, -torch.inf, dtype=torch.promote_types(W_FD.dtype, torch.float32))
            if len(found):
                cosine_F[found] = cosines_of(W_FD, found, self.index_F[found])
        return torch.where(self.index_F >= 0, cosine_F, torch.nan).cpu(), self.index_F.cpu()
