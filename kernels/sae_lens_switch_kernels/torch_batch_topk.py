"""The k largest pre-activations of a whole batch (BatchTopK, Bussmann et al. 2024), exact, from one tile after another.

A pool holds the best so far. Once it has k, the least of them is a bound that later ones must exceed. So the B * F
pre-activations are read once each, compared with a number, and forgotten. The first bound is a guess: where the first
rows are like the others, half as many again as needed exceed it. If in the end fewer than k do, ``is_complete`` says
so, and the tiles are needed once more, without a guess: then only about k / n of the n-th tile's exceed the bound.

Letters: R rows of P latents, a tile; C entries of the pool; N blocks of height H per row.
"""

import math

import torch
from torch import Tensor

from sae_lens_switch_kernels.torch_topk import top_indices

_SEARCH_ELEMENTS = 1 << 21  # of a tile that are searched at a time, to stay in cache
# The pool is cut to k entries once it has this many times as many.
_POOL = 2.0
_GUESSED = 1.5  # times k that the first bound is meant to leave
# Height of the blocks that are read closely only if their maximum exceeds the bound.
_HEIGHT = 16
# Where nothing may be waited for, blocks are as high as leaves the fewest numbers to sort; lower ones save nothing.
_LOWEST = 3


class BatchTopK:
    """The k largest of the tiles given to ``add``, whatever their order; equal ones at the border may win either way.

    Args:
        k: How many, at most as many as all tiles have.
        n_latents: F.
        n_numbers: How many all tiles have, if a bound may be guessed from the first.
    """

    def __init__(self, k: int, n_latents: int, n_numbers: int | None = None) -> None:
        self.k, self.n_latents, self.n_numbers = k, n_latents, n_numbers
        self._ranked: list[Tensor] = []
        self._values: list[Tensor] = []
        self._places: list[Tensor] = []
        self._n = 0
        self._bound: Tensor | None = None
        self._scratch: Tensor | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the tiles so far had k that exceed the bound."""
        return self._n >= self.k

    def add(self, pre_RP: Tensor, scale: Tensor | None, first_R: Tensor) -> None:
        """A tile of the matrix [B, F]: pre * scale decides.

        Args:
            pre_RP: The tile.
            scale: [P], or of each row [R, 1].
            first_R: The place of each row's first number in the flattened matrix; the others follow it.
        """
        if self.k == 0:
            return
        P = pre_RP.shape[1]
        # Of two dtypes torch would make a copy of the whole tile in the wider one first.
        scale = None if scale is None else scale.to(pre_RP.dtype)
        rows = max(1, _SEARCH_ELEMENTS // P) if _may_wait_for(pre_RP.device) else max(1, len(pre_RP))
        if scale is not None and (self._scratch is None or self._scratch.numel() < min(rows, len(pre_RP)) * P):
            self._scratch = pre_RP.new_empty(min(rows, len(pre_RP)) * P)  # once: small tensors would fill its place
        for start in range(0, len(pre_RP), rows):
            part = ranked = pre_RP[start : start + rows]
            if scale is not None and self._scratch is not None:
                own = scale if scale.ndim == 1 else scale[start : start + rows]
                ranked = torch.mul(part, own, out=self._scratch[: part.numel()].view(part.shape))
            self._take(part, ranked, self._candidates(ranked), first_R[start : start + rows])

    def _candidates(self, ranked_RP: Tensor) -> Tensor:
        """Places in the flattened tile of all that may be among the k largest."""
        n = ranked_RP.numel()
        if not _may_wait_for(ranked_RP.device):  # for how many exceed a bound
            return _top_places(ranked_RP, min(self.k, n))
        if self._bound is None and self.n_numbers is not None:
            expected = math.ceil(_GUESSED * self.k * n / self.n_numbers)
            self._bound = _least_of_top(ranked_RP, expected) if expected < self.k else None
        if self._bound is not None:
            return above(ranked_RP, self._bound)
        bound = _least_of_top(ranked_RP, self.k)
        return torch.arange(n) if bound is None else (~(ranked_RP < bound)).flatten().nonzero().flatten()

    def _take(self, part_RP: Tensor, ranked_RP: Tensor, place_C: Tensor, first_R: Tensor) -> None:
        P = part_RP.shape[1]
        row_C = torch.div(place_C, P, rounding_mode="floor")
        latent_C = place_C - row_C * P
        self._values.append(part_RP[row_C, latent_C])
        self._ranked.append(self._values[-1] if part_RP is ranked_RP else ranked_RP[row_C, latent_C])
        self._places.append(first_R[row_C] + latent_C)
        self._n += len(place_C)
        if self._n > _POOL * self.k:
            self._cut()

    def _cut(self) -> None:
        ranked_C, values_C, places_C = (torch.cat(t) for t in (self._ranked, self._values, self._places))
        best_S = ranked_C.topk(self.k, sorted=False).indices
        self._ranked, self._values, self._places = ([t[best_S]] for t in (ranked_C, values_C, places_C))
        self._n = self.k
        self._bound = _least(self._ranked[0])

    def codes(self, n_rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Values and indices [k], by row and within a row by latent; and where each row's begin, [B + 1]."""
        starts_B1 = torch.arange(n_rows + 1, device=device) * self.n_latents
        if not self._places:
            return torch.zeros(0, device=device), starts_B1[:0], torch.zeros_like(starts_B1)
        if self._n > self.k:
            self._cut()
        places_S, order_S = torch.cat(self._places).sort()
        return torch.cat(self._values)[order_S], places_S % self.n_latents, torch.searchsorted(places_S, starts_B1)


