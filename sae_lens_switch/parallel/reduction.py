"""Sums over the processes that a step needs: losses, gradients of what is shared, the norm of all gradients."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sae_lens_switch.parallel.expert_shard import ExpertShard
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.saes.step import SparseStepOutput
from sae_lens_switch.training.optim.gradients import total_norm


def sum_together_(tensors: Sequence[Tensor], ranks: Ranks, what: str) -> None:
    """Each tensor's sum over the processes, in place, in one message; at least in float32."""
    if not tensors:
        return
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    total = ranks.sum_(torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors]), what)
    for t, part in zip(tensors, total.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view(t.shape))


def complete_step_(output: SparseStepOutput, shard: ExpertShard) -> None:
    """Give the output the losses of the whole batch, and the shared parameters its gradients."""
    balance = output.metrics.get("load_balance")
    losses = {name: loss.detach().clone() for name, loss in output.losses.items()}
    losses["of balance"] = balance.clone() if isinstance(balance, Tensor) else output.loss.new_zeros(())
    grads = [p.grad for p in shard.shared_parameters() if p.grad is not None]
    sum_together_([*grads, *losses.values()], shard.ranks, "gradients of the router and losses")
    output.metrics = {"load_balance": losses.pop("of balance")}
    output.losses = {**losses}
    output.loss = torch.stack(list(losses.values())).sum()


def norm_of_all(grads: Iterable[Tensor], shard: ExpertShard) -> Tensor:
    """Norm of the gradients of all experts and of what they share, which is counted once."""
    shared = {id(p.grad) for p in shard.shared_parameters()}
    grads = list(grads)
    of_all = [g for g in grads if id(g) in shared]
    own = [g for g in grads if id(g) not in shared]
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    own_norm = total_norm(own).to(dtype) if own else grads[0].new_zeros((), dtype=dtype)
    norms = [*shard.ranks.gather_row(own_norm, "the norm of the gradients")]
    return torch.stack([*norms, *([total_norm(of_all).to(dtype)] if of_all else [])]).norm()
