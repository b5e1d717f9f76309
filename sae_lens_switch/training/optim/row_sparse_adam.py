"""Row-sparse Adam: a step whose cost does not grow with the width of the dictionary."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from sae_lens.saes.sae import TrainingSAE
from sae_lens_switch_kernels import (
    RowGrads,
    WorkingCopies,
    clip,
    rounded_moments,
    to_huge_pages,
    triton_kernel,
    version_of,
    zeros_huge,
)
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sae_lens_switch.common.types import StateDict
from sae_lens_switch.saes.decoder_constraint import AppliesConstraint, normalize_rows_, project_out_rows
from sae_lens_switch.saes.sparse_sae import SparseTrainingSAE
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE
from sae_lens_switch.training.optim.gradients import gradients, parameters_of, trained
from sae_lens_switch.training.optim.master_weights import taken_over

# Tuned on a CPU: a block of rows stays in cache while it is gathered, stepped and scattered.
_ROWS_STEPPED = 1024


class RowSparseAdam(AppliesConstraint, Optimizer):
    """Lazy Adam: of W_enc, W_dec and b_enc only the rows of latents active in the step are touched.

    The gradient of all other rows is zero, and the SAE makes no dense one (``RowGrads``): a step touches at most k
    rows per token, however wide the dictionary. It is not Adam, in which the moments of every row decay in every step
    and momentum moves a row after its latent was last active. Here each row has its own step count for the bias
    correction, and rests while its latent does. Other parameters take plain Adam steps.

    Moments, and weights of less than float32, are kept in float32; with ``low_moments`` those of W_enc and W_dec in
    bfloat16, rounded stochastically. The SAE's decoder constraint, if any, holds for the
    rows that are touched. Frozen parameters (``requires_grad=False``) stay bit-identical.

    Raises:
        ValueError: If the SAE has no sparse gradients, or its weights are float64, for moments in bfloat16.
    """

    def __init__(
        self,
        sae: TrainingSAE[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        low_moments: bool = False,
    ) -> None:
        if not isinstance(sae, SparseTrainingSAE):
            raise ValueError(
                "optimizer='row_sparse_adam' needs an SAE with sparse gradients, switch or sparse_topk; "
                f"got {sae.cfg.architecture()}"
            )
        if isinstance(sae, SwitchTrainingSAE) and sae.cfg.expert_overlap_coefficient:
            raise ValueError(
                "expert_overlap_coefficient must be 0 with optimizer='row_sparse_adam', which steps only latents that "
                f"are active; got {sae.cfg.expert_overlap_coefficient}"
            )
        super().__init__(sae.parameters(), {"lr": lr, "betas": betas, "eps": eps})
        self.sae = sae
        self._low_moments = {sae.W_enc, sae.W_dec} if low_moments else set()
        if any(p.dtype == torch.float64 for p in self._low_moments):
            raise ValueError("moments_dtype must be 'float32' for weights of float64; got 'bfloat16'")
        self.row_grads = RowGrads()
        # Of all processes' gradients, where this one has a part of them.
        self.total_norm: Callable[[list[Tensor]], Tensor] | None = None
        self.copies = WorkingCopies((sae.W_enc, sae.W_dec))
        self._versions: dict[nn.Parameter, tuple[int, int]] = {}  # of weights with a master, after their last step

    def prepared(self) -> AbstractContextManager[None]:
        """For one training step: copies are current, whoever has written the weights."""
        return self.copies.offered()

    @torch.no_grad()
    def clipped_step(
        self, loss: Tensor, max_norm: float | None, lr: Tensor | None = None, skipped: Tensor | None = None
    ) -> Tensor:
        """Clip, project, step, renormalise; skips a step whose loss or gradients are non-finite.

        Args:
            loss: What was differentiated.
            max_norm: Gradients are scaled down to this total norm; None: they are not.
            lr: Must be None: which rows were active has been waited for, so that nothing is left to hide from the host.
            skipped: As in ``ConstrainedAdam``.

        Returns:
            Whether there was a step.
        """
        assert lr is None
        grads = self._gradients()
        normed = grads if self.total_norm is None else [self.total_norm(grads)]
        is_finite, _, scale = clip(normed, loss, max_norm, skipped)
        if is_finite:
            self.step(grad_scale=scale)
            self.sae.after_own_step()
        self.row_grads.clear()
        return is_finite

    def create_state(self) -> None:
        """The latents' state, before the first of them is active."""
        for p in trained(list(self._by_row())):
            data = p.detach().T if p is self.sae.W_enc else p.detach()
            self._state(p, data.view(len(data), -1))

    def _gradients(self) -> list[Tensor]:
        """All that a step uses, the compact ones first."""
        compact = [g for p, g in self._by_row().items() if g is not None and p.requires_grad]
        return compact + gradients(parameters_of(self))

    def _by_row(self) -> dict[nn.Parameter, Tensor | None]:
        W_enc, W_dec, b_enc = self.sae.latent_parameters()
        r = self.row_grads
        by_row = {W_enc: r.dW_enc_RD, W_dec: r.dW_dec_RD}
        return by_row if b_enc is None else by_row | {b_enc: r.d_bias_R}

    @torch.no_grad()
    def step(self, _closure: None = None, *, grad_scale: Tensor | float = 1.0) -> None:  # type: ignore[override]
        """One step of the gradients divided by ``grad_scale``."""
        sae = self.sae
        by_row = self._by_row()
        for group in self.param_groups:
            for p in trained(group["params"]):
                data, rows_R = p.detach(), self.row_grads.rows_R
                grad = by_row.get(p)
                if p in by_row:
                    data = data.T if p is sae.W_enc else data
                    if p.grad is not None:  # a dense gradient, from a step with hooks: its rows that are not 0
                        dense = p.grad.T if p is sae.W_enc else p.grad
                        rows_R = dense.reshape(len(dense), -1).any(dim=1).nonzero().flatten()
                        grad = dense[rows_R]
                elif p.grad is not None:  # any other parameter is one row
                    data, grad = data.view(1, -1), p.grad.reshape(1, -1)
                    rows_R = torch.zeros(1, dtype=torch.long, device=p.device)
                if grad is not None and rows_R is not None and len(rows_R):
                    self._step_rows(p, data.view(len(data), -1), grad.view(len(grad), -1), rows_R, group, grad_scale)

    def _step_rows(
        self, p: nn.Parameter, data: Tensor, grad: Tensor, rows_R: Tensor, group: dict[str, Any], scale: Tensor | float
    ) -> None:
        """Step rows [R] of the parameter, seen as ``data`` [rows, columns], and write them in low precision as well."""
        state = self._state(p, data)
        if "master" in state and self._versions.get(p, version_of(p)) != version_of(p):
            state["master"] = taken_over(state["master"], data)
        weights = state.get("master", data)
        constraint = self.sae.decoder_constraint if p is self.sae.W_dec else None
        project = constraint is not None and constraint.project
        beta1, beta2 = group["betas"]
        options = _Options(beta1, beta2, group["lr"], group["eps"], scale, constraint is not None, project)
        radial_R = self.row_grads.radial_R if project else None
        with self.copies.written(p) as copy:
            copy = copy.T if copy is not None and p is self.sae.W_enc else copy
            rows = _Rows(weights, grad, state["moments"], state["step"], rows_R, copy if weights is data else data)
            if not _step_by_kernel(rows, options, radial_R):
                _step_blocks(rows, options, radial_R)
        self._versions[p] = version_of(p)

    def _state(self, p: nn.Parameter, data: Tensor) -> dict[str, Tensor]:
        """step [rows], moments [rows, 2, columns], and weights to step where those of the SAE are less than float32."""
        state = self.state[p]
        dtype = torch.promote_types(p.dtype, torch.float32)
        if not state:
            # First and second moment of a row lie side by side, since they are always read and written together.
            kept = torch.bfloat16 if p in self._low_moments else dtype
            state["moments"] = zeros_huge(len(data), 2, data.shape[1], dtype=kept, device=p.device)
            state["step"] = torch.zeros(len(data), dtype=torch.float32, device=p.device)
            if dtype != p.dtype:
                state["master"] = data.to(dtype)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """As torch's, which however would round the moments of a low-precision weight to the weight's dtype."""
        super().load_state_dict(state_dict)
        self._versions = {}
        for i, p in enumerate(parameters_of(self)):
            saved = state_dict["state"].get(i)
            if saved is not None:
                state = {name: t.to(p.device) for name, t in saved.items()}
                kept = torch.bfloat16 if p in self._low_moments else torch.promote_types(p.dtype, torch.float32)
                state["moments"] = state["moments"].to(kept)
                self.state[p] = {name: to_huge_pages(t) for name, t in state.items()}


