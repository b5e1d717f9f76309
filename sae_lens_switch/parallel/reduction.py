"""Sums over the processes that a step needs: losses, gradients of what they share, the norm of all gradients."""

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from sae_lens_switch_kernels import RowGrads
from sae_lens_switch_kernels.torch_clipping import total_norm
from torch import Tensor, nn

from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.parallel.shard import Shard
from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.step import SparseStepOutput
from sae_lens_switch.training.firing import Firings


def sum_together_(tensors: Sequence[Tensor], ranks: Ranks, what: str) -> None:
    """Each tensor's sum over the processes, in place, in one message; at least in float32."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    total = ranks.sum_(torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors]), what)
    for t, part in zip(tensors, total.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view(t.shape))


# Divided latents


def complete_step_(output: SparseStepOutput, shard: Shard, what: str, **metrics: Tensor) -> None:
    """Give the output losses and ``metrics`` of the whole batch, and the shared parameters its gradients."""
    losses = {name: loss.detach().clone() for name, loss in output.losses.items()}
    metrics = {name: t.clone() for name, t in metrics.items()}
    grads = [p.grad for p in shard.shared_parameters() if p.grad is not None]
    sum_together_([*grads, *losses.values(), *metrics.values()], shard.ranks, what)
    output.metrics, output.losses = output.metrics | metrics, {**losses}
    output.loss = torch.stack(list(losses.values())).sum()


def norm_of_all(grads: Iterable[Tensor], shard: Shard) -> Tensor:
    """Norm of the gradients of all latents and of what the processes share, which is counted once."""
    shared = {id(p.grad) for p in shard.shared_parameters()}
    grads = list(grads)
    of_all = [g for g in grads if id(g) in shared]
    own = [g for g in grads if id(g) not in shared]
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    own_norm = total_norm(own).to(dtype) if own else grads[0].new_zeros((), dtype=dtype)
    norms = [*shard.ranks.gather_row(own_norm, "the norm of the gradients")]
    return torch.stack([*norms, *([total_norm(of_all).to(dtype)] if of_all else [])]).norm()


# Divided data


def sum_gradients_over_data_(
    parameters: Iterable[nn.Parameter], row_grads: RowGrads | None, ranks: Ranks, like: nn.Parameter
) -> None:
    """Gradients of parameters that several processes hold, summed over these, in place.

    Args:
        parameters: Of a dense gradient; the same on all these processes.
        row_grads: Of active latents, of which each process may have others.
        ranks: The processes.
        like: The decoder's weights: row gradients are as wide, and at least as precise.
    """
    for p in parameters if ranks.n_rows > 1 else ():
        if p.grad is not None:
            ranks.sum_over_data_(p.grad if p.grad.is_contiguous() else p.grad.T, "gradients")
    if row_grads is not None and ranks.n_rows > 1:
        row_grads.radial_R = None  # a by-product of one process's gradient; the optimiser computes the sum's
        if row_grads.active_only:
            vars(row_grads).update(vars(_sum_of_rows(row_grads, ranks, like)))


def _sum_of_rows(mine: RowGrads, ranks: Ranks, like: nn.Parameter) -> RowGrads:
    """Over the latents that are active on any of the processes, in the order of these."""
    dtype, D = torch.promote_types(like.dtype, torch.float32), like.shape[1]
    n = 0 if mine.rows_R is None else len(mine.rows_R)
    everybodys_n = ranks.gather_objects(n)
    sizes = [everybodys_n[rank] for rank in ranks.column]
    packed = like.new_zeros(max(sizes), 2 * D + 1, dtype=dtype)
    rows_R = torch.zeros(max(sizes), dtype=torch.long, device=like.device)
    if mine.rows_R is not None and mine.dW_enc_RD is not None and mine.dW_dec_RD is not None:
        bias_R = packed[:n, -1] if mine.d_bias_R is None else mine.d_bias_R
        packed[:n] = torch.cat([t.to(dtype) for t in (mine.dW_enc_RD, mine.dW_dec_RD, bias_R.unsqueeze(1))], dim=1)
        rows_R[:n] = mine.rows_R
    everybodys = ranks.gather_column(packed, "gradients"), ranks.gather_column(rows_R, "gradients")
    parts = []
    for size, part, rows in zip(sizes, *everybodys, strict=True):
        enc_RD, dec_RD, bias_R1 = part[:size].split([D, D, 1], dim=1)
        parts.append(RowGrads(True, rows[:size], enc_RD, dec_RD, bias_R1.squeeze(1)))
    return reduce(RowGrads.plus, parts)


def firings_over_data(firings: list[Firings], d_sae: int, ranks: Ranks) -> list[Firings]:
    """How often each latent fired on all processes that hold it."""
    if ranks.n_rows == 1:
        return firings
    counts_F = torch.zeros(d_sae, device=ranks.device)
    for fired in firings:
        if isinstance(fired, SparseCodes):
            counts_F.index_add_(0, fired.indices.flatten(), (fired.values.flatten().abs() > 0).to(counts_F.dtype))
        else:
            counts_F += fired
    return [ranks.sum_over_data_(counts_F, "firings")]
