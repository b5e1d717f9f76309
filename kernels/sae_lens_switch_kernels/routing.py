"""The router's choice as one operator: probabilities, expert and gate of each token, and how the load is spread."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from sae_lens_switch_kernels.arguments import check_device
from sae_lens_switch_kernels.backend import primitives
from sae_lens_switch_kernels.torch_routing import Routed

# Where the bias's gradient is summed over that of every token: so it was in checkpoints, which resume bit-identically.
_BY_TOKEN = {"cpu"}
# Loads are counted in the dtype of the logits: 16 bits are exact up to 256, or 2,048, tokens.
_DTYPES = (torch.float32, torch.float64)


def route(logits_BE: Tensor, bias_E: Tensor | None = None) -> Routed:
    """Send each token to the expert with the largest logit + bias.

    Differentiable in the probabilities, the gates, the importance and the balance, none of which the bias enters.

    Args:
        logits_BE: The router's logits, float32 or float64.
        bias_E: Added to the logits for the choice alone, of their dtype. None: nothing is.

    Returns:
        See ``Routed``.

    Raises:
        ValueError: Unless the logits are a matrix of one of these dtypes with at least one column, and the bias has as
            many, on their device.
    """
    if logits_BE.ndim != 2 or logits_BE.shape[1] == 0 or logits_BE.dtype not in _DTYPES:
        shape = tuple(logits_BE.shape)
        raise ValueError(
            f"logits_BE must be a float32 or float64 matrix of tokens by experts; got {logits_BE.dtype} {shape}"
        )
    if bias_E is not None and (bias_E.shape != logits_BE.shape[1:] or bias_E.dtype != logits_BE.dtype):
        raise ValueError(
            f"bias_E must have shape ({logits_BE.shape[1]},) in {logits_BE.dtype}; got {tuple(bias_E.shape)} in "
            f"{bias_E.dtype}"
        )
    if bias_E is not None:
        check_device("bias_E", bias_E, "logits_BE", logits_BE)
    return Routed(*routed(logits_BE, bias_E))


def update_loads(
    load_E: Tensor, running_E: Tensor, steps_without_E: Tensor, steps_too_busy: Tensor, decay: float, share: float
) -> None:
    """Follow the load of the experts from step to step, in place.

    Args:
        load_E: Share of this step's tokens that each expert received.
        running_E: Its exponential moving average.
        steps_without_E: How many steps in a row each expert has had no token.
        steps_too_busy: How many steps in a row an expert has had more than ``share``.
        decay: Of the moving average, per step.
        share: See ``steps_too_busy``.
    """
    primitives(running_E).update_loads(load_E, running_E, steps_without_E, steps_too_busy, decay, share)


def update_expert_bias(bias_E: Tensor, counts_E: Tensor, is_finite: Tensor, rate: float) -> None:
    """Move the bias of ``route`` against the load, in place (Wang et al. 2024, arXiv 2408.15664, algorithm 1).

    ``bias_e += rate * sign(mean load - load_e)``, less what is common to all experts, which decides nothing.

    Args:
        bias_E: The bias; unchanged where every expert has the same number of tokens.
        counts_E: Number of the step's tokens that each expert received, in the bias's dtype.
        is_finite: A bool on the device; where it is False, nothing changes.
        rate: The size of a change.
    """
    primitives(bias_E).update_expert_bias(bias_E, counts_E, is_finite, rate)


def router_logits(x_BD: Tensor, W_DE: Tensor, bias_D: Tensor) -> Tensor:
    """(x - bias) @ W, differentiable once, in few launches.

    Args:
        x_BD: Tokens.
        W_DE: The router's weights, in whose dtype all is computed, whatever autocast says.
        bias_D: Subtracted from every token.
    """
    return logits_of(x_BD, W_DE, bias_D)[0]


@custom_op("sae_lens_switch::router_logits", mutates_args=())
def logits_of(x_BD: Tensor, W_DE: Tensor, bias_D: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and x - bias."""
    with torch.autocast(x_BD.device.type, enabled=False):
        centered_BD = (x_BD.to(W_DE.dtype) - bias_D).contiguous()
        return centered_BD @ W_DE, centered_BD


