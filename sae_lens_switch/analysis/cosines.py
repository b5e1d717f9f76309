"""Cosines of all pairs of latents, tile by tile: no [F, F] tensor is ever made."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lens_switch.saes.expert_layout import ExpertLayout

# Largest error of a cosine of two unit rows that were rounded to bfloat16, multiplied exactly and rounded again:
# 2 * 2^-9 from the rows and 2^-9 from the result, which is below this.
BFLOAT16_ERROR = 2**-7
_PAIRS_AT_ONCE = 2**15


@dataclass(frozen=True)
class Tile:
    """Cosines of latents i, i + 1, ... (rows) with latents j, j + 1, ... (columns), j >= i.

    It is -inf where there is no pair: for a latent with itself, and for rows of zeros.
    """

    i: int
    j: int
    cosine_IJ: Tensor


def cosine_tiles(W_FD: Tensor, block: int, *, bfloat16: bool = False) -> Iterator[Tile]:
    """Tiles of block x block cosines between the rows of W that cover every pair; those on the diagonal, twice.

    Costs F^2 D FLOPs, and memory for two blocks of rows and one tile.
    """
    F = len(W_FD)
    dtype = torch.promote_types(W_FD.dtype, torch.float32)
    norm_F = torch.cat([rows.to(dtype).norm(dim=1) for rows in W_FD.split(block)])
    zero_F = norm_F == 0
    some_zero = bool(zero_F.any())
    scale_F1 = torch.where(zero_F, 0, 1 / norm_F)[:, None]

    def unit_rows(start: int) -> Tensor:
        rows = slice(start, start + block)
        return (W_FD[rows].to(dtype) * scale_F1[rows]).to(torch.bfloat16 if bfloat16 else dtype)

    for i in range(0, F, block):
        rows_D = unit_rows(i)
        for j in range(i, F, block):
            cosine_IJ = rows_D @ (unit_rows(j) if j > i else rows_D).T
            if j == i:
                cosine_IJ.fill_diagonal_(-torch.inf)
            if some_zero:
                cosine_IJ[zero_F[i : i + block]] = -torch.inf
                cosine_IJ[:, zero_F[j : j + block]] = -torch.inf
            yield Tile(i, j, cosine_IJ)


def cosines_of(W_FD: Tensor, first_P: Tensor, second_P: Tensor) -> Tensor:
    """Cosines of given pairs of rows, in float32 or W's own precision if that is higher; [P]."""
    dtype = torch.promote_types(W_FD.dtype, torch.float32)
    pieces = zip(first_P.split(_PAIRS_AT_ONCE), second_P.split(_PAIRS_AT_ONCE), strict=True)
    cosines = [torch.cosine_similarity(W_FD[i].to(dtype), W_FD[j].to(dtype), dim=1, eps=0) for i, j in pieces]
    return torch.cat(cosines)


def checked_layout(name: str, W_FD: Tensor, n_experts: int, n_shared: int, block: int) -> ExpertLayout:
    """Refuse what is no matrix of latents in experts of equal size."""
    if W_FD.ndim != 2:
        raise ValueError(f"{name} must be [d_sae, d_in]; got shape {tuple(W_FD.shape)}")
    layout = ExpertLayout(len(W_FD), n_experts, n_shared)
    if n_experts < 1 or not (layout.is_possible or len(W_FD) == 0):
        rest = f", less n_shared={n_shared}" if n_shared else ""
        raise ValueError(f"n_experts must divide d_sae={len(W_FD)}{rest}; got {n_experts}")
    if block < 1:
        raise ValueError(f"block must be at least 1; got {block}")
    return layout