class _Rows(NamedTuple):
    """What a step reads and writes of one parameter: all but the gradient and the index have a row per latent."""

    weights: Tensor
    grad_RD: Tensor
    moments: Tensor
    step: Tensor
    rows_R: Tensor
    copy: Tensor | None  # in low precision


class _Options(NamedTuple):
    beta1: float
    beta2: float
    lr: float
    eps: float
    scale: Tensor | float
    unit_rows: bool
    project: bool


def _step_by_kernel(rows: _Rows, options: _Options, radial_R: Tensor | None) -> bool:
    """One launch for all rows, where a kernel has proven itself. Returns whether there was one."""
    weights, grad_RD, moments, step, rows_R, copy = rows
    is_one_row = len(weights) == 1  # in full: it is stepped as a line of numbers
    kernel = triton_kernel("adam_rows" if is_one_row else "lazy_adam_rows", weights)
    if kernel is None or not weights.is_contiguous():
        return False
    scale = options.scale if isinstance(options.scale, Tensor) else weights.new_full((), options.scale)
    numbers = options.lr, options.beta1, options.beta2, options.eps, scale
    constraint = radial_R, options.unit_rows, options.project, copy
    matrices = weights, grad_RD.contiguous(), moments[:, 0], moments[:, 1], step
    if is_one_row:
        kernel(*matrices[:4], step.add_(1), *numbers, None, *constraint)
    else:
        kernel(*matrices, rows_R, *numbers, *constraint)
    return True


