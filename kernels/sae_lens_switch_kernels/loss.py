"""The loss of a training step as one operator, differentiable once."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from sae_lens_switch_kernels.arguments import check_device, check_matrix
from sae_lens_switch_kernels.backend import SelfChecked, primitives
from sae_lens_switch_kernels.torch_loss import Loss, n_parts, target_grad


def reconstruction_loss(
    out_BD: Tensor,
    bias_D: Tensor,
    x_BD: Tensor,
    balance: Tensor | None = None,
    coefficient: float | Tensor = 1.0,
    scale: float | None = 1.0,
) -> Loss:
    """mean_B ||out + bias - x||^2 + coefficient * scale * balance, and its parts.

    Differentiable once, in out, bias, x and balance.

    Args:
        out_BD: The reconstruction without its bias.
        bias_D: That bias.
        x_BD: What is reconstructed; the loss is in the wider dtype of the two.
        balance: The balance of the experts' load, one number; None: there are no experts.
        coefficient: See above; a captured step reads it from the device.
        scale: Likewise; None: the spread of x, the mean squared distance of its rows from their mean.

    Returns:
        See ``Loss``.

    Raises:
        ValueError: Unless out and x are matrices of one shape, the bias a vector as long as their rows, the balance one
            number, and all on one device.
    """
    check_matrix("out_BD", out_BD)
    check_matrix("x_BD", x_BD, *out_BD.shape)
    given_shapes = ("bias_D", bias_D, out_BD.shape[1:]), ("x_BD", x_BD, out_BD.shape), ("balance", balance, ())
    for name, t, shape in given_shapes:
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(t.shape)}")
        if t is not None:
            check_device(name, t, "out_BD", out_BD)
    given = (coefficient, 1.0) if isinstance(coefficient, Tensor) else (None, float(coefficient))
    return Loss(*lost(out_BD, bias_D, x_BD, balance, *given, scale))


@custom_op("sae_lens_switch::loss", mutates_args=())
def lost(
    out_BD: Tensor,
    bias_D: Tensor,
    x_BD: Tensor,
    balance: Tensor | None,
    coefficient: Tensor | None,
    number: float,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = number if coefficient is None else coefficient
    return tuple(primitives(out_BD).loss(out_BD, bias_D, x_BD, balance, given, scale))


@lost.register_fake
def _(
    out_BD: Tensor,
    bias_D: Tensor,  # noqa: ARG001
    x_BD: Tensor,
    balance: Tensor | None,
    coefficient: Tensor | None,
    number: float,  # noqa: ARG001
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, D), empty = out_BD.shape, out_BD.new_empty
    dtype = torch.promote_types(out_BD.dtype, x_BD.dtype)
    of_balance = dtype
    if balance is not None:
        of_balance = balance.dtype if coefficient is None else torch.promote_types(balance.dtype, coefficient.dtype)
        of_balance = torch.promote_types(of_balance, x_BD.dtype if scale is None else of_balance)
    total = torch.promote_types(dtype, of_balance)
    has_columns = isinstance(primitives(out_BD), SelfChecked) and out_BD.dtype == torch.float32
    columns_PD = empty(*((n_parts(B), D) if has_columns else (0,)), dtype=torch.float32)
    weighted, factor = empty((), dtype=of_balance), empty((), dtype=of_balance)
    return empty(B, D), empty((), dtype=total), empty((), dtype=dtype), weighted, factor, columns_PD


@custom_op("sae_lens_switch::loss_backward", mutates_args=())
def lost_backward(
    out_BD: Tensor,
    x_BD: Tensor,
    factor: Tensor,
    columns_PD: Tensor,
    grad_out_BD: Tensor | None,
    grad_total: Tensor | None,
    grad_error: Tensor | None,
    grad_balance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = grad_out_BD, grad_total, grad_error, grad_balance
    return tuple(primitives(out_BD).loss_backward(out_BD, x_BD, factor, columns_PD, *grads))


@lost_backward.register_fake
def _(out_BD: Tensor, x_BD: Tensor, factor: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return out_BD.new_empty(out_BD.shape), out_BD.new_empty(out_BD.shape[1]), torch.empty_like(factor)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    found = Loss(*output)
    ctx.mark_non_differentiable(found.factor, found.columns_PD)
    ctx.set_materialize_grads(False)
    ctx.balance_dtype = None if inputs[3] is None else inputs[3].dtype
    ctx.save_for_backward(found.out_BD, inputs[2], found.factor, found.columns_PD)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    upstream, (_, _, needs_x, needs_balance, *_) = grads[:4], ctx.needs_input_grad
    d_out_BD, d_bias_D, d_balance = lost_backward(*ctx.saved_tensors, *upstream)
    d_x_BD = target_grad(*ctx.saved_tensors[:2], *upstream[1:3]) if needs_x else None
    d_balance = d_balance.to(ctx.balance_dtype) if needs_balance else None
    return d_out_BD, d_bias_D, d_x_BD, d_balance, None, None, None


lost.register_autograd(_backward, setup_context=_save)
