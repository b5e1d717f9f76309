"""Around the optimiser: the decoder constraint and the learning-rate law."""

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

# Rows are visited in blocks that stay in cache, so that several operations on a block read memory once.
_ROWS = 512


def scaling_law_lr(d_sae: int) -> float:
    """2e-4 / sqrt(d_sae / 2^14), the learning rate of arXiv 2410.08201 (from Gao et al. 2024)."""
    if d_sae < 1:
        raise ValueError(f"d_sae must be at least 1; got {d_sae}")
    return 2e-4 / (d_sae / 2**14) ** 0.5


@torch.no_grad()
def normalize_rows_(W_FD: Tensor) -> None:
    """Scale each row of W to unit norm, in place; an all-zero row stays zero."""
    for rows in W_FD.split(_ROWS):
        rows.div_(rows.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(W_FD.dtype).tiny))


@torch.no_grad()
def remove_parallel_(grad_FD: Tensor, W_FD: Tensor) -> None:
    """Take from each row of grad, in place, its component along the same (unit-norm) row of W."""
    for grad_rows, rows in zip(grad_FD.split(_ROWS), W_FD.split(_ROWS), strict=True):
        along = torch.linalg.vecdot(grad_rows, rows).unsqueeze(1)
        grad_rows.addcmul_(along, rows, value=-1)


def step_in_memory_order(optimizer: Optimizer) -> None:
    """From now on, only while it steps, the optimiser sees transposed matrices, such as W_enc, as memory holds them.

    Elementwise nothing changes, but torch's fused steps copy a whole matrix whose rows are not contiguous.
    """
    flipped: list[nn.Parameter] = []

    def transpose() -> None:
        for p in flipped:
            _transpose(p, optimizer.state.get(p, {}))

    def before(*_: Any) -> None:
        flipped.extend(p for p in _parameters(optimizer) if p.ndim == 2 and not p.is_contiguous())
        transpose()

    def after(*_: Any) -> None:
        transpose()
        flipped.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _transpose(p: nn.Parameter, state: dict[str, Any]) -> None:
    grad, p.grad = p.grad, None
    p.data = p.data.T
    p.grad = None if grad is None else grad.T
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim == 2:
            state[name] = value.T


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class StepConstraint(Protocol):
    """An SAE that has something to do right before and after every optimiser step on its weights."""

    W_dec: nn.Parameter

    def before_optimizer_step(self) -> None: ...
    def after_optimizer_step(self) -> None: ...


_constrained: "weakref.WeakSet[Any]" = weakref.WeakSet()


def constrain_optimizer_steps(sae: StepConstraint) -> None:
    """From now on, whatever optimiser steps ``sae.W_dec`` calls the SAE's two methods around the step.

    The recipe's order is clip, project, step, renormalise; a trainer that knows nothing of it, such as
    SAELens's, leaves no other place between clipping and the step. torch offers these hooks for all optimisers
    of a process; ours are registered when a first SAE asks, and pass by every optimiser without its weights.
    """
    if not _constrained:
        _register_hooks_once()
    _constrained.add(sae)


_hooks_registered = False


def _register_hooks_once() -> None:
    global _hooks_registered
    if not _hooks_registered:
        register_optimizer_step_pre_hook(lambda optimizer, *_: _notify(optimizer, "before_optimizer_step"))
        register_optimizer_step_post_hook(lambda optimizer, *_: _notify(optimizer, "after_optimizer_step"))
        _hooks_registered = True


def _notify(optimizer: Optimizer, method: str) -> None:
    stepped = {id(p) for p in _parameters(optimizer)}
    for sae in list(_constrained):
        if id(sae.W_dec) in stepped:
            getattr(sae, method)()
