"""Adam, the decoder constraint around its step, and the learning-rate law."""

import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from sae_lens_switch_kernels import RowGrads
from sae_lens_switch_kernels.huge_pages import to_huge_pages, zeros_huge
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

# On a CPU rows are visited in blocks that stay in cache, so that several operations on a block read memory once; in how
# many rows, is measured. On a GPU each block costs launches, and is as large as memory for its temporaries allows.
_ROWS_STEPPED, _ROWS_PROJECTED, _ROWS_NORMALIZED = 1024, 256, 4096
_NUMBERS_ON_GPU = 1 << 28


def _blocks(t: Tensor, rows: int) -> tuple[Tensor, ...]:
    """t [rows, columns] in blocks of ``rows`` on a CPU, of as few as may be elsewhere."""
    return t.split(rows if t.device.type == "cpu" else max(1, _NUMBERS_ON_GPU // max(1, t[:1].numel())))


def scaling_law_lr(d_sae: int) -> float:
    """2e-4 / sqrt(d_sae / 2^14), the learning rate of arXiv 2410.08201 (from Gao et al. 2024)."""
    if d_sae < 1:
        raise ValueError(f"d_sae must be at least 1; got {d_sae}")
    return 2e-4 / (d_sae / 2**14) ** 0.5


@torch.no_grad()
def normalize_rows_(W_FD: Tensor) -> None:
    """Scale each row of W to unit norm, in place; an all-zero row stays zero, and a unit one as it is, to the bit."""
    dtype = torch.promote_types(W_FD.dtype, torch.float32)
    info = torch.finfo(dtype)
    for rows in _blocks(W_FD, _ROWS_NORMALIZED):
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=dtype)
        norms.masked_fill_((norms - 1).abs() <= 8 * info.eps, 1).clamp_min_(info.tiny)
        rows.mul_(norms.reciprocal_())  # half the time of a division


@torch.no_grad()
def remove_parallel_(grad_FD: Tensor, W_FD: Tensor) -> None:
    """Take from each row of grad, in place, its component along the same (unit-norm) row of W."""
    for grad_rows, rows in zip(_blocks(grad_FD, _ROWS_PROJECTED), _blocks(W_FD, _ROWS_PROJECTED), strict=True):
        dtype = torch.promote_types(rows.dtype, torch.float32)
        along = (grad_rows.to(dtype) * rows.to(dtype)).sum(dim=1, keepdim=True)
        grad_rows.sub_(along.to(rows.dtype) * rows)


def without_parallel(grad_RD: Tensor, W_RD: Tensor, out_RD: Tensor, radial_R: Tensor | None = None) -> Tensor:
    """``remove_parallel_`` of a few rows, into other memory; ``radial_R`` is <grad, W>, where that is known."""
    if radial_R is None:
        radial_R = torch.mul(grad_RD, W_RD, out=out_RD).sum(dim=1)
    return torch.addcmul(grad_RD, W_RD, radial_R.unsqueeze(1), value=-1, out=out_RD)


@torch.no_grad()
def total_norm(grads: Iterable[Tensor]) -> Tensor:
    """Of all gradients together, float32 at least. One pass over each, in memory order."""
    return torch.stack([_norm(g) for g in grads]).norm()


def _norm(t: Tensor) -> Tensor:
    dtype = torch.promote_types(t.dtype, torch.float32)
    t = t.T if t.ndim == 2 and not t.is_contiguous() else t
    # Of a matrix by its rows, which torch sums twice as fast.
    return torch.linalg.vector_norm(t, dim=-1, dtype=dtype).norm() if t.ndim else t.abs().to(dtype)


def step_in_memory_order(optimizer: Optimizer) -> None:
    """From now on, only while it steps, the optimiser sees transposed matrices, such as W_enc, as memory holds them.

    Elementwise nothing changes, but torch's fused steps copy a whole matrix whose rows are not contiguous.
    """
    _StepView(optimizer, masters=False)


class ConstrainedAdam(torch.optim.Adam):
    """torch's Adam, fused where the device has it, that keeps the rows of one matrix at unit norm on its way.

    Steps in memory order. A frozen parameter (``requires_grad=False``) stays as it is, to the bit; so does a frozen
    ``unit_rows``. Parameters of less than float32 are stepped in float32, kept by the optimiser and saved with
    its state: updates smaller than a weight's rounding add up instead of being lost.

    Args:
        unit_rows: The matrix [F, D] whose rows are projected before and scaled to unit norm after the step, block by
            block, so that all of it reads and writes memory once. None: there is none.
        project: Whether the gradient's component along a row of it is taken out.
        after_step: Called at the end of a step, when parameters are as they were stepped.
    """

    applies_constraint = True

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        unit_rows: nn.Parameter | None = None,
        project: bool = True,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        parameters = list(parameters)
        try:
            super().__init__(parameters, lr=lr, betas=betas, fused=True)
        except RuntimeError:  # torch has no fused step for this device
            super().__init__(parameters, lr=lr, betas=betas)
        self.unit_rows, self.project = unit_rows, project
        self.row_grads = RowGrads(active_only=False) if unit_rows is not None and project else None
        _StepView(self, masters=True, after_step=after_step)

    @property
    def is_fused(self) -> bool:
        return bool(self.param_groups[0]["fused"])

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As torch's, without frozen parameters, and with new moments in huge pages where there are any: a step reads
        and writes all of them."""
        group = group | {"params": trained(group["params"])}
        fresh = [p for p in group["params"] if p.grad is not None and not self.state[p]]
        if fresh:
            super()._init_group(group, *([] for _ in lists))
        for p in fresh:
            for name in ("exp_avg", "exp_avg_sq"):
                t = self.state[p][name]
                self.state[p][name] = zeros_huge(*t.shape, dtype=t.dtype, device=t.device)
        return super()._init_group(group, *lists)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, with moments in huge pages; and a step is fused if this device can, whatever the checkpoint's."""
        fused = self.is_fused
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["fused"] = fused
            for p in group["params"]:
                if p not in self.state:
                    continue
                state = self.state[p]
                state |= {name: to_huge_pages(state[name]) for name in ("exp_avg", "exp_avg_sq")}
                if fused:
                    state["step"] = state["step"].to(p.device, torch.float32)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        _closure: None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        radial_F: Tensor | None = None,
        lr: Tensor | None = None,
    ) -> None:
        """One step of the gradients divided by ``grad_scale``; none, on the device, where ``found_inf`` is 1.

        ``radial_F`` is the component of each row of unit_rows.grad along the row, as a backward pass leaves it in
        ``row_grads``; without it, it is computed. ``lr``, a float32 number on the device, counts in place of the
        groups' own. All are for a fused step of float32 alone.
        """
        for group in self.param_groups:
            lists: Any = [[] for _ in range(6)]
            self._init_group(group, *lists)
            beta1, beta2 = group["betas"]
            # Named, since torch would find out by reading lr whether it can be a float.
            fused = torch.ops.aten._fused_adam_.default if lr is None else torch.ops.aten._fused_adam_.tensor_lr
            options = {"lr": group["lr"] if lr is None else lr, "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
            options |= {"amsgrad": False, "weight_decay": 0.0, "maximize": False}
            options |= {"grad_scale": grad_scale, "found_inf": found_inf}
            if not group["fused"]:
                self._step_not_fused(lists, options)
                continue
            steps = lists[-1]
            for step in steps:
                step.add_(1)
            for p, grad, m, v, step in zip(*lists[:4], steps, strict=True):
                grad = grad.contiguous()  # torch's fused step takes for granted that it is laid out as the parameter
                if p is self.unit_rows:
                    self._step_unit_rows(p, grad, m, v, step, partial(fused, **options), radial_F)
                else:
                    fused([p], [grad], [m], [v], [], [step], **options)
            if found_inf is not None:
                for step in steps:
                    step.sub_(found_inf)

    def _step_not_fused(self, lists: Any, options: dict[str, Any]) -> None:
        W = self.unit_rows if self.unit_rows is not None and self.unit_rows.requires_grad else None
        if W is not None and self.project and W.grad is not None:
            remove_parallel_(W.grad, W)
        adam(*lists, fused=False, **options)
        if W is not None:
            normalize_rows_(W)

    def _step_unit_rows(
        self,
        W_FD: Tensor,
        grad_FD: Tensor,
        m_FD: Tensor,
        v_FD: Tensor,
        step: Tensor,
        fused: Callable[..., Any],
        radial_F: Tensor | None,
    ) -> None:
        blocks = [_blocks(t, _ROWS_STEPPED) for t in (W_FD, grad_FD, m_FD, v_FD)]
        n = len(blocks[0][0])
        scratch = torch.empty_like(W_FD[:n])
        for i, (w, grad, m, v) in enumerate(zip(*blocks, strict=True)):
            if self.project:
                along = None if radial_F is None else radial_F[i * n : (i + 1) * n]
                grad = without_parallel(grad, w, scratch[: len(w)], along)
            fused([w], [grad], [m], [v], [], [step])
            normalize_rows_(w)


class _StepView:
    """What an optimiser sees in place of parameters while it steps, or loads its state."""

    def __init__(self, optimizer: Optimizer, masters: bool, after_step: Callable[[], None] | None = None) -> None:
        self.optimizer, self.has_masters, self.after_step = optimizer, masters, after_step
        self.masters: dict[nn.Parameter, Tensor] = {}
        self.seen: dict[nn.Parameter, tuple[int, int]] = {}
        self.low: dict[nn.Parameter, Tensor] = {}
        self.flipped: list[nn.Parameter] = []
        optimizer.register_step_pre_hook(lambda *_: self.show())
        optimizer.register_step_post_hook(lambda *_: self.hide())
        if masters:
            optimizer.register_state_dict_post_hook(lambda _, state: state | {"masters": self.saved_masters()})
            optimizer.register_load_state_dict_pre_hook(lambda _, state: self.before_loading(state))
            optimizer.register_load_state_dict_post_hook(lambda *_: self.after_loading())

    def show(self) -> None:
        if self.has_masters:
            self.take_masters()
        self.flipped = [p for p in parameters_of(self.optimizer) if p.ndim == 2 and not p.is_contiguous()]
        self.flip()

    def hide(self) -> None:
        if self.after_step is not None:
            self.after_step()
        self.flip()
        self.flipped = []
        self.put_masters_away()

    def flip(self) -> None:
        for p in self.flipped:
            _transpose(p, self.optimizer.state.get(p, {}))

    def take_masters(self) -> None:
        for p in trained(parameters_of(self.optimizer)):
            if p.dtype in (torch.bfloat16, torch.float16):
                grad, p.grad, self.low[p] = p.grad, None, p.data
                changed = p in self.seen and self.seen[p] != _version(p)  # by others than this optimiser
                if p not in self.masters or changed:
                    self.masters[p] = p.data.float()
                p.data = self.masters[p]
                p.grad = None if grad is None else grad.float()

    def put_masters_away(self) -> None:
        for p, low in self.low.items():
            p.grad = None
            p.data = low.copy_(p.data)
            self.seen[p] = _version(p)
        self.low = {}

    def saved_masters(self) -> dict[int, Tensor]:
        return {i: self.masters[p] for i, p in enumerate(parameters_of(self.optimizer)) if p in self.masters}

    def before_loading(self, state: dict[str, Any]) -> None:
        parameters = parameters_of(self.optimizer)
        self.masters = {parameters[i]: t.to(parameters[i].device) for i, t in state.get("masters", {}).items()}
        self.seen = {}
        self.low = {p: p.data for p in self.masters}
        for p, master in self.masters.items():  # torch casts a parameter's state to the parameter's dtype
            p.data = master

    def after_loading(self) -> None:
        for p, data in self.low.items():
            p.data = data
        self.low = {}


def _version(p: nn.Parameter) -> tuple[int, int]:
    return p.data_ptr(), p._version


def _transpose(p: nn.Parameter, state: dict[str, Any]) -> None:
    grad, p.grad = p.grad, None
    p.data = p.data.T
    p.grad = None if grad is None else grad.T
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim == 2:
            state[name] = value.T


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """All but the frozen ones, ``requires_grad=False``, which no part of a step may touch."""
    return [p for p in parameters if p.requires_grad]


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Those that a step uses: one that is left from before its parameter was frozen is not."""
    return [p.grad for p in trained(parameters) if p.grad is not None]


class StepConstraint(Protocol):
    """An SAE that has something to do right before and after every optimiser step on its weights."""

    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def before_optimizer_step(self) -> None: ...
    def after_optimizer_step(self) -> None: ...


_constrained: "weakref.WeakSet[Any]" = weakref.WeakSet()


@torch.compiler.disable  # of a step that is compiled, what it registers would be lost
def constrain_optimizer_steps(sae: StepConstraint) -> None:
    """From now on, whatever optimiser steps ``sae.W_dec`` calls the SAE's two methods around the step.

    The recipe's order is clip, project, step, renormalise; a trainer that knows nothing of it, such as
    SAELens's, leaves no other place between clipping and the step. torch offers these hooks for all optimisers
    of a process; ours are registered when a first SAE asks, and pass by every optimiser without its weights, and
    those that have ``applies_constraint``.
    """
    global _constrained
    if sae in _constrained:
        return
    with _lock:
        _register_hooks_once()
        # Anew, since another thread's step may be looking through it.
        _constrained = weakref.WeakSet([*_constrained, sae])


_lock = threading.Lock()
_hooks_registered = False


def _register_hooks_once() -> None:
    global _hooks_registered
    if not _hooks_registered:
        register_optimizer_step_pre_hook(lambda optimizer, *_: _notify(optimizer, "before_optimizer_step"))
        register_optimizer_step_post_hook(lambda optimizer, *_: _notify(optimizer, "after_optimizer_step"))
        _hooks_registered = True


def _notify(optimizer: Optimizer, method: str) -> None:
    if getattr(optimizer, "applies_constraint", False):
        return
    stepped = {id(p) for p in parameters_of(optimizer)}
    for sae in list(_constrained):
        # An optimiser may have been given no frozen weights, and the router's bias may still have b_dec to follow.
        if id(sae.W_dec if sae.W_dec.requires_grad else sae.b_dec) in stepped:
            getattr(sae, method)()
