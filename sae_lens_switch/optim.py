"""Around the optimiser: the decoder constraint and the learning-rate law."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from sae_lens_switch_kernels import RowGrads
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

# Rows are visited in blocks that stay in cache, so that several operations on a block read memory once; in how many
# rows, is measured on a CPU.
_ROWS_STEPPED = 2048
_ROWS_PROJECTED = 256
_ROWS_NORMALIZED = 4096


def scaling_law_lr(d_sae: int) -> float:
    """2e-4 / sqrt(d_sae / 2^14), the learning rate of arXiv 2410.08201 (from Gao et al. 2024)."""
    if d_sae < 1:
        raise ValueError(f"d_sae must be at least 1; got {d_sae}")
    return 2e-4 / (d_sae / 2**14) ** 0.5


@torch.no_grad()
def normalize_rows_(W_FD: Tensor) -> None:
    """Scale each row of W to unit norm, in place; an all-zero row stays zero, and a unit one as it is, to the bit."""
    info = torch.finfo(W_FD.dtype)
    unit = 8 * info.eps if info.bits >= 32 else 0.0
    for rows in W_FD.split(_ROWS_NORMALIZED):
        norms = rows.norm(dim=1, keepdim=True)
        rows.div_(norms.masked_fill_((norms - 1).abs() <= unit, 1).clamp_min_(info.tiny))


@torch.no_grad()
def remove_parallel_(grad_FD: Tensor, W_FD: Tensor) -> Tensor:
    """Take from each row of grad, in place, its component along the same (unit-norm) row of W.

    Returns the norm of the whole grad as it was before, which costs little while it is in cache.
    """
    norms = []
    for grad_rows, rows in zip(grad_FD.split(_ROWS_PROJECTED), W_FD.split(_ROWS_PROJECTED), strict=True):
        norms.append(_norm(grad_rows))
        dtype = torch.promote_types(rows.dtype, torch.float32)
        along = (grad_rows.to(dtype) * rows.to(dtype)).sum(dim=1, keepdim=True)
        grad_rows.addcmul_(along.to(rows.dtype), rows, value=-1)
    return torch.stack(norms).norm()


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


def fused_adam(
    parameters: Iterable[nn.Parameter],
    lr: float,
    betas: tuple[float, float],
    after_step: Callable[[], None] | None = None,
) -> torch.optim.Adam:
    """torch's Adam, fused where the device has it, that steps in memory order.

    Parameters of less than float32 are stepped in float32, kept by the optimiser and saved with its state: updates
    smaller than a weight's rounding add up instead of being lost. ``after_step`` sees and may change these.
    """
    parameters = list(parameters)
    try:
        optimizer = torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)
    except RuntimeError:  # torch has no fused step for this device
        optimizer = torch.optim.Adam(parameters, lr=lr, betas=betas)
    _StepView(optimizer, masters=True, after_step=after_step)
    return optimizer


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
        self.flipped = [p for p in _parameters(self.optimizer) if p.ndim == 2 and not p.is_contiguous()]
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
        for p in _parameters(self.optimizer):
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
        return {i: self.masters[p] for i, p in enumerate(_parameters(self.optimizer)) if p in self.masters}

    def before_loading(self, state: dict[str, Any]) -> None:
        parameters = _parameters(self.optimizer)
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


class RowSparseAdam(Optimizer):
    """Lazy Adam: of W_enc, W_dec and b_enc only the rows of latents that were active in the step are touched.

    The gradient of all other rows is zero, and the SAE makes no dense one (``RowGrads``): a step touches at most k
    rows a token, however wide the dictionary. It is not Adam: there the moments of every row decay in every step,
    and momentum moves a row after its latent was last active. Here a row has its own count of steps for the bias
    correction, and rests when its latent does. Other parameters take plain Adam steps.

    Moments, and weights of less than float32, are kept in float32. The decoder's constraint, where the SAE has one,
    is kept for the rows that are touched.
    """

    applies_constraint = True

    def __init__(self, sae: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        if not hasattr(sae, "row_grads"):
            raise ValueError(
                "optimizer='row_sparse_adam' needs an SAE with sparse gradients, switch or sparse_topk; "
                f"got {sae.cfg.architecture()}"
            )
        super().__init__(sae.parameters(), {"lr": lr, "betas": betas, "eps": eps})
        self.sae = sae
        sae.row_grads = self.row_grads = RowGrads()

    def grads(self) -> list[Tensor]:
        """All there are, the compact ones among them."""
        compact = [g for g in self._by_row().values() if g is not None]
        return compact + [p.grad for p in _parameters(self) if p.grad is not None]

    def _by_row(self) -> dict[nn.Parameter, Tensor | None]:
        sae, r = self.sae, self.row_grads
        by_row = {sae.W_enc: r.dW_enc_RD, sae.W_dec: r.dW_dec_RD}
        return by_row | {sae.b_enc: r.d_bias_R} if hasattr(sae, "b_enc") else by_row

    @torch.no_grad()
    def step(self, _closure: None = None, *, grad_scale: Tensor | float = 1.0) -> None:  # type: ignore[override]
        """One step of the gradients divided by ``grad_scale``."""
        sae, r = self.sae, self.row_grads
        by_row = self._by_row()
        constrained = getattr(sae.cfg, "normalize_decoder", False)
        for group in self.param_groups:
            for p in group["params"]:
                latent_major = p.T if p is sae.W_enc else p
                grad, rows = (by_row[p], r.rows_R) if p in by_row and p.grad is None else (p.grad, None)
                if grad is None:
                    continue
                if p is sae.W_enc and rows is None:
                    grad = grad.T
                weights, state = self._state(p, latent_major.detach(), per_row=p in by_row)
                unit = constrained and p is sae.W_dec
                project = unit and sae.cfg.project_decoder_grad
                if p in by_row and rows is None:  # a dense gradient, from a step with hooks: its rows that are not 0
                    rows = grad.reshape(len(grad), -1).any(dim=1).nonzero().flatten()
                    grad = grad[rows]
                if rows is None:
                    state["step"] += 1
                    m, v = state["exp_avg"], state["exp_avg_sq"]
                    g = grad.to(m.dtype) / grad_scale
                    _adam_update(weights, g, m, v, state["step"], group, torch.empty_like(m))
                else:
                    self._step_rows(weights, grad, rows, state, group, grad_scale, unit, project)
                if "master" in state:
                    target = latent_major.detach()
                    if rows is None:
                        target.copy_(weights)
                    else:
                        target[rows] = weights[rows].to(target.dtype)

    def _state(self, p: nn.Parameter, data: Tensor, per_row: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The weights to step, float32 at least, and their state, of the same shape."""
        state = self.state[p]
        dtype = torch.promote_types(p.dtype, torch.float32)
        if not state:
            # Zeros that nobody has written to take no memory yet, where the system gives pages out one by one.
            state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros(data.shape, dtype=dtype, device=p.device) for _ in "mv"
            )
            state["step"] = torch.zeros(len(data) if per_row else 1, device=p.device)
            if dtype != p.dtype:
                state["master"] = data.to(dtype)
        return state.get("master", data), state

    def _step_rows(
        self,
        weights: Tensor,
        grad: Tensor,
        rows_R: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
        grad_scale: Tensor | float,
        unit: bool,
        project: bool,
    ) -> None:
        if not len(rows_R):
            return
        # On a CPU in blocks that stay in cache, all through the same buffers.
        block = min(_ROWS_STEPPED if weights.device.type == "cpu" else len(rows_R), len(rows_R))
        whole = weights, state["exp_avg"], state["exp_avg_sq"]
        buffers = [t.new_empty(block, *t.shape[1:]) for t in (*whole, state["exp_avg"])]
        step_R = state["step"][rows_R] + 1
        state["step"][rows_R] = step_R
        for rows, g, step in zip(rows_R.split(block), grad.split(block), step_R.split(block), strict=True):
            w, m, v, scratch = (t[: len(rows)] for t in buffers)
            for source, part in zip(whole, (w, m, v), strict=True):
                torch.index_select(source, 0, rows, out=part)
            g = g.to(m.dtype).div_(grad_scale)
            if project:
                g.addcmul_(torch.linalg.vecdot(g, w).unsqueeze(1), w, value=-1)
            _adam_update(w, g, m, v, step, group, scratch)
            if unit:
                normalize_rows_(w)
            for target, part in zip(whole, (w, m, v), strict=True):
                target.index_copy_(0, rows, part)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which however would round the moments of a low-precision weight to the weight's dtype."""
        super().load_state_dict(state_dict)
        for i, p in enumerate(_parameters(self)):
            saved = state_dict["state"].get(i)
            if saved is not None:
                self.state[p] = {name: t.to(p.device).clone() for name, t in saved.items()}