@logits_of.register_fake
def _(x_BD: Tensor, W_DE: Tensor, bias_D: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return W_DE.new_empty(x_BD.shape[0], W_DE.shape[1]), W_DE.new_empty(x_BD.shape)


@custom_op("sae_lens_switch::router_logits_backward", mutates_args=())
def logits_backward(d_BE: Tensor, centered_BD: Tensor, W_DE: Tensor, needs_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of W, of the bias, and of x if needed."""
    with torch.autocast(d_BE.device.type, enabled=False):
        dW_DE = centered_BD.T @ d_BE
        if needs_x or d_BE.device.type in _BY_TOKEN:
            d_x_BD = d_BE @ W_DE.T
            return dW_DE, d_x_BD.neg().sum(0), d_x_BD if needs_x else d_BE.new_empty(0)
        # The bias is shared by all tokens, so its gradient needs the sum over the batch only: one mat-vec.
        d_bias_D = torch.addmv(W_DE.new_empty(len(W_DE)), W_DE, d_BE.sum(0), beta=0, alpha=-1)
        return dW_DE, d_bias_D, d_BE.new_empty(0)


@logits_backward.register_fake
def _(d_BE: Tensor, centered_BD: Tensor, W_DE: Tensor, needs_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    d_x_BD = d_BE.new_empty(centered_BD.shape if needs_x else 0)
    return W_DE.new_empty(W_DE.shape), d_BE.new_empty(len(W_DE)), d_x_BD


def _save_centered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[1])
    ctx.dtypes = inputs[0].dtype, inputs[2].dtype


def _logits_backward(ctx: Any, d_BE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs_x = ctx.needs_input_grad[0]
    dW_DE, d_bias_D, d_x_BD = logits_backward(d_BE, *ctx.saved_tensors, needs_x)
    x_dtype, bias_dtype = ctx.dtypes
    return d_x_BD.to(x_dtype) if needs_x else None, dW_DE, d_bias_D.to(bias_dtype)


logits_of.register_autograd(_logits_backward, setup_context=_save_centered)


@custom_op("sae_lens_switch::route", mutates_args=())
def routed(
    logits_BE: Tensor, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(primitives(logits_BE).route(logits_BE, bias_E))


@routed.register_fake
def _(logits_BE: Tensor, _: Tensor | None = None) -> tuple[Tensor, ...]:
    B, E = logits_BE.shape
    empty = logits_BE.new_empty
    order_B, offsets_E1 = empty(B, dtype=torch.long), empty(E + 1, dtype=torch.int32)
    return empty(B, E), empty(B, dtype=torch.long), empty(B), empty(E), empty(E), empty(()), order_B, offsets_E1


@custom_op("sae_lens_switch::route_backward", mutates_args=())
def routed_backward(
    probs_BE: Tensor,
    expert_B: Tensor,
    grad_probs_BE: Tensor | None,
    grad_gates_B: Tensor | None,
    grad_importance_E: Tensor | None,
    grad_balance: Tensor | None,
    load_E: Tensor,
) -> Tensor:
    grads = grad_probs_BE, grad_gates_B, grad_importance_E, grad_balance
    return primitives(probs_BE).route_backward(probs_BE, expert_B, *grads, load_E)


@routed_backward.register_fake
def _(probs_BE: Tensor, *_: Any) -> Tensor:
    return probs_BE.new_empty(probs_BE.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    found = Routed(*output)
    ctx.mark_non_differentiable(found.expert_B, found.load_E, found.order_B, found.offsets_E1)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(found.probs_BE, found.expert_B, found.load_E)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
    grad_probs_BE, _, grad_gates_B, _, grad_importance_E, grad_balance, *_ = grads
    given = grad_probs_BE, grad_gates_B, grad_importance_E, grad_balance
    if all(grad is None for grad in given):
        return None, None
    probs_BE, expert_B, load_E = ctx.saved_tensors
    return routed_backward(probs_BE, expert_B, *given, load_E), None


routed.register_autograd(_backward, setup_context=_save)
