"""Pre-activations, one tile at a time: enough for a matrix product at full speed, never [B, F].

Letters beside the package's: R counts the rows of a tile, P its latents.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_switch_kernels.float8 import FLOAT8, Float8Rows, float8_operands, operands
from sae_lens_switch_kernels.huge_pages import empty_huge
from sae_lens_switch_kernels.indexing import ExpertGroups

# Pre-activations are computed in tiles: enough rows for the matrix product to run at full speed, few enough latents
# that a dictionary of any width takes the same memory.
TILE_ROWS = {"cpu": 512}
_TILE_ROWS_ON_GPU = 4096
_TILE_LATENTS = 1 << 15
# Rows and latents of tiles that need not have all latents of a row, by the bytes of a number: few enough to be searched
# in cache, enough rows that the product need not often read the weights anew. It is slower where rows of the result are
# a power of two apart.
_NARROW_TILES = {"cpu": {2: (2048, 3072), 4: (1024, 3072)}}


class Tile(NamedTuple):
    """The product of some rows and some latents.

    Attributes:
        rows: The rows.
        latents: The latents; where a tile has several experts, those of the first.
        expert: The expert, or the first.
        pre_RP: The product, with the bias. The next tile overwrites it.
    """

    rows: slice
    latents: slice
    expert: int
    pre_RP: Tensor


def pre_activation_tiles(
    x_BD: Tensor,
    W_FD: Tensor,
    groups: ExpertGroups,
    dtype: torch.dtype,
    alone: bool,
    bias_F: Tensor | None = None,
    narrow: bool = False,
) -> Iterator[Tile]:
    """Each row's product with the latents of its expert: all latents of some rows, then the next rows.

    Args:
        x_BD: Tokens, sorted by expert.
        W_FD: Encoder weights.
        groups: The tokens of each expert.
        dtype: Of the product.
        alone: Whether each tile is of one expert. Otherwise several share one where all their latents fit.
        bias_F: Added to the product, rounded to its dtype.
        narrow: Whether few latents per tile are as good as many. Experts that share a tile keep all of theirs.
    """
    E, device = len(groups.offsets_E1) - 1, x_BD.device
    M = len(W_FD) // E
    rows, widest = narrow_tile(device, dtype) if narrow else (tile_rows(device), _TILE_LATENTS)
    # In low precision, the whole of W is converted once: less than half of it is then read once per tile.
    float8 = float8_operands(x_BD, W_FD) if dtype == FLOAT8 else None
    x, W = operands(x_BD, W_FD, dtype) if float8 is None else float8
    bias_F = None if bias_F is None else bias_F.to(product_dtype(dtype))
    n_numbers = min(rows, len(x_BD)) * min(M, widest)
    buffer = empty_huge(n_numbers, dtype=product_dtype(dtype), device=device)
    for tile in row_tiles(group_offsets(groups, len(x_BD)), rows, alone or E == 1 or widest < M):
        low, high, expert = tile[0].start, tile[-1].end, tile[0].expert
        fitting = min(_TILE_LATENTS, max(widest, n_numbers // (high - low)))  # of an expert with few tokens
        for part in range(0, M, fitting):
            width = min(M - part, fitting)
            pre_RP = buffer[: (high - low) * width].view(high - low, width)
            for e, start, end in tile:
                block = slice(e * M + part, e * M + part + width)
                bias_P = None if bias_F is None else bias_F[block]
                product(x[start:end], W[block], pre_RP[start - low : end - low], bias_P)
            yield Tile(slice(low, high), slice(expert * M + part, expert * M + part + width), expert, pre_RP)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a product of factors in ``dtype`` is held."""
    return torch.bfloat16 if dtype == FLOAT8 else dtype


def tile_rows(device: torch.device) -> int:
    return TILE_ROWS.get(device.type, _TILE_ROWS_ON_GPU)


def narrow_tile(device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """The most rows and latents of narrow tiles of a product in ``dtype``."""
    rows, latents = _NARROW_TILES.get(device.type, {}).get(product_dtype(dtype).itemsize, (tile_rows(device), 1 << 62))
    return rows, min(latents, _TILE_LATENTS)


class Rows(NamedTuple):
    expert: int
    start: int
    end: int


def row_tiles(offsets: list[int], rows: int, alone: bool) -> Iterator[list[Rows]]:
    """Tiles of at most ``rows`` sorted rows, each as a list of runs of one expert; with ``alone``, of a single run."""
    tile, room = [], rows
    for expert, (start, end) in enumerate(pairwise(offsets)):
        while start < end:
            stop = min(end, start + room)
            tile.append(Rows(expert, start, stop))
            room -= stop - start
            start = stop
            if alone or room == 0:
                yield tile
                tile, room = [], rows
    if tile:
        yield tile


def group_offsets(groups: ExpertGroups, n_tokens: int) -> list[int]:
    # With one group they are known, and nothing needs to be read back from a GPU.
    return [0, n_tokens] if len(groups.offsets_E1) == 2 else groups.offsets_E1.tolist()


def product(x_RD: Tensor | Float8Rows, W_PD: Tensor | Float8Rows, out_RP: Tensor, bias_P: Tensor | None = None) -> None:
    """x W^T + bias. The bias is added where a narrow tile is still in cache, or copied anyway."""
    if isinstance(x_RD, Float8Rows) or isinstance(W_PD, Float8Rows):
        assert isinstance(x_RD, Float8Rows)
        assert isinstance(W_PD, Float8Rows)
        found_RP = x_RD.times(W_PD)
    else:
        found_RP = torch.mm(x_RD, W_PD.T, out=out_RP)
    if bias_P is not None:
        torch.add(found_RP, bias_P, out=out_RP)
    elif found_RP is not out_RP:
        out_RP.copy_(found_RP)
