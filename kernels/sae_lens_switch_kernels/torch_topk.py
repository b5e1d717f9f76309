"""Encoders whose k largest pre-activations per row are kept: exact, compiled where it can be, else in plain torch.

Letters: R rows of F numbers, P of them in a part; N blocks of height H.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sae_lens_switch_kernels import cpu_search
from sae_lens_switch_kernels.indexing import ExpertGroups
from sae_lens_switch_kernels.torch_tiles import narrow_tile, pre_activation_tiles, product_dtype

_SEARCH_ELEMENTS = 1 << 21  # of rows that are searched at a time, to stay in cache


def topk_encode(
    x_BD: Tensor,
    W_FD: Tensor,
    k: int,
    groups: ExpertGroups,
    bias_F: Tensor | None,
    scale_F: Tensor | None,
    dtype: torch.dtype,
    relu: bool = False,
    by_magnitude: bool = False,
    select: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest of (x W_e^T + bias) * scale per row: pre-activations without the scale, and indices over all F.

    2BDM flops in ``dtype``: only the block of a row's own expert is computed, one tile of rows at a time. With ``relu``
    pre-activations that are chosen, and negative, are 0. ``by_magnitude``: the k farthest from 0. ``select`` searches a
    tile; default: ``select_topk``.
    """
    M, alone = len(W_FD) // (len(groups.offsets_E1) - 1), bias_F is not None or scale_F is not None
    width = min(M, narrow_tile(x_BD.device, dtype)[1])
    is_compiled = select is None and cpu_search.can_search(product_dtype(dtype), x_BD.device, k, width)
    # Triton's selection adds the bias itself; here that would be one more pass over the tile.
    within = bias_F if select is None else None
    tiles = pre_activation_tiles(x_BD, W_FD, groups, dtype, alone, within, narrow=is_compiled)
    if is_compiled:
        best = cpu_search.TopK(len(x_BD), k, product_dtype(dtype))
        for tile in tiles:  # each searched while it is in cache
            ranked_RP = tile.pre_RP if scale_F is None else tile.pre_RP * scale_F[tile.latents].to(tile.pre_RP.dtype)
            ranked_RP = ranked_RP.abs() if by_magnitude else ranked_RP
            best.add(tile.pre_RP, tile.rows, tile.latents.start - tile.expert * M, ranked_RP)
        values_BK, indices_BK = best.values_RK.to(W_FD.dtype), best.indices_RK
    else:
        values_BK = W_FD.new_empty(len(x_BD), k)
        indices_BK = torch.empty(len(x_BD), k, dtype=torch.long, device=x_BD.device)
        found = []
        for tile in tiles:
            n, first = min(k, tile.pre_RP.shape[1]), tile.expert * M
            bias, scale = (None if t is None else t[tile.latents] for t in (bias_F, scale_F))
            if select is None:
                values, indices = select_topk(tile.pre_RP, n, scale, by_magnitude)
            else:
                values, indices = select(tile.pre_RP, n, bias, scale, by_magnitude=by_magnitude)
            found.append((values.to(W_FD.dtype), indices.add_(tile.latents.start - first)))
            if tile.latents.stop == first + M:
                scale = None if scale_F is None else scale_F[first : first + M]
                values_BK[tile.rows], indices_BK[tile.rows] = (
                    found[0] if len(found) == 1 else _best(found, k, scale, by_magnitude)
                )
                found = []
    if len(groups.offsets_E1) > 2:
        indices_BK += groups.first_latents(len(x_BD), len(W_FD))
    return values_BK.relu_() if relu else values_BK, indices_BK


def _best(
    found: list[tuple[Tensor, Tensor]], k: int, scale_F: Tensor | None, by_magnitude: bool
) -> tuple[Tensor, Tensor]:
    """The k best overall, which are among the k best of each part."""
    values, indices = (torch.cat(t, dim=1) for t in zip(*found, strict=True))
    ranked = values if scale_F is None else values * scale_F[indices]
    best_RK = (ranked.abs() if by_magnitude else ranked).topk(k, dim=1, sorted=False).indices
    return values.gather(1, best_RK), indices.gather(1, best_RK)


def select_topk(
    pre_RF: Tensor,
    k: int,
    scale_F: Tensor | None = None,
    by_magnitude: bool = False,
) -> tuple[Tensor, Tensor]:
    """pre and indices of the k largest pre * scale per row, exact and in no particular order.

    With ``by_magnitude`` the k farthest from 0.
    """
    # Of two dtypes torch would make a copy of the whole tile in the wider one first.
    scale_F = None if scale_F is None else scale_F.to(pre_RF.dtype)
    R, F = pre_RF.shape
    rows = max(1, _SEARCH_ELEMENTS // F)
    needs_scratch = scale_F is not None or by_magnitude
    scratch = pre_RF.new_empty(min(rows, R) if needs_scratch else 0, F)
    compiled = cpu_search.TopK(R, k, pre_RF.dtype) if cpu_search.can_search(pre_RF.dtype, pre_RF.device, k, F) else None
    found = []
    for start in range(0, R, rows):
        part = pre_RF[start : start + rows]
        ranked = part if scale_F is None else torch.mul(part, scale_F, out=scratch[: len(part)])
        if by_magnitude:
            ranked = torch.abs(ranked, out=scratch[: len(part)])
        if compiled is not None:
            compiled.add(part, slice(start, start + len(part)), 0, ranked)
        else:
            indices = top_indices(ranked, k, _block_count(F, k))
            found.append((part.gather(1, indices), indices))
    if compiled is not None:
        return compiled.values_RK, compiled.indices_RK
    values_RK, indices_RK = found[0] if len(found) == 1 else (torch.cat(t) for t in zip(*found, strict=True))
    return values_RK, indices_RK


def top_indices(ranked_RF: Tensor, k: int, n: int) -> Tensor:
    """Indices of the k largest of each row.

    They lie in the k blocks with the largest maxima. So one pass finds the maxima of n blocks, at least k, and two
    small top-k, over the maxima and over the k winning blocks, replace one over all F; with n = 0 nothing does.
    """
    if n == 0:
        return ranked_RF.topk(k, dim=1, sorted=False).indices
    # Block j is columns j, j + n, j + 2n, ...: the maxima are then elementwise maxima of contiguous rows. The
    # columns left over, fewer than n, are all candidates.
    height = ranked_RF.shape[1] // n
    blocks_RHN = ranked_RF[:, : height * n].unflatten(1, (height, n))
    winners_RK = blocks_RHN.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = blocks_RHN.gather(2, winners_RK.unsqueeze(1).expand(-1, height, -1)).flatten(1)
    if height * n < ranked_RF.shape[1]:
        candidates = torch.cat([candidates, ranked_RF[:, height * n :]], dim=1)
    place_RK = candidates.topk(k, dim=1, sorted=False).indices
    in_blocks_RK = winners_RK.gather(1, place_RK % k).add_(place_RK // k, alpha=n)
    if candidates.shape[1] == height * k:
        return in_blocks_RK
    return torch.where(place_RK < height * k, in_blocks_RK, place_RK + height * (n - k))


def _block_count(n_latents: int, k: int) -> int:
    """Blocks for the pruned top-k, or 0 where one top-k over all is as fast.

    Measured on a CPU: from 64 k values on, torch's top-k costs five times less per value. So there are at least that
    many maxima, and of those counts the one that leaves the fewest columns over.
    """
    if n_latents < 4 * 64 * k:
        return 0
    return min(range(64 * k, min(128 * k, n_latents // 4) + 1, 64), key=lambda n: n_latents % n)