def _step_blocks(rows: _Rows, options: _Options, radial_R: Tensor | None) -> None:
    weights, grad_RD, moments, step, rows_R, copy = rows
    step_R = step[rows_R] + 1
    step[rows_R] = step_R
    block = min(_ROWS_STEPPED if weights.device.type == "cpu" else len(rows_R), len(rows_R))
    w_buffer, moments_buffer = (weights.new_empty(block, *t.shape[1:]) for t in (weights, moments))
    low = None if moments.dtype == weights.dtype else moments.new_empty(moments_buffer.shape)
    buffers = [torch.empty_like(w_buffer) for _ in range(2)]
    parts = zip(rows_R.split(block), grad_RD.split(block), step_R.split(block), strict=True)
    for i, (part_R, grad_part, step_part) in enumerate(parts):
        w, both = w_buffer[: len(part_R)], moments_buffer[: len(part_R)]
        g, scratch = (t[: len(part_R)] for t in buffers)
        torch.index_select(weights, 0, part_R, out=w)
        if low is None:
            torch.index_select(moments, 0, part_R, out=both)
        else:
            both.copy_(torch.index_select(moments, 0, part_R, out=low[: len(part_R)]))
        torch.div(grad_part, options.scale, out=g)
        if options.project:
            along = None if radial_R is None else radial_R[i * block : (i + 1) * block] / options.scale
            g, scratch = project_out_rows(g, w, scratch, along), g
        _adam_update(w, g, both[:, 0], both[:, 1], step_part, options, scratch)
        if options.unit_rows:
            normalize_rows_(w)
        if low is not None:
            both = torch.stack(rounded_moments(both[:, 0], both[:, 1], part_R, step_part), 1)
        scatter_rows_(moments, part_R, both)
        scatter_rows_(weights, part_R, w)
        if copy is not None:
            copy[part_R] = w.to(copy.dtype)


def _adam_update(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, step_R: Tensor, options: _Options, scratch: Tensor
) -> None:
    """Kingma & Ba 2015, algorithm 1, in place; ``step_R`` counts for each row."""
    beta1, beta2 = options.beta1, options.beta2
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    # size * m / (sqrt(v) / correction + eps), with what differs from row to row applied to whole rows
    step = step_R.double().unsqueeze(1)
    correction = (1 - beta2**step).sqrt()
    size = options.lr * correction / (1 - beta1**step)
    torch.sqrt(v, out=scratch).add_((options.eps * correction).to(v.dtype))
    torch.div(m, scratch, out=scratch).mul_(size.to(v.dtype))
    w.sub_(scratch)


def scatter_rows_(target: Tensor, rows_R: Tensor, source: Tensor) -> None:
    """target[rows] = source, both contiguous; as elements of the largest size, since torch moves them one by one."""
    target, source = target.flatten(1), source.flatten(1)
    if target.shape[1] * target.element_size() % 16 == 0:
        target, source = target.view(torch.complex128), source.view(torch.complex128)
    target.index_copy_(0, rows_R, source)
