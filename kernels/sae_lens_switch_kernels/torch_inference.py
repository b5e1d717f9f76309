"""The encoder that only inference needs, in plain torch on every device: one tile of pre-activations at a time.

Letters: R rows of P latents, a tile; W words of eight latents; S codes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from sae_lens_switch_kernels.indexing import one_group
from sae_lens_switch_kernels.torch_tiles import pre_activation_tiles
from sae_lens_switch_kernels.torch_topk import SEARCH_ELEMENTS

_NONE_OF_EIGHT = 0x0101010101010101  # eight bytes of True


def threshold_encode(
    x_BD: Tensor, W_FD: Tensor, threshold_F: Tensor, bias_F: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What exceeds its threshold in x W^T + bias: values and indices [S], and offsets [B + 1].

    2BDF flops in ``dtype``. By token, and by latent within a token. Waits for the device to learn how many there are.
    """
    values, indices, ends = [W_FD.new_empty(0)], [threshold_F.new_empty(0, dtype=torch.long)], []
    found, n_codes = [], 0
    for tile in pre_activation_tiles(x_BD, W_FD, one_group(len(x_BD), x_BD.device), dtype, alone=True):
        bias_P = None if bias_F is None else bias_F[tile.latents]
        for row_S, latent_S, values_S in _above(tile.pre_RP, threshold_F[tile.latents], bias_P):
            found.append((row_S, latent_S + tile.latents.start, values_S))
        if tile.latents.stop == len(W_FD):
            row_S, latent_S, values_S = _by_row(found)
            values.append(values_S)
            indices.append(latent_S)
            next_row_R = torch.arange(1, len(tile.pre_RP) + 1, device=row_S.device)
            ends.append(torch.searchsorted(row_S, next_row_R) + n_codes)
            found, n_codes = [], n_codes + len(row_S)
    ends_B = torch.cat(ends) if ends else indices[0].new_zeros(len(x_BD))
    return torch.cat(values), torch.cat(indices), functional.pad(ends_B, (1, 0))


def _above(pre_RP: Tensor, threshold_P: Tensor, bias_P: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Row, latent and value of all that exceed their threshold, for some rows at a time; NaN exceeds everything.

    As in SAELens, so that a token that is NaN does not become one without latents. May overwrite pre.
    """
    R, P = pre_RP.shape
    rows = max(1, SEARCH_ELEMENTS // P)
    is_low = torch.ones(min(R, rows), -(-P // 8) * 8, dtype=torch.bool, device=pre_RP.device)
    for start in range(0, R, rows):
        part = pre_RP[start : start + rows].to(threshold_P.dtype)
        part = part if bias_P is None else part.add_(bias_P)
        torch.le(part, threshold_P, out=is_low[: len(part), :P])
        row_S, latent_S = _false_in_words(is_low[: len(part)])
        yield row_S + start, latent_S, part[row_S, latent_S]


def _false_in_words(is_low: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every False: almost all are True, and eight of them are one number to compare."""
    row_W, word_W = (is_low.view(torch.int64) != _NONE_OF_EIGHT).nonzero(as_tuple=True)
    place_S, byte_S = (~is_low.unflatten(1, (-1, 8))[row_W, word_W]).nonzero(as_tuple=True)
    return row_W[place_S], word_W[place_S] * 8 + byte_S


def _by_row(found: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of a tile's rows; of each block of latents they are in order already."""
    row_S, latent_S, values_S = (torch.cat(t) for t in zip(*found, strict=True))
    row_S, order_S = row_S.sort(stable=True)
    return row_S, latent_S[order_S], values_S[order_S]
