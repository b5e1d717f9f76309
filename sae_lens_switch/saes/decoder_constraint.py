"""The decoder's constraint: rows of unit norm, and gradients without the component along their row.

The recipe's order is clip, project, step, renormalise. Our optimisers apply the constraint themselves, block by block;
around any other optimiser's step the hooks below do.
"""

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

# On a CPU, rows are processed in cache-sized blocks so that several operations share one read from memory; block sizes
# were tuned. On a GPU each block costs launches, so blocks are as large as memory for their temporaries allows.
_ROWS_PROJECTED, _ROWS_NORMALIZED = 256, 4096
_NUMBERS_ON_GPU = 1 << 28


@dataclass(frozen=True)
class DecoderConstraint:
    """Rows of ``W_dec`` [F, D] are kept at unit norm; with ``project``, gradients are projected before the step."""

    W_dec: nn.Parameter
    project: bool


def row_blocks(t: Tensor, n_rows: int) -> tuple[Tensor, ...]:
    """``t`` [rows, columns] in blocks of ``n_rows`` on a CPU, in as few as possible elsewhere."""
    return t.split(n_rows if t.device.type == "cpu" else max(1, _NUMBERS_ON_GPU // max(1, t[:1].numel())))


@torch.no_grad()
def normalize_rows_(W_FD: Tensor) -> None:
    """Scale each row of W to unit norm, in place; all-zero and unit rows stay bit-identical."""
    dtype = torch.promote_types(W_FD.dtype, torch.float32)
    info = torch.finfo(dtype)
    for rows in row_blocks(W_FD, _ROWS_NORMALIZED):
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=dtype)
        norms.masked_fill_((norms - 1).abs() <= 8 * info.eps, 1).clamp_min_(info.tiny)
        rows.mul_(norms.reciprocal_())  # half the time of a division


@torch.no_grad()
def project_out_rows_(grad_FD: Tensor, W_FD: Tensor) -> None:
    """Remove from each row of the gradient, in place, its component along the same (unit-norm) row of W."""
    blocks = zip(row_blocks(grad_FD, _ROWS_PROJECTED), row_blocks(W_FD, _ROWS_PROJECTED), strict=True)
    for grad_rows, rows in blocks:
        dtype = torch.promote_types(rows.dtype, torch.float32)
        along = (grad_rows.to(dtype) * rows.to(dtype)).sum(dim=1, keepdim=True)
        grad_rows.sub_(along.to(rows.dtype) * rows)


def project_out_rows(grad_RD: Tensor, W_RD: Tensor, out_RD: Tensor, radial_R: Tensor | None = None) -> Tensor:
    """``project_out_rows_`` of a few rows into ``out_RD``; ``radial_R`` is <grad, W> per row, computed if None."""
    if radial_R is None:
        radial_R = torch.mul(grad_RD, W_RD, out=out_RD).sum(dim=1)
    return torch.addcmul(grad_RD, W_RD, radial_R.unsqueeze(1), value=-1, out=out_RD)


# Under optimisers that know nothing of the constraint


class AppliesConstraint:
    """Base of optimisers that apply the constraint themselves: the hooks below skip their steps."""


class ConstrainedSAE(Protocol):
    """An SAE with something to do after every optimiser step on its weights, and right before those on its decoder."""

    W_dec: nn.Parameter

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def before_optimizer_step(self) -> None: ...
    def after_optimizer_step(self, steps_decoder: bool) -> None: ...


_constrained: "weakref.WeakSet[ConstrainedSAE]" = weakref.WeakSet()
_lock = threading.Lock()
_hooks_are_registered = False


@torch.compiler.disable  # in a compiled step the registration would be lost
def constrain_optimizer_steps(sae: ConstrainedSAE) -> None:
    """From now on, any optimiser that steps a weight of ``sae`` calls its methods around the step.

    A trainer that does not know the constraint, such as SAELens's, leaves no other place between clipping and the step.
    torch offers these hooks for all optimisers of a process; ours are registered when the first SAE asks for them, and
    ignore optimisers that do not hold its weights or that are ``AppliesConstraint``.
    """
    global _constrained
    if sae in _constrained:
        return
    with _lock:
        _register_hooks_once()
        # A new set, since another thread's step may be iterating over the old one.
        _constrained = weakref.WeakSet([*_constrained, sae])


def _register_hooks_once() -> None:
    global _hooks_are_registered
    if not _hooks_are_registered:
        register_optimizer_step_pre_hook(lambda optimizer, *_: _before_step(optimizer))
        register_optimizer_step_post_hook(lambda optimizer, *_: _after_step(optimizer))
        _hooks_are_registered = True


def _before_step(optimizer: Optimizer) -> None:
    for sae, steps_decoder in _stepped_by(optimizer):
        if steps_decoder:
            sae.before_optimizer_step()


def _after_step(optimizer: Optimizer) -> None:
    for sae, steps_decoder in _stepped_by(optimizer):
        sae.after_optimizer_step(steps_decoder)


def _stepped_by(optimizer: Optimizer) -> list[tuple[ConstrainedSAE, bool]]:
    """The SAEs of which it holds a trainable weight, each with whether it holds the decoder."""
    if isinstance(optimizer, AppliesConstraint):
        return []
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [
        (sae, id(sae.W_dec) in held)
        for sae in _constrained
        if any(p.requires_grad and id(p) in held for p in sae.parameters())
    ]
