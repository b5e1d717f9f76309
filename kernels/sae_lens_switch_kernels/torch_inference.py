"""The encoder that only inference needs, one tile of pre-activations at a time.

Letters: R rows of P latents, a tile; S codes.
"""

import torch
from torch import Tensor
from torch.nn import functional

from sae_lens_switch_kernels.backend import primitives
from sae_lens_switch_kernels.indexing import one_group
from sae_lens_switch_kernels.inputs import EncoderInputs
from sae_lens_switch_kernels.own_tiles import own_tiles
from sae_lens_switch_kernels.torch_tiles import pre_activation_tiles


def threshold_encode(
    x_BD: Tensor, W_FD: Tensor, threshold_F: Tensor, bias_F: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What exceeds its threshold in x W^T + bias: values and indices [S], and offsets [B + 1].

    2BDF flops in ``dtype``. By token, and by latent within a token. Waits for the device to learn how many there are.
    """
    values, indices, ends = [W_FD.new_empty(0)], [threshold_F.new_empty(0, dtype=torch.long)], []
    found, n_codes, p = [], 0, primitives(x_BD)
    for tile in pre_activation_tiles(x_BD, W_FD, one_group(len(x_BD), x_BD.device), dtype, alone=True):
        bias_P = None if bias_F is None else bias_F[tile.latents]
        row_S, latent_S, values_S = p.codes_above(tile.pre_RP, threshold_F[tile.latents], bias_P, None)
        found.append((row_S, latent_S + tile.latents.start, values_S))
        if tile.latents.stop == len(W_FD):
            row_S, latent_S, values_S = _in_order(found, len(W_FD))
            values.append(values_S)
            indices.append(latent_S)
            next_row_R = torch.arange(1, len(tile.pre_RP) + 1, device=row_S.device)
            ends.append(torch.searchsorted(row_S, next_row_R) + n_codes)
            found, n_codes = [], n_codes + len(row_S)
    ends_B = torch.cat(ends) if ends else indices[0].new_zeros(len(x_BD))
    return torch.cat(values), torch.cat(indices), functional.pad(ends_B, (1, 0))


def routed_threshold_encode(inputs: EncoderInputs, threshold_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of tokens with experts, what exceeds its threshold once multiplied by its gate: ungated; otherwise as above."""
    W_FD, B, F = inputs.W_enc_FD, len(inputs.x_BD), len(inputs.W_enc_FD)
    centered_BD, p = inputs.centered(inputs.groups()), primitives(inputs.x_BD)
    values, places = [W_FD.new_empty(0)], [threshold_F.new_empty(0, dtype=torch.long)]
    for tile in own_tiles(p, inputs, centered_BD, inputs.dtype, alone=True):
        assert tile.latents is not None
        row_S, column_S, values_S = p.codes_above(tile.pre_RP, threshold_F[tile.latents], None, tile.gates_R1)
        places.append(tile.first_R[row_S] + column_S)
        values.append(values_S)
    places_S, order_S = torch.cat(places).sort()
    offsets_B1 = torch.searchsorted(places_S, torch.arange(B + 1, device=W_FD.device) * F)
    return torch.cat(values)[order_S], places_S % F, offsets_B1


def _in_order(found: list[tuple[Tensor, Tensor, Tensor]], n_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of a tile's rows, by row and within a row by latent."""
    if len(found) == 1:
        return found[0]
    row_S, latent_S, values_S = (torch.cat(t) for t in zip(*found, strict=True))
    order_S = (row_S * n_latents + latent_S).argsort()
    return row_S[order_S], latent_S[order_S], values_S[order_S]
