"""The router's choice in plain torch: primitives like those of torch_backend."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_switch_kernels.indexing import expert_groups


class Routed(NamedTuple):
    """What follows from a router's logits [B, E].

    Attributes:
        probs_BE: Their softmax.
        expert_B: Each token's expert, the first of those with the largest ``biased_probs``; int64.
        gates_B: Its probability.
        load_E: Share of the tokens that each expert receives.
        importance_E: Batch mean of each expert's probability.
        balance: E * sum_e load_e importance_e: 1 when uniform.
        order_B: The token in each row of the batch sorted by expert.
        offsets_E1: [E + 1], int32; expert e owns the sorted rows offsets_E1[e] to offsets_E1[e + 1].
    """

    probs_BE: Tensor
    expert_B: Tensor
    gates_B: Tensor
    load_E: Tensor
    importance_E: Tensor
    balance: Tensor
    order_B: Tensor
    offsets_E1: Tensor


def biased_probs(probs_BE: Tensor, bias_E: Tensor | None) -> Tensor:
    """probs * exp(bias), up to a factor: what experts are chosen by, in the order of logits + bias.

    With a bias of zero these are the probabilities themselves, bit for bit.

    Args:
        probs_BE: The router's probabilities.
        bias_E: A bias of the logits. None: no bias.

    Returns:
        Scores, [B, E].
    """
    if bias_E is None:
        return probs_BE
    return probs_BE * (bias_E - bias_E.max()).exp()  # at most 1: a large bias cannot overflow


def route(logits_BE: Tensor, bias_E: Tensor | None = None) -> Routed:
    """See ``Routed``."""
    probs_BE = logits_BE.softmax(dim=-1)
    expert_B1 = biased_probs(probs_BE, bias_E).argmax(dim=-1, keepdim=True)
    counts_E = probs_BE.new_zeros(probs_BE.shape[-1])
    counts_E.index_add_(0, expert_B1.flatten(), counts_E.new_ones(()).expand(len(probs_BE)))
    order_B, offsets_E1 = expert_groups(expert_B1.flatten(), len(counts_E))
    assert order_B is not None
    load_E, importance_E = counts_E / max(1, len(probs_BE)), probs_BE.mean(dim=0)
    return Routed(
        probs_BE,
        expert_B1.flatten(),
        probs_BE.gather(-1, expert_B1).flatten(),
        load_E,
        importance_E,
        len(load_E) * torch.dot(load_E, importance_E),
        order_B,
        offsets_E1.int(),
    )


def route_backward(
    probs_BE: Tensor,
    expert_B: Tensor,
    grad_probs_BE: Tensor | None,
    grad_gates_B: Tensor | None,
    grad_importance_E: Tensor | None,
    grad_balance: Tensor | None,
    load_E: Tensor,
) -> Tensor:
    """The gradient of the logits, [B, E]. That of the balance goes through the importance only."""
    if grad_balance is not None:
        through_balance_E = (grad_balance * len(load_E)) * load_E
        grad_importance_E = through_balance_E if grad_importance_E is None else grad_importance_E + through_balance_E
    d_probs_BE = torch.zeros_like(probs_BE) if grad_probs_BE is None else grad_probs_BE.clone()
    if grad_gates_B is not None:
        d_probs_BE.scatter_add_(1, expert_B.unsqueeze(1), grad_gates_B.unsqueeze(1))
    if grad_importance_E is not None:
        d_probs_BE += grad_importance_E / max(1, len(probs_BE))
    return probs_BE * (d_probs_BE - (probs_BE * d_probs_BE).sum(dim=1, keepdim=True))


def update_loads(
    load_E: Tensor, running_E: Tensor, steps_without_E: Tensor, steps_too_busy: Tensor, decay: float, share: float
) -> None:
    """The running load, each expert's steps in a row without a token, and the steps in a row with an overloaded one."""
    running_E.lerp_(load_E, decay)
    steps_without_E.add_(1).mul_(load_E == 0)
    steps_too_busy.add_(1).mul_(load_E.max() > share)


def update_expert_bias(bias_E: Tensor, counts_E: Tensor, is_finite: Tensor, rate: float) -> None:
    """Up by ``rate`` for experts with less than the mean of the tokens, down for those with more; then centred."""
    step_E = (counts_E.sum() - len(counts_E) * counts_E).sign()
    bias_E.add_((step_E - step_E.mean()) * is_finite, alpha=rate)
