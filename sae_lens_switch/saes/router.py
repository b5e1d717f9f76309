"""The router: which expert each token is sent to, with what gate, and how balanced the load is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from sae_lens_switch_kernels import ExpertGroups, biased_probs, route
from torch import Tensor

from sae_lens_switch.saes.expert_layout import ExpertLayout


@dataclass(frozen=True)
class Assignment:
    """Router logits and probabilities of all experts; indices and probabilities of the A chosen ones, best first.

    In training also the load, its balance and the tokens sorted by expert, where they are by-products.
    """

    logits_BE: Tensor
    probs_BE: Tensor
    experts_BA: Tensor
    gates_BA: Tensor
    load_E: Tensor | None = None
    balance: Tensor | None = None
    groups: ExpertGroups | None = None


def router_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for a float64 SAE: a bf16 softmax would send tokens to other experts."""
    return torch.promote_types(dtype, torch.float32)


def router_logits(x_BD: Tensor, W_router_DE: Tensor, b_router_D: Tensor) -> Tensor:
    """(x - b_router) @ W_router, [B, E], in the router's own precision whatever autocast says."""
    with torch.autocast(x_BD.device.type, enabled=False):
        return (x_BD.to(W_router_DE.dtype) - b_router_D) @ W_router_DE


def assign(logits_BE: Tensor, probs_BE: Tensor, n_active: int = 1, bias_E: Tensor | None = None) -> Assignment:
    """Each token's most probable experts, or those of the largest logit + bias; of one, ties go to the first.

    The gates are their probabilities, without the bias.
    """
    ranked_BE = biased_probs(probs_BE.detach(), bias_E)
    experts_BA = ranked_BE.argmax(dim=-1, keepdim=True) if n_active == 1 else ranked_BE.topk(n_active, dim=-1).indices
    return Assignment(logits_BE, probs_BE, experts_BA, probs_BE.gather(-1, experts_BA))


def assign_batch(logits_BE: Tensor, bias_E: Tensor | None = None) -> Assignment:
    """``assign`` of a whole batch, with its load, in one operator that can be differentiated once."""
    found = route(logits_BE, bias_E)
    chosen = found.expert_B.unsqueeze(1), found.gates_B.unsqueeze(1)
    groups = ExpertGroups(found.order_B, found.offsets_E1)
    return Assignment(logits_BE, found.probs_BE, *chosen, found.load_E, found.balance, groups)


def expert_load(assignment: Assignment) -> Tensor:
    """Share of the tokens' A choices that each expert receives, [E], in the router's dtype; sums to 1."""
    if assignment.load_E is not None:
        return assignment.load_E
    experts = assignment.experts_BA.flatten()
    counts_E = assignment.probs_BE.new_zeros(assignment.probs_BE.shape[-1])
    counts_E.index_add_(0, experts, counts_E.new_ones(()).expand(len(experts)))
    return counts_E / max(1, len(experts))


def load_balance_loss(assignment: Assignment, load_E: Tensor) -> Tensor:
    """E * sum_i load_i P_i, P_i the batch mean of p_i: 1 when uniform (arXiv 2410.08201, section 3.3).

    The gradient goes through P only.
    """
    if assignment.balance is not None:
        return assignment.balance
    return len(load_E) * torch.dot(load_E.detach(), assignment.probs_BE.mean(dim=0))


def router_z_loss(logits_BE: Tensor) -> Tensor:
    """mean_B logsumexp(logits)^2 (Zoph et al. 2022, arXiv 2202.08906, equation 5): it keeps the logits small."""
    return logits_BE.logsumexp(dim=-1).square().mean()


class RoutingStatistics:
    """Statistics of a training step's routing, each computed lazily."""

    def __init__(
        self, load_E: Tensor, gates_B: Tensor, layout: ExpertLayout, dead_latents_F: Tensor | None = None
    ) -> None:
        self.load_E, self.gates_B = load_E, gates_B
        self.layout, self.dead_latents_F = layout, dead_latents_F

    @cached_property
    def dead_latents_E(self) -> Tensor:
        """Dead latents of each expert, [E]; shared ones are not among them."""
        if self.dead_latents_F is None:
            return torch.zeros(self.layout.n_experts)
        return self.layout.by_expert(self.dead_latents_F).sum(1)

    @property
    def dead_latents_shared(self) -> Tensor:
        if self.dead_latents_F is None:
            return torch.zeros(())
        return self.layout.shared(self.dead_latents_F).sum()

    @property
    def load_entropy(self) -> Tensor:
        """Entropy of the load in nats; log(E) when uniform, 0 when one expert has everything."""
        return torch.special.entr(self.load_E).sum()

    @property
    def gate_mean(self) -> Tensor:
        return self.gates_B.mean()

    def metrics(self) -> dict[str, Callable[[], Tensor]]:
        """Callables without arguments, by name: SAELens evaluates them on logging steps only."""
        per_expert = {f"dead_latents_expert_{e}": (lambda e=e: self.dead_latents_E[e]) for e in range(len(self.load_E))}
        return {
            "expert_load_max": lambda: self.load_E.max(),
            "expert_load_min": lambda: self.load_E.min(),
            "expert_load_entropy": lambda: self.load_entropy,
            "gate_mean": lambda: self.gate_mean,
            **per_expert,
            **({"dead_latents_shared": lambda: self.dead_latents_shared} if self.layout.shared_width else {}),
        }
