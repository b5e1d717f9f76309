"""The losses of a Matryoshka SAE's widths, from one decoding: of each level's own part."""

from collections.abc import Iterator, Sequence

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from sae_lens_switch.saes.losses import reconstruction_error


def reconstructions(sae: TrainingSAE, parts_BLD: Tensor) -> Iterator[Tensor]:
    """At each width: that of the width before, and what the latents in between add."""
    out_BD = sae.b_dec
    for part_BD in parts_BLD.unbind(1):
        out_BD = part_BD + out_BD
        yield sae.run_time_activation_norm_fn_out(out_BD)


def inner_losses(sae: TrainingSAE, parts_BLD: Tensor, widths: Sequence[int], x_BD: Tensor) -> dict[str, Tensor]:
    """mean_B ||x - x_hat||^2 at each width but the last, which is the whole and has a loss already."""
    return {
        f"inner_mse_loss_{width}": reconstruction_error(sae, out_BD, x_BD)
        for width, out_BD in zip(widths[:-1], reconstructions(sae, parts_BLD), strict=False)
    }


def dense_parts(acts_BF: Tensor, level_F: Tensor, n_levels: int, W_dec_FD: Tensor) -> Tensor:
    """Of dense latents each level's own part, [B, L, D]."""
    return torch.stack([(acts_BF * (level_F == level)) @ W_dec_FD for level in range(n_levels)], dim=1)
