"""The losses of a training step: in one operator where nothing changes the reconstruction, else part by part."""

from typing import NamedTuple

import torch
from sae_lens.saes.sae import TrainingSAE, mse_loss
from sae_lens_switch_kernels import reconstruction_loss, spread
from torch import Tensor

from sae_lens_switch.common.torch_private import has_hooks
from sae_lens_switch.saes.router import router_dtype


class Balance(NamedTuple):
    """How even the load of the experts is, and what it is multiplied by in the loss.

    Attributes:
        value: 1 when uniform.
        coefficient: The scheduled coefficient.
        scale: None: the spread of the activations.
        others: The router's other losses, by name, as they are added.
    """

    value: Tensor
    coefficient: float | Tensor
    scale: float | Tensor | None
    others: dict[str, Tensor]


class Losses(NamedTuple):
    """The reconstruction, with b_dec and whatever follows it; the sum of the losses, and each by its name."""

    sae_out_BD: Tensor
    total: Tensor
    parts: dict[str, Tensor]


def is_plain(sae: TrainingSAE) -> bool:
    """Whether nothing but b_dec stands between the decoder's product and a mean squared error."""
    changes_output = sae.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")
    observed = changes_output or sae.hook_z_reshaping_mode or has_hooks(sae.hook_sae_recons)
    return not observed and sae.mse_loss_fn is mse_loss


def losses_of_product(out_BD: Tensor, b_dec: Tensor, x_BD: Tensor, balance: Balance | None) -> Losses:
    """Of a plain SAE, whose product of codes and decoder is ``out_BD``."""
    if balance is None:
        found = reconstruction_loss(out_BD, b_dec, x_BD)
        return Losses(found.out_BD, found.total, {"mse_loss": found.error})
    scale = balance.scale
    assert not isinstance(scale, Tensor)
    found = reconstruction_loss(out_BD, b_dec, x_BD, balance.value, balance.coefficient, scale)
    parts = {"mse_loss": found.error, "load_balance_loss": found.balance, **balance.others}
    return Losses(found.out_BD, sum(balance.others.values(), start=found.total), parts)


def losses_of_output(
    sae: TrainingSAE, sae_out_BD: Tensor, x_BD: Tensor, balance: Balance | None, share: float | None = None
) -> Losses:
    """The reconstruction error and the balance.

    ``share`` is what the mean of these tokens counts for in that of the batch, if they are not all of it.
    """
    error = reconstruction_error(sae, sae_out_BD, x_BD)
    parts = {"mse_loss": error if share is None else error * share}
    if balance is not None:
        parts |= losses_of_router(balance, x_BD)
    return Losses(sae_out_BD, sum(list(parts.values())[1:], start=parts["mse_loss"]), parts)


def reconstruction_error(sae: TrainingSAE, sae_out_BD: Tensor, x_BD: Tensor) -> Tensor:
    """mean_B ||x - sae_out||^2 by SAELens's loss function, in the wider of the two dtypes.

    So does torch, where it can: not all its versions differentiate a loss of two dtypes.
    """
    dtype = torch.promote_types(sae_out_BD.dtype, x_BD.dtype)
    return sae.mse_loss_fn(sae_out_BD.to(dtype), x_BD.to(dtype)).sum(dim=-1).mean()


def of_share(losses: dict[str, Tensor], share: float | None) -> dict[str, Tensor]:
    """Means over some tokens, as what they add to those of the batch; ``share`` as in ``losses_of_output``."""
    return losses if share is None else {name: share * loss for name, loss in losses.items()}


def losses_of_router(balance: Balance, x_BD: Tensor) -> dict[str, Tensor]:
    """coefficient * scale * value, and the others."""
    return {"load_balance_loss": balance.coefficient * scale_of(balance.scale, x_BD) * balance.value, **balance.others}


def scale_of(scale: float | Tensor | None, x_BD: Tensor) -> float | Tensor:
    return spread(x_BD.detach().to(router_dtype(x_BD.dtype))) if scale is None else scale
