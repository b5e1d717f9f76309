"""The k largest of every row in plain torch, exact.

Letters: R rows of F numbers; N blocks of height H.
"""

import torch
from torch import Tensor

_SEARCH_ELEMENTS = 1 << 21  # of rows that are searched at a time, to stay in cache


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
    rows = max(1, _SEARCH_ELEMENTS // pre_RF.shape[1])
    needs_scratch = scale_F is not None or by_magnitude
    scratch = pre_RF.new_empty(min(rows, len(pre_RF)) if needs_scratch else 0, pre_RF.shape[1])
    found = []
    for part in pre_RF.split(rows):
        ranked = part if scale_F is None else torch.mul(part, scale_F, out=scratch[: len(part)])
        if by_magnitude:
            ranked = torch.abs(ranked, out=scratch[: len(part)])
        indices = top_indices(ranked, k, _block_count(ranked.shape[1], k))
        found.append((part.gather(1, indices), indices))
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