def _may_wait_for(device: torch.device) -> bool:
    return device.type == "cpu"


def _top_places(ranked_RP: Tensor, k: int) -> Tensor:
    """Places in the flattened tile of its k largest, with 2 sqrt(n k) of its n numbers sorted."""
    numbers = ranked_RP.flatten()
    height = round(math.sqrt(len(numbers) / k))
    n_blocks = len(numbers) // height if height >= _LOWEST else 0
    return top_indices(numbers.unsqueeze(0), k, n_blocks).squeeze(0)


def above(ranked_RP: Tensor, bound: Tensor | float) -> Tensor:
    """Places in the flattened tile of what exceeds the bound; as in torch.topk, NaN exceeds everything."""
    P = ranked_RP.shape[1]
    N = P // _HEIGHT
    # Block j is columns j, j + N, j + 2N, ...: the maxima are then elementwise maxima of contiguous rows.
    row, column = (~(ranked_RP[:, : N * _HEIGHT].unflatten(1, (_HEIGHT, N)).amax(1) <= bound)).nonzero(as_tuple=True)
    column_CH = column.unsqueeze(1) + torch.arange(_HEIGHT, device=column.device) * N
    is_above_CH = ~(ranked_RP[row.unsqueeze(1), column_CH] <= bound)
    places = (row.unsqueeze(1) * P + column_CH)[is_above_CH]
    rest_row, rest_column = (~(ranked_RP[:, N * _HEIGHT :] <= bound)).nonzero(as_tuple=True)
    return torch.cat([places, rest_row * P + rest_column + N * _HEIGHT])


def _least_of_top(ranked_RP: Tensor, k: int) -> Tensor | None:
    """A number that at least k of the tile reach: the k-th largest maximum of 2k blocks or more. None if too small."""
    height = min(_HEIGHT, ranked_RP.numel() // (2 * k))
    if height < 2:
        return None
    n_blocks = ranked_RP.numel() // height
    maxima = ranked_RP.flatten()[: n_blocks * height].view(height, n_blocks).amax(0)
    return _least(maxima.topk(k, sorted=False).values)


def _least(t: Tensor) -> Tensor:
    """NaN left out: it is larger than any bound."""
    return t.masked_fill(t.isnan(), torch.inf).amin()