def _adam_update(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, step_R: Tensor, group: dict[str, Any], scratch: Tensor
) -> None:
    """Kingma & Ba 2015, algorithm 1, in place; ``step_R`` counts for each row, or is one for all."""
    beta1, beta2 = group["betas"]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    step = step_R.double().view(-1, *[1] * (w.ndim - 1))
    size, correction = group["lr"] / (1 - beta1**step), (1 - beta2**step).sqrt()
    torch.sqrt(v, out=scratch)
    scratch.div_(correction.to(v.dtype)).add_(group["eps"])
    torch.div(m, scratch, out=scratch)
    w.addcmul_(scratch, size.to(v.dtype), value=-1)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class StepConstraint(Protocol):
    """An SAE that has something to do right before and after every optimiser step on its weights."""

    W_dec: nn.Parameter

    def before_optimizer_step(self) -> Tensor | None: ...
    def after_optimizer_step(self) -> None: ...


_constrained: "weakref.WeakSet[Any]" = weakref.WeakSet()


def constrain_optimizer_steps(sae: StepConstraint) -> None:
    """From now on, whatever optimiser steps ``sae.W_dec`` calls the SAE's two methods around the step.

    The recipe's order is clip, project, step, renormalise; a trainer that knows nothing of it, such as
    SAELens's, leaves no other place between clipping and the step. torch offers these hooks for all optimisers
    of a process; ours are registered when a first SAE asks, and pass by every optimiser without its weights, and
    those that have ``applies_constraint``.
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
    if getattr(optimizer, "applies_constraint", False):
        return
    stepped = {id(p) for p in _parameters(optimizer)}
    for sae in list(_constrained):
        if id(sae.W_dec) in stepped:
            getattr(sae, method)()
