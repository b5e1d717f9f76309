"""Adam that keeps the rows of one matrix, the decoder, at unit norm."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from sae_lens_switch_kernels import (
    RowGrads,
    WorkingCopies,
    clip,
    rounded_moments,
    to_huge_pages,
    triton_kernel,
    zeros_huge,
)
from torch import Tensor, nn
from torch.optim.adam import adam
from typing_extensions import override

from sae_lens_switch.common.torch_private import OpenAdam, add_to_all, fused_adam
from sae_lens_switch.common.types import StateDict
from sae_lens_switch.saes.decoder_constraint import (
    AppliesConstraint,
    normalize_rows_,
    project_out_rows,
    project_out_rows_,
    row_blocks,
)
from sae_lens_switch.training.optim.gradients import gradients, parameters_of, trained
from sae_lens_switch.training.optim.master_weights import MasterWeights

# Tuned on a CPU: a block of rows stays in cache while it is projected, stepped and renormalised.
_ROWS_STEPPED = 1024
# Where the host reads a number without waiting for a device, and can skip a step itself.
_READ_AT_ONCE = {"cpu"}


class ConstrainedAdam(AppliesConstraint, OpenAdam):
    """torch's Adam, fused where the device supports it, that keeps the rows of one matrix at unit norm as it steps.

    Steps in memory order, and low-precision parameters in float32 (``MasterWeights``). Frozen parameters
    (``requires_grad=False``) stay bit-identical, a frozen ``unit_rows`` too.

    Args:
        unit_rows: The matrix [F, D] whose rows are projected before and renormalised after the step, block by block, so
            that each block is read from and written to memory once. None: no constraint.
        project: Whether to remove the gradient's component along each of its rows.
        copied: Matrices whose working copies in low precision, if products use any, are written as they are stepped.
        low_moments: Matrices whose moments are kept in bfloat16, rounded stochastically.
        after_step: Called at the end of a step, while parameters are still swapped.

    Raises:
        ValueError: If the device has no fused step, or weights are float64, for moments in bfloat16.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        unit_rows: nn.Parameter | None = None,
        project: bool = True,
        copied: Iterable[nn.Parameter] = (),
        low_moments: Iterable[nn.Parameter] = (),
        after_step: Callable[[], None] | None = None,
    ) -> None:
        parameters = list(parameters)
        try:
            super().__init__(parameters, lr=lr, betas=betas, fused=True)
        except RuntimeError:  # torch has no fused step for this device
            super().__init__(parameters, lr=lr, betas=betas)
        self.unit_rows, self.project, self._low_moments = unit_rows, project, set(low_moments)
        unfit = "" if self.is_fused or not self._low_moments else f"a device without fused Adam, {parameters[0].device}"
        unfit = "weights of float64" if any(map(_is_double, self._low_moments)) else unfit
        if unfit:
            raise ValueError(f"moments_dtype must be 'float32' for {unfit}; got 'bfloat16'")
        # Of all processes' gradients, where this one has a part of them.
        self.total_norm: Callable[[list[Tensor]], Tensor] | None = None
        self.row_grads = RowGrads(active_only=False) if unit_rows is not None and project else None
        self.copies = WorkingCopies(copied)
        self._masters = MasterWeights(self, masters=True, after_step=after_step, copies=self.copies)

    def prepared(self) -> AbstractContextManager[None]:
        """For one training step: copies and masters are current, whoever has written the weights."""
        self._masters.refresh()
        return self.copies.offered()

    @property
    def is_fused(self) -> bool:
        return bool(self.param_groups[0]["fused"])

    @override
    def collect(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        """As torch's, without frozen parameters, and with new moments in huge pages, as a step reads all of them."""
        group = group | {"params": trained(group["params"])}
        fresh = [p for p in group["params"] if p.grad is not None and not self.state[p]]
        if fresh:
            super().collect(group, *([] for _ in lists))
        for p in fresh:
            for name in ("exp_avg", "exp_avg_sq"):
                t = self.state[p][name]
                dtype = torch.bfloat16 if p in self._low_moments else t.dtype
                self.state[p][name] = zeros_huge(*t.shape, dtype=dtype, device=t.device)
        return super().collect(group, *lists)

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        """As torch's, with moments in huge pages; steps are fused if this device can, whatever the checkpoint's."""
        fused = self.is_fused
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["fused"] = fused
            for p in group["params"]:
                if p not in self.state:
                    continue
                state = self.state[p]
                for name in ("exp_avg", "exp_avg_sq"):  # which torch has cast to what is stepped
                    t = state[name]
                    state[name] = to_huge_pages(t.to(torch.bfloat16) if p in self._low_moments else t)
                if fused:
                    state["step"] = state["step"].to(p.device, torch.float32)

    @torch.no_grad()
    def clipped_step(
        self, loss: Tensor, max_norm: float | None, lr: Tensor | None = None, skipped: Tensor | None = None
    ) -> Tensor:
        """Clip, project, step, renormalise; skips a step whose loss or gradients are non-finite.

        Args:
            loss: What was differentiated.
            max_norm: Gradients are scaled down to this total norm; None: they are not.
            lr: See ``step``.
            skipped: How many steps in a row, and in all, were skipped, [2]; kept up to date.

        Returns:
            Whether there was a step: a bool on the device, for which a GPU is not waited for.
        """
        grads = gradients(parameters_of(self))
        reads, fused = loss.device.type in _READ_AT_ONCE, self.is_fused and not any(map(_is_double, grads))
        counted = self._counted_steps() if fused and not reads else []
        normed = grads if self.total_norm is None else [self.total_norm(grads)]
        is_finite, found_inf, scale = clip(normed, loss, max_norm, skipped, counted)
        if reads and not is_finite:
            pass
        elif fused:
            # The fused step divides by the scale, and changes nothing where something was non-finite.
            radial_F = None if self.row_grads is None else self.row_grads.radial_R
            self.step(grad_scale=scale, found_inf=found_inf, radial_F=radial_F, lr=lr, counted=counted)
        elif is_finite:
            for grad in grads:
                grad.div_(scale)
            self.step()
        if self.row_grads is not None:
            self.row_grads.clear()
        return is_finite

    def _counted_steps(self) -> list[Tensor]:
        """How many steps each parameter has taken that will be stepped; without those that have not taken any."""
        stepped = (p for p in trained(parameters_of(self)) if p.grad is not None)
        return [self.state[p]["step"] for p in stepped if self.state.get(p)]

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        _closure: None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        radial_F: Tensor | None = None,
        lr: Tensor | None = None,
        counted: Sequence[Tensor] = (),
    ) -> None:
        """One step. All arguments are for a fused float32 step only.

        Args:
            grad_scale: Gradients are divided by it.
            found_inf: 1 where the step is to be skipped on the device, 0 otherwise.
            radial_F: <unit_rows.grad, unit_rows> per row, as a backward pass leaves it in ``row_grads``; computed if
                None.
            lr: A float32 number on the device that replaces the groups' own.
            counted: Which parameters' counts of steps include this one already.
        """
        for group in self.param_groups:
            lists: Any = [[] for _ in range(6)]
            self.collect(group, *lists)
            beta1, beta2 = group["betas"]
            fused = fused_adam(tensor_lr=lr is not None)
            options = {"lr": group["lr"] if lr is None else lr, "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
            options |= {"amsgrad": False, "weight_decay": 0.0, "maximize": False}
            options |= {"grad_scale": grad_scale, "found_inf": found_inf}
            if not group["fused"]:
                self._step_not_fused(lists, options)
                continue
            steps, known = lists[-1], {id(step) for step in counted}
            uncounted = [step for step in steps if id(step) not in known]
            if uncounted:
                add_to_all(uncounted, 1 if found_inf is None else 1 - found_inf)
            # torch's fused step assumes the parameter's layout
            states = [_State(p, g.contiguous(), m, v, step) for p, g, m, v, step in zip(*lists[:4], steps, strict=True)]
            with ExitStack() as written:
                copies = [written.enter_context(self._masters.written(state.p)) for state in states]
                plain = [
                    s for s, copy in zip(states, copies, strict=True) if copy is None and s.p is not self.unit_rows
                ]
                together = _step_together(plain, options)
                for state, copy in zip(states, copies, strict=True):
                    if state.p not in together:
                        along_F = radial_F if state.p is self.unit_rows else None
                        self._step_fused(state, copy, options, along_F, fused)

    def _step_not_fused(self, lists: Any, options: dict[str, Any]) -> None:
        W = self.unit_rows if self.unit_rows is not None and self.unit_rows.requires_grad else None
        if W is not None and self.project and W.grad is not None:
            project_out_rows_(W.grad, W)
        adam(*lists, fused=False, **options)
        if W is not None:
            normalize_rows_(W)

    def _step_fused(
        self,
        state: "_State",
        copy: Tensor | None,
        options: dict[str, Any],
        radial_F: Tensor | None,
        fused: Callable[..., None],
    ) -> None:
        """Step one parameter, and write its copy: by a kernel, in blocks that stay in cache, or as a whole."""
        p, grad, m, v, step = state
        unit = p is self.unit_rows
        adam_rows = _kernel_for(p, grad, m, v)
        if adam_rows is not None:
            adam_rows(p, grad, m, v, step, *_numbers(options), radial_F, unit, unit and self.project, copy)
        elif p.ndim and (unit or copy is not None or m.dtype != p.dtype):
            self._step_blocks(state, copy, partial(fused, **options), radial_F, unit)
        else:
            fused([p], [grad], [m], [v], [], [step], **options)
            if copy is not None:
                copy.copy_(p)

    def _step_blocks(
        self,
        state: "_State",
        copy_FD: Tensor | None,
        fused: Callable[..., None],
        radial_F: Tensor | None,
        unit: bool,
    ) -> None:
        W_FD, _, _, _, step = state
        blocks = [row_blocks(t, _ROWS_STEPPED) for t in state[:4]]
        n = len(blocks[0][0])
        copies = [None] * len(blocks[0]) if copy_FD is None else row_blocks(copy_FD, _ROWS_STEPPED)
        scratch = torch.empty_like(W_FD[:n])
        moments = None if state.exp_avg.dtype == W_FD.dtype else W_FD.new_empty(2, *scratch.shape)
        for i, (w, grad, m, v, copy) in enumerate(zip(*blocks, copies, strict=True)):
            if unit and self.project:
                along = None if radial_F is None else radial_F[i * n : (i + 1) * n]
                grad = project_out_rows(grad, w, scratch[: len(w)], along)
            if moments is None:
                fused([w], [grad], [m], [v], [], [step])
            else:
                m32, v32 = (high[: len(w)].copy_(low) for high, low in zip(moments, (m, v), strict=True))
                fused([w], [grad], [m32], [v32], [], [step])
                rows_R = torch.arange(i * n, i * n + len(w), device=w.device)
                for low, t in zip((m, v), rounded_moments(m32, v32, rows_R, step), strict=True):
                    low.copy_(t)
            if unit:
                normalize_rows_(w)
            if copy is not None:
                copy.copy_(w)


class _State(NamedTuple):
    """A parameter with all that a fused step of it takes, as memory holds them."""

    p: nn.Parameter
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


def _step_together(states: list["_State"], options: dict[str, Any]) -> set[nn.Parameter]:
    """Step in one launch what a kernel can. Returns which parameters."""
    states = [s for s in states if all(t.dtype == torch.float32 and t.is_contiguous() for t in s)]
    kernel = triton_kernel("adam_tensors", states[0].p) if states else None
    if kernel is None:
        return set()
    kernel(*map(list, zip(*states, strict=True)), *_numbers(options))
    return {s.p for s in states}


def _numbers(options: dict[str, Any]) -> list[Any]:
    return [options[name] for name in ("lr", "beta1", "beta2", "eps", "grad_scale", "found_inf")]


def _is_double(t: Tensor) -> bool:
    return t.dtype == torch.float64


def _kernel_for(*matrices: Tensor) -> Callable[..., None] | None:
    """One kernel for project, step and renormalise: for float32 matrices on a GPU, where it has proven itself."""
    dtypes = {t.dtype for t in matrices[:2]}
    if dtypes != {torch.float32} or any(t.ndim != 2 or not t.is_contiguous() for t in matrices):
        return None
    return triton_kernel("adam_rows", matrices[0])
