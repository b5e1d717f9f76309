"""The loss of a training step: primitives like those of torch_backend."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_switch_kernels.torch_private import mse_backward

# Where torch's variance, which reads a batch once, takes half as long again as several passes.
_IN_PASSES = {"cpu"}


class Loss(NamedTuple):
    """What a step minimises, and its parts.

    Attributes:
        out_BD: The reconstruction, with its bias.
        total: error + balance.
        error: mean_B ||out - x||^2.
        balance: The balance of the experts' load times its factor; 0 if none was given.
        factor: What it was multiplied by.
        columns_PD: Sums of out - x over parts of the batch, if they are by-products; empty otherwise.
    """

    out_BD: Tensor
    total: Tensor
    error: Tensor
    balance: Tensor
    factor: Tensor
    columns_PD: Tensor


class LossGrads(NamedTuple):
    """Gradients, under the names of the arguments of ``loss``."""

    out_BD: Tensor
    bias_D: Tensor
    balance: Tensor


def loss(
    out_BD: Tensor,
    bias_D: Tensor,
    x_BD: Tensor,
    balance: Tensor | None,
    coefficient: float | Tensor,
    scale: float | None,
) -> Loss:
    """mean_B ||out + bias - x||^2 + coefficient * scale * balance, in the wider dtype of out and x.

    Args:
        out_BD: The reconstruction without its bias.
        bias_D: That bias.
        x_BD: What is reconstructed.
        balance: The balance of the experts' load, one number; None: there are no experts.
        coefficient: See above.
        scale: Likewise; None: the spread of x.
    """
    out_BD = (out_BD + bias_D).contiguous()
    dtype = torch.promote_types(out_BD.dtype, x_BD.dtype)
    squares_BD = torch.nn.functional.mse_loss(out_BD.to(dtype), x_BD.to(dtype), reduction="none")
    error, columns_PD = squares_BD.sum(dim=-1).mean(), x_BD.new_empty(0, dtype=torch.float32)
    if balance is None:
        return Loss(out_BD, error.clone(), error, torch.zeros_like(error), torch.zeros_like(error), columns_PD)
    x_dtype = torch.promote_types(x_BD.dtype, torch.float32)
    factor = coefficient * (spread(x_BD.to(x_dtype)) if scale is None else scale)
    weighted = factor * balance
    factor = factor.to(weighted.dtype) if isinstance(factor, Tensor) else balance.new_full((), factor)
    return Loss(out_BD, error + weighted, error, weighted, factor, columns_PD)


def loss_backward(
    out_BD: Tensor,
    x_BD: Tensor,
    factor: Tensor,
    columns_PD: Tensor,  # noqa: ARG001, a by-product that nothing else needs
    grad_out_BD: Tensor | None,
    grad_total: Tensor | None,
    grad_error: Tensor | None,
    grad_balance: Tensor | None,
) -> LossGrads:
    """The gradient of the arguments of ``loss`` but x.

    Args:
        out_BD: With its bias, as ``loss`` returned it.
        x_BD: As given to ``loss``.
        factor: As ``loss`` returned it.
        columns_PD: Likewise.
        grad_out_BD: The upstream gradient of ``Loss.out_BD``.
        grad_total: Likewise of ``Loss.total``.
        grad_error: Likewise of ``Loss.error``.
        grad_balance: Likewise of ``Loss.balance``.
    """
    of_error, of_balance = sum_of(grad_total, grad_error), sum_of(grad_total, grad_balance)
    d_out_BD = torch.zeros_like(out_BD) if of_error is None else _error_backward(out_BD, x_BD, of_error)
    d_out_BD = d_out_BD.to(out_BD.dtype)
    d_out_BD = d_out_BD if grad_out_BD is None else d_out_BD + grad_out_BD
    d_balance = torch.zeros_like(factor) if of_balance is None else (of_balance * factor).to(factor.dtype)
    return LossGrads(d_out_BD, d_out_BD.sum(0), d_balance)


def _error_backward(out_BD: Tensor, x_BD: Tensor, grad: Tensor) -> Tensor:
    dtype = torch.promote_types(out_BD.dtype, x_BD.dtype)
    grad_BD = (grad.to(dtype).expand(len(x_BD)) / len(x_BD)).unsqueeze(1).expand(x_BD.shape)
    return mse_backward(grad_BD, out_BD.to(dtype), x_BD.to(dtype))


def target_grad(out_BD: Tensor, x_BD: Tensor, grad_total: Tensor | None, grad_error: Tensor | None) -> Tensor | None:
    """The gradient of x as what is reconstructed."""
    of_error = sum_of(grad_total, grad_error)
    return None if of_error is None else -_error_backward(out_BD, x_BD, of_error).to(x_BD.dtype)


def n_parts(B: int) -> int:
    """Into how many parts a GPU's form divides a batch."""
    return min(64, max(1, B // 32))


def sum_of(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def spread(x_BD: Tensor) -> Tensor:
    """Mean squared distance of the rows from their mean."""
    if x_BD.device.type in _IN_PASSES:
        return (x_BD - x_BD.mean(dim=0)).square_().sum(dim=-1).mean()
    return x_BD.var(dim=0, correction=0).sum()
