"""The losses of a Matryoshka SAE's widths, from one decoding: of each level's own part.

Letters: L levels, N = L - 1 widths but the last.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.saes.losses import is_plain, reconstruction_error


def decoded(
    sae: TrainingSAE, parts_BLD: Tensor, widths: Sequence[int], x_BD: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of all parts, [B, D], and ``inner_losses``."""
    is_fused = is_plain(sae) and len(widths) > 1 and parts_BLD.dtype == sae.b_dec.dtype == x_BD.dtype
    if not is_fused:
        return parts_BLD.sum(1), inner_losses(sae, parts_BLD, widths, x_BD)
    product_BD, losses_N = _Levels.apply(parts_BLD, sae.b_dec, x_BD)
    return product_BD, dict(zip(names_of_losses(widths), losses_N.unbind(), strict=True))


class _Levels(torch.autograd.Function):
    """The sum of all parts, and the errors at each width but the last, without autograd's copies in between."""

    @staticmethod
    @override
    def forward(ctx: Any, parts_BLD: Tensor, b_dec: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        B, L, D = parts_BLD.shape
        errors_NBD = parts_BLD.new_empty(L - 1, B, D)
        torch.sub(b_dec, x_BD, out=errors_NBD[0]).add_(parts_BLD[:, 0])
        for n in range(1, L - 1):
            torch.add(errors_NBD[n - 1], parts_BLD[:, n], out=errors_NBD[n])
        ctx.save_for_backward(errors_NBD)
        return parts_BLD.sum(1), torch.linalg.vector_norm(errors_NBD, dim=2).square().mean(1)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        grad_BD, grad_N = grads
        (errors_NBD,) = ctx.saved_tensors
        N, B, D = errors_NBD.shape
        d_parts_BLD = errors_NBD.new_empty(B, N + 1, D)
        d_parts_BLD[:, N] = grad_BD
        factor_N = grad_N * (2 / B)
        for n in reversed(range(N)):  # a level's part is in its own width and in all after it
            torch.addcmul(d_parts_BLD[:, n + 1], errors_NBD[n], factor_N[n], out=d_parts_BLD[:, n])
        _, needs_b_dec, needs_x = ctx.needs_input_grad
        inner_BD = d_parts_BLD[:, 0] - grad_BD if needs_b_dec or needs_x else None
        d_b_dec = inner_BD.sum(0) if inner_BD is not None and needs_b_dec else None
        return d_parts_BLD, d_b_dec, -inner_BD if inner_BD is not None and needs_x else None


def reconstructions(sae: TrainingSAE, parts_BLD: Tensor) -> Iterator[Tensor]:
    """At each width: that of the width before, and what the latents in between add."""
    out_BD = sae.b_dec
    for part_BD in parts_BLD.unbind(1):
        out_BD = part_BD + out_BD
        yield sae.run_time_activation_norm_fn_out(out_BD)


def inner_losses(sae: TrainingSAE, parts_BLD: Tensor, widths: Sequence[int], x_BD: Tensor) -> dict[str, Tensor]:
    """mean_B ||x - x_hat||^2 at each width but the last, which is the whole and has a loss already."""
    errors = (reconstruction_error(sae, out_BD, x_BD) for out_BD in reconstructions(sae, parts_BLD))
    return dict(zip(names_of_losses(widths), errors, strict=False))


def names_of_losses(widths: Sequence[int]) -> list[str]:
    """Of ``inner_losses``."""
    return [f"inner_mse_loss_{width}" for width in widths[:-1]]


def dense_parts(acts_BF: Tensor, level_F: Tensor, n_levels: int, W_dec_FD: Tensor) -> Tensor:
    """Of dense latents each level's own part, [B, L, D]."""
    return torch.stack([(acts_BF * (level_F == level)) @ W_dec_FD for level in range(n_levels)], dim=1)
