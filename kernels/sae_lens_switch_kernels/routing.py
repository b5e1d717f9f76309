"""The router's choice as one operator: probabilities, expert and gate of each token, and how the load is spread."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from sae_lens_switch_kernels.backend import primitives
from sae_lens_switch_kernels.torch_routing import Routed, biased_probs

__all__ = ["biased_probs", "route", "update_expert_bias", "update_loads"]


def route(logits_BE: Tensor, bias_E: Tensor | None = None) -> Routed:
    """Send each token to the expert with the largest logit + bias.

    Differentiable in the probabilities, the gates and the importance, none of which the bias enters.

    Args:
        logits_BE: The router's logits, float32 or float64.
        bias_E: Added to the logits for the choice alone, of their dtype. None: nothing is.

    Returns:
        See ``Routed``.

    Raises:
        ValueError: Unless the logits are a floating-point matrix with at least one column, and the bias has as many.
    """
    if logits_BE.ndim != 2 or not logits_BE.is_floating_point() or logits_BE.shape[1] == 0:
        shape = tuple(logits_BE.shape)
        raise ValueError(
            f"logits_BE must be a floating-point matrix of tokens by experts; got {logits_BE.dtype} {shape}"
        )
    if bias_E is not None and (bias_E.shape != logits_BE.shape[1:] or bias_E.dtype != logits_BE.dtype):
        raise ValueError(
            f"bias_E must have shape ({logits_BE.shape[1]},) in {logits_BE.dtype}; got {tuple(bias_E.shape)} in "
            f"{bias_E.dtype}"
        )
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


@custom_op("sae_lens_switch::route", mutates_args=())
def routed(logits_BE: Tensor, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(primitives(logits_BE).route(logits_BE, bias_E))


@routed.register_fake
def _(logits_BE: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, E = logits_BE.shape
    empty = logits_BE.new_empty
    return empty(B, E), empty(B, dtype=torch.long), empty(B), empty(E), empty(E)


@custom_op("sae_lens_switch::route_backward", mutates_args=())
def routed_backward(
    probs_BE: Tensor,
    expert_B: Tensor,
    grad_probs_BE: Tensor | None,
    grad_gates_B: Tensor | None,
    grad_importance_E: Tensor | None,
) -> Tensor:
    p = primitives(probs_BE)
    return p.route_backward(probs_BE, expert_B, grad_probs_BE, grad_gates_B, grad_importance_E)


@routed_backward.register_fake
def _(probs_BE: Tensor, *_: Any) -> Tensor:
    return probs_BE.new_empty(probs_BE.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    found = Routed(*output)
    ctx.mark_non_differentiable(found.expert_B, found.load_E)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(found.probs_BE, found.expert_B)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
    grad_probs_BE, _, grad_gates_B, _, grad_importance_E = grads
    if grad_probs_BE is None and grad_gates_B is None and grad_importance_E is None:
        return None, None
    return routed_backward(*ctx.saved_tensors, grad_probs_BE, grad_gates_B, grad_importance_E), None


routed.register_autograd(_backward, setup_context=_save)
