"""The operators as torch knows them: registered, with shapes for tracing and gradients, above every backend.

sparse_decode, matmul_at_indices and latent_weight_grad are each other's derivatives, so they can be differentiated
any number of times. `encode` is differentiated through them. `autoencode` is both halves of an SAE at once, for
training: what encoder and decoder share in the backward pass is made once. Its gradient has no gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from sae_lens_switch_kernels import torch_backend as plain
from sae_lens_switch_kernels.backend import primitives
from sae_lens_switch_kernels.indexing import (
    ExpertGroups,
    RowGrads,
    active_latent_index,
    expert_groups,
    latent_index,
    one_group,
)

# Experts of at most this many latents an active one are computed densely: the matrix product then beats the gather.
# On a CPU measured (kernels/README.md), on a GPU predicted from its bandwidth and matrix rate.
_DENSE_UP_TO = {"cpu": 2}
_DENSE_UP_TO_ON_GPU = 128


@custom_op("sae_lens_switch::sparse_decode", mutates_args=())
def sparse_decode(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor) -> Tensor:
    _check_range("indices_BK", indices_BK, len(W_FD))
    return primitives(W_FD).sparse_decode(values_BK, indices_BK, W_FD)


@custom_op("sae_lens_switch::matmul_at_indices", mutates_args=())
def matmul_at_indices(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    _check_range("indices_BK", indices_BK, len(W_FD))
    return primitives(W_FD).matmul_at_indices(g_BD, W_FD, indices_BK)


@custom_op("sae_lens_switch::latent_weight_grad", mutates_args=())
def latent_weight_grad(values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_latents: int) -> Tensor:
    _check_range("indices_BK", indices_BK, n_latents)
    index = latent_index(indices_BK, n_latents)
    return primitives(g_BD).latent_weight_grads(index, values_BK, g_BD).dW_dec_FD


@sparse_decode.register_fake
def _(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor) -> Tensor:
    return W_FD.new_empty(values_BK.shape[0], W_FD.shape[1])


@matmul_at_indices.register_fake
def _(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    return g_BD.new_empty(indices_BK.shape)


@latent_weight_grad.register_fake
def _(values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_latents: int) -> Tensor:
    return g_BD.new_empty(n_latents, g_BD.shape[1])


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


def _sparse_decode_backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
    values_BK, indices_BK, W_FD = ctx.saved_tensors
    needs_values, _, needs_W = ctx.needs_input_grad
    return (
        matmul_at_indices(grad_BD, W_FD, indices_BK) if needs_values else None,
        None,
        latent_weight_grad(values_BK, indices_BK, grad_BD, len(W_FD)) if needs_W else None,
    )


def _matmul_at_indices_backward(ctx: Any, grad_BK: Tensor) -> tuple[Tensor | None, ...]:
    g_BD, W_FD, indices_BK = ctx.saved_tensors
    needs_g, needs_W, _ = ctx.needs_input_grad
    return (
        sparse_decode(grad_BK, indices_BK, W_FD) if needs_g else None,
        latent_weight_grad(grad_BK, indices_BK, g_BD, len(W_FD)) if needs_W else None,
        None,
    )


def _latent_weight_grad_backward(ctx: Any, grad_FD: Tensor) -> tuple[Tensor | None, ...]:
    values_BK, indices_BK, g_BD = ctx.saved_tensors
    needs_values, _, needs_g, _ = ctx.needs_input_grad
    return (
        matmul_at_indices(g_BD, grad_FD, indices_BK) if needs_values else None,
        None,
        sparse_decode(values_BK, indices_BK, grad_FD) if needs_g else None,
        None,
    )


sparse_decode.register_autograd(_sparse_decode_backward, setup_context=_save_inputs)
matmul_at_indices.register_autograd(_matmul_at_indices_backward, setup_context=_save_inputs)
latent_weight_grad.register_autograd(_latent_weight_grad_backward, setup_context=_save_inputs)


# The encoder alone


@custom_op("sae_lens_switch::encode", mutates_args=())
def encode(
    x_BD: Tensor,
    W_FD: Tensor,
    pre_bias_D: Tensor | None,
    bias_F: Tensor | None,
    scale_F: Tensor | None,
    expert_B: Tensor | None,
    k: int,
    n_experts: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    groups = _groups(x_BD, expert_B, n_experts)
    centered_BD = _centered(x_BD, pre_bias_D, groups)
    with torch.autocast(x_BD.device.type, enabled=False):
        values_BK, indices_BK = primitives(x_BD).topk_encode(centered_BD, W_FD, k, groups, bias_F, scale_F, dtype)
    return groups.unsorted(values_BK.relu_()), groups.unsorted(indices_BK)


@encode.register_fake
def _(x_BD, W_FD, pre_bias_D, bias_F, scale_F, expert_B, k, n_experts, dtype):
    return W_FD.new_empty(x_BD.shape[0], k), x_BD.new_empty(x_BD.shape[0], k, dtype=torch.long)


def _encode_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_BD, W_FD, pre_bias_D, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_BD, W_FD, pre_bias_D, *output)


def _encode_backward(ctx: Any, grad_BK: Tensor, grad_indices: None) -> tuple[Tensor | None, ...]:
    x_BD, W_FD, pre_bias_D, values_BK, indices_BK = ctx.saved_tensors
    needs_x, needs_W, needs_pre_bias, needs_bias = ctx.needs_input_grad[:4]
    # ReLU comes before top-k: a token with fewer than k positive latents carries zeros, and no gradient.
    d_pre_BK = grad_BK * (values_BK > 0)
    d_bias_F = d_pre_BK.new_zeros(len(W_FD)).index_add(0, indices_BK.flatten(), d_pre_BK.flatten())
    return (
        sparse_decode(d_pre_BK, indices_BK, W_FD) if needs_x else None,
        latent_weight_grad(d_pre_BK, indices_BK, x_BD if pre_bias_D is None else x_BD - pre_bias_D, len(W_FD))
        if needs_W
        else None,
        # The pre-bias is shared by all tokens, so its gradient needs the sum over the batch only: one mat-vec.
        -(d_bias_F @ W_FD) if needs_pre_bias else None,
        d_bias_F if needs_bias else None,
        *[None] * 5,
    )


encode.register_autograd(_encode_backward, setup_context=_encode_setup)


# Encoder and decoder together


@custom_op("sae_lens_switch::autoencode", mutates_args=())
def autoencode(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    W_dec_FD: Tensor,
    gates_B: Tensor | None,
    pre_bias_D: Tensor | None,
    bias_F: Tensor | None,
    scale_F: Tensor | None,
    expert_B: Tensor | None,
    dead_N: Tensor | None,
    k: int,
    k_aux: int,
    n_experts: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reconstruction, values, indices; those of the dead latents alone; and the encoder's input, sorted by expert."""
    p = primitives(x_BD)
    groups = _groups(x_BD, expert_B, n_experts)
    centered_BD = _centered(x_BD, pre_bias_D, groups)
    with torch.autocast(x_BD.device.type, enabled=False):
        values_BK, indices_BK = p.topk_encode(centered_BD, W_enc_FD, k, groups, bias_F, scale_F, dtype)
        values_BK.relu_()
        codes = _Codes(p, indices_BK, len(W_dec_FD), groups, dtype)
        out_BD = codes.decode(_gated(values_BK, gates_B, groups), W_dec_FD)
        aux_out_BD, aux_values_BA, aux_indices_BA = (W_dec_FD.new_empty(0) for _ in range(3))
        if dead_N is not None:
            _check_range("dead_N", dead_N, len(W_enc_FD))
            dead = _dead_latents(dead_N, groups, len(W_enc_FD), k_aux)
            aux_values_BA, aux_indices_BA = dead.encode(p, centered_BD, W_enc_FD, k_aux, bias_F, scale_F, dtype)
            aux = _Codes(p, aux_indices_BA, len(dead.rows_N), groups, dtype)
            aux_acts_BA = _gated(aux_values_BA, gates_B, groups)
            aux_out_BD = groups.unsorted(aux.decode(aux_acts_BA, W_dec_FD[dead.rows_N]))
    return (
        groups.unsorted(out_BD),
        groups.unsorted(values_BK),
        groups.unsorted(indices_BK),
        aux_out_BD,
        aux_values_BA,
        aux_indices_BA,
        x_BD.new_empty(0) if centered_BD is x_BD else centered_BD,  # an operator may not return its input
    )


@autoencode.register_fake
def _(x_BD, W_enc_FD, W_dec_FD, gates_B, pre_bias_D, bias_F, scale_F, expert_B, dead_N, k, k_aux, n_experts, dtype):
    B, long = x_BD.shape[0], torch.long
    has_aux, has_centered = dead_N is not None, pre_bias_D is not None or expert_B is not None
    return (
        W_dec_FD.new_empty(x_BD.shape),
        W_enc_FD.new_empty(B, k),
        x_BD.new_empty(B, k, dtype=long),
        W_dec_FD.new_empty(x_BD.shape if has_aux else 0),
        W_enc_FD.new_empty((B, k_aux) if has_aux else 0),
        x_BD.new_empty(B, k_aux, dtype=long) if has_aux else W_dec_FD.new_empty(0),
        x_BD.new_empty(x_BD.shape if has_centered else 0),
    )


@custom_op("sae_lens_switch::autoencode_backward", mutates_args=())
def autoencode_backward(
    grad_out_BD: Tensor | None,
    grad_values_BK: Tensor | None,
    grad_aux_BD: Tensor | None,
    x_BD: Tensor,
    centered_BD: Tensor,
    W_enc_FD: Tensor,
    W_dec_FD: Tensor,
    gates_B: Tensor | None,
    expert_B: Tensor | None,
    dead_N: Tensor | None,
    values_BK: Tensor,
    indices_BK: Tensor,
    aux_values_BA: Tensor,
    aux_indices_BA: Tensor,
    n_experts: int,
    dtype: torch.dtype,
    needs_x: bool,
    needs_pre_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, W_enc, W_dec, gates, pre-bias and bias; empty where not needed."""
    backward = _Backward(x_BD, centered_BD, W_enc_FD, W_dec_FD, gates_B, expert_B, dead_N, n_experts, dtype)
    codes = values_BK, indices_BK, aux_values_BA, aux_indices_BA
    return backward(grad_out_BD, grad_values_BK, grad_aux_BD, *codes, needs_x, needs_pre_bias)


class _Backward:
    """The backward pass of ``autoencode``; with a ``RowGrads``, what that asks for goes there."""

    def __init__(
        self,
        x_BD: Tensor,
        centered_BD: Tensor,
        W_enc_FD: Tensor,
        W_dec_FD: Tensor,
        gates_B: Tensor | None,
        expert_B: Tensor | None,
        dead_N: Tensor | None,
        n_experts: int,
        dtype: torch.dtype,
        row_grads: RowGrads | None = None,
    ) -> None:
        self.p, self.dtype, self.row_grads = primitives(x_BD), dtype, row_grads
        self.active_only = row_grads is not None and row_grads.active_only
        self.leaves_along = row_grads is not None and dtype == W_dec_FD.dtype and dtype.itemsize >= 4
        self.x_BD, self.W_enc_FD, self.W_dec_FD, self.gates_B = x_BD, W_enc_FD, W_dec_FD, gates_B
        self.centered_BD = centered_BD if centered_BD.numel() else x_BD
        self.groups = _groups(x_BD, expert_B, n_experts)
        self.dead_N = dead_N

    def __call__(
        self,
        grad_out_BD: Tensor | None,
        grad_values_BK: Tensor | None,
        grad_aux_BD: Tensor | None,
        values_BK: Tensor,
        indices_BK: Tensor,
        aux_values_BA: Tensor,
        aux_indices_BA: Tensor,
        needs_x: bool,
        needs_pre_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        groups, gates_B, x_BD = self.groups, self.gates_B, self.x_BD
        values_BK, indices_BK = groups.sorted(values_BK), groups.sorted(indices_BK)
        acts_BK = _gated(values_BK, gates_B, groups)
        g_BD = x_BD.new_zeros(x_BD.shape) if grad_out_BD is None else groups.sorted(grad_out_BD).contiguous()
        codes = _Codes(self.p, indices_BK, len(self.W_dec_FD), groups, self.dtype, self.active_only)
        d_acts_BK = d_values_BK = codes.at_indices(g_BD, self.W_dec_FD)
        d_gates_B = x_BD.new_empty(0)
        if gates_B is not None:
            d_gates_B = groups.unsorted((d_acts_BK * values_BK).sum(1).to(gates_B.dtype))
            d_values_BK = _gated(d_acts_BK, gates_B, groups)
        if grad_values_BK is not None:
            d_values_BK = d_values_BK + groups.sorted(grad_values_BK)
        # ReLU comes before top-k: a token with fewer than k positive latents carries zeros, and no gradient.
        d_pre_BK = d_values_BK * (values_BK > 0)
        rows_R, grads = codes.weight_grads(acts_BK, g_BD, d_pre_BK, self.centered_BD, self._along(acts_BK, d_acts_BK))
        d_x_BD = codes.decode(d_pre_BK, self.W_enc_FD) if needs_x else x_BD.new_empty(0)
        if self.dead_N is not None and grad_aux_BD is not None:
            dead = _dead_latents(self.dead_N, groups, len(self.W_enc_FD), aux_indices_BA.shape[1])
            dead_R, dead_grads, d_dead_x_BD = self._aux(dead, grad_aux_BD, aux_values_BA, aux_indices_BA, needs_x)
            rows_R, grads = _joined(rows_R, grads, dead_R, dead_grads)
            d_x_BD = d_x_BD + d_dead_x_BD if needs_x else d_x_BD

        # The pre-bias is shared by all tokens, so its gradient needs the sum over the batch only: one mat-vec.
        dW_dec, dW_enc, d_bias, *along = grads
        d_pre_bias_D = x_BD.new_empty(0)
        if needs_pre_bias:
            d_pre_bias_D = -(d_bias @ self.W_enc_FD if rows_R is None else _weighted_sum(d_bias, rows_R, self.W_enc_FD))
        d_x_BD = groups.unsorted(d_x_BD) if needs_x else d_x_BD
        kept = self.row_grads
        if kept is not None:
            if kept.rows_R is not None or kept.along_R is not None:
                raise RuntimeError("row_grads still holds an earlier backward pass: take a step, or clear() it")
            kept.along_R = along[0] if along else None
        if kept is None or not kept.active_only:
            return d_x_BD, dW_enc, dW_dec, d_gates_B, d_pre_bias_D, d_bias
        kept.rows_R, kept.dW_enc_RD, kept.dW_dec_RD, kept.d_bias_R = rows_R, dW_enc, dW_dec, d_bias
        empty = x_BD.new_empty(0)
        return d_x_BD, empty, empty, d_gates_B, d_pre_bias_D, empty

    def _along(self, acts_BK: Tensor, d_acts_BK: Tensor) -> Tensor | None:
        """<dW_dec[f], W_dec[f]>, by token: dW_dec[f] is the sum of acts g, and d_acts is <g, W_dec[f]>."""
        return acts_BK * d_acts_BK if self.leaves_along else None

    def _aux(
        self, dead: "_DeadLatents", grad_BD: Tensor, values_BA: Tensor, indices_BA: Tensor, needs_x: bool
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """The dead latents with gradients, these, and what comes back to x."""
        g_BD = self.groups.sorted(grad_BD).contiguous()
        codes = _Codes(self.p, indices_BA, len(dead.rows_N), self.groups, self.dtype, self.active_only)
        d_acts_BA = codes.at_indices(g_BD, self.W_dec_FD[dead.rows_N])
        d_pre_BA = dead.only_real(_gated(d_acts_BA, self.gates_B, self.groups), indices_BA)
        acts_BA = _gated(values_BA, self.gates_B, self.groups)
        rows_R, grads = codes.weight_grads(acts_BA, g_BD, d_pre_BA, self.centered_BD, self._along(acts_BA, d_acts_BA))
        d_x_BD = codes.decode(d_pre_BA, self.W_enc_FD[dead.rows_N]) if needs_x else g_BD.new_empty(0)
        return dead.rows_N if rows_R is None else dead.rows_N[rows_R], grads, d_x_BD


def _joined(
    rows_R: Tensor | None, grads: tuple[Tensor, ...], more_R: Tensor, more: tuple[Tensor, ...]
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The sum of two sets of rows; rows_R None: all rows."""
    if rows_R is None:
        return None, tuple(g.index_add_(0, more_R, m) for g, m in zip(grads, more, strict=True))
    both_R, where = torch.cat([rows_R, more_R]).unique(return_inverse=True)
    # rows_R are distinct and most of the result, so they are copied; the others may repeat.
    joined = []
    for g, m in zip(grads, more, strict=True):
        sums = g.new_zeros(len(both_R), *g.shape[1:])
        sums[where[: len(rows_R)]] = g
        joined.append(sums.index_add_(0, where[len(rows_R) :], m))
    return both_R, tuple(joined)


def _weighted_sum(weights_R: Tensor, rows_R: Tensor, W_FD: Tensor) -> Tensor:
    """sum_r weights[r] W[rows[r]], [D], without a copy of the rows; in parts, which run in parallel."""
    parts = max(1, len(rows_R) // 256)
    pad = -len(rows_R) % parts
    rows = torch.nn.functional.pad(rows_R, (0, pad)).view(parts, -1)
    weights = torch.nn.functional.pad(weights_R, (0, pad)).view(parts, -1)
    return primitives(W_FD).sparse_decode(weights, rows, W_FD).sum(0)


class _DeadLatents(NamedTuple):
    """Dead latents by expert, as many of each: those with fewer are filled up.

    rows_N: [E * P], latents; P is the most that any expert has, and no less than are to be chosen
    real_N: which of them count; None: all
    """

    rows_N: Tensor
    real_N: Tensor | None
    groups: ExpertGroups

    def encode(
        self,
        p: Any,
        x_BD: Tensor,
        W_FD: Tensor,
        k: int,
        bias_F: Tensor | None,
        scale_F: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Pre-activations [B, k] of each token's k best of its own expert, and where in rows_N they are."""
        W_ND, bias_N, scale_N = (None if t is None else t[self.rows_N] for t in (W_FD, bias_F, scale_F))
        if self.real_N is not None:
            nothing_N = W_FD.new_zeros(len(self.rows_N)).masked_fill_(~self.real_N, -torch.inf)
            bias_N = nothing_N if bias_N is None else bias_N + nothing_N
        values_BA, indices_BA = p.topk_encode(x_BD, W_ND, k, self.groups, bias_N, scale_N, dtype)
        return self.only_real(values_BA, indices_BA), indices_BA

    def only_real(self, values_BA: Tensor, indices_BA: Tensor) -> Tensor:
        """Zero where there was nothing to choose."""
        return values_BA if self.real_N is None else values_BA.masked_fill(~self.real_N[indices_BA], 0)


def _dead_latents(dead_N: Tensor, groups: ExpertGroups, n_latents: int, k: int) -> _DeadLatents:
    E = len(groups.offsets_E1) - 1
    if E == 1:
        return _DeadLatents(dead_N, None, groups)
    expert_N = torch.div(dead_N, n_latents // E, rounding_mode="floor")
    by_expert, order = expert_N.sort(stable=True)
    count_E = torch.bincount(expert_N, minlength=E)
    P = max(k, int(count_E.max()))
    first_E = count_E.cumsum(0) - count_E
    place_N = by_expert * P + torch.arange(len(dead_N), device=dead_N.device) - first_E[by_expert]
    rows_N = dead_N[:1].repeat(E * P)
    rows_N[place_N] = dead_N[order]
    real_N = torch.zeros(E * P, dtype=torch.bool, device=dead_N.device)
    real_N[place_N] = True
    return _DeadLatents(rows_N, real_N, groups)


@autoencode_backward.register_fake
def _(*args):
    x_BD, _, W_enc_FD, W_dec_FD, gates_B = args[3:8]
    needs_x, needs_pre_bias = args[16:]
    empty = x_BD.new_empty
    return (
        empty(x_BD.shape if needs_x else 0),
        torch.empty_like(W_enc_FD),
        torch.empty_like(W_dec_FD),
        empty(0) if gates_B is None else torch.empty_like(gates_B),
        empty(x_BD.shape[1] if needs_pre_bias else 0),
        empty(len(W_enc_FD)),
    )


def _autoencode_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BD, W_enc_FD, W_dec_FD, gates_B, _, _, _, expert_B, dead_N, _, _, n_experts, dtype = inputs
    _, values_BK, indices_BK, _, aux_values_BA, aux_indices_BA, centered_BD = output
    ctx.mark_non_differentiable(indices_BK, aux_values_BA, aux_indices_BA, centered_BD)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *(x_BD, centered_BD, W_enc_FD, W_dec_FD, gates_B, expert_B, dead_N),
        *(values_BK, indices_BK, aux_values_BA, aux_indices_BA),
    )
    ctx.constants = n_experts, dtype


def _autoencode_backward(ctx: Any, grad_out_BD, grad_values_BK, _i, grad_aux_BD, *_rest) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    grads = autoencode_backward(
        grad_out_BD, grad_values_BK, grad_aux_BD, *ctx.saved_tensors, *ctx.constants, needs[0], needs[4]
    )
    return *(g if needed else None for g, needed in zip(grads, needs[:6], strict=True)), *[None] * 7


autoencode.register_autograd(_autoencode_backward, setup_context=_autoencode_setup)


class AutoencodeRows(torch.autograd.Function):
    """``autoencode`` whose backward pass leaves in a RowGrads what that asks for."""

    @staticmethod
    def forward(_row_grads: RowGrads, *inputs: Any) -> tuple[Tensor, ...]:
        return autoencode(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.row_grads = inputs[0]
        _autoencode_setup(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out_BD, grad_values_BK, _, grad_aux_BD, *_ = grads
        needs = ctx.needs_input_grad[1:]
        *inputs, values_BK, indices_BK, aux_values_BA, aux_indices_BA = ctx.saved_tensors
        n_experts, dtype = ctx.constants
        backward = _Backward(*inputs, n_experts=n_experts, dtype=dtype, row_grads=ctx.row_grads)
        codes = values_BK, indices_BK, aux_values_BA, aux_indices_BA
        grads = backward(grad_out_BD, grad_values_BK, grad_aux_BD, *codes, needs[0], needs[4])
        elsewhere = (1, 2, 5) if ctx.row_grads.active_only else ()  # W_enc, W_dec and bias
        found = (g if needs[i] and i not in elsewhere else None for i, g in enumerate(grads))
        return None, *found, *[None] * 7


class _Codes:
    """The products of codes at fixed indices: sparse, or dense within each expert where experts are small."""

    def __init__(
        self,
        p: Any,
        indices_BK: Tensor,
        n_latents: int,
        groups: ExpertGroups,
        dtype: torch.dtype,
        active_only: bool = False,
    ) -> None:
        self.p, self.indices_BK, self.n_latents, self.dense_options = p, indices_BK, n_latents, (groups, dtype)
        self.active_only = active_only
        M, K = n_latents // (len(groups.offsets_E1) - 1), indices_BK.shape[1]
        self.dense = not active_only and K * _DENSE_UP_TO.get(indices_BK.device.type, _DENSE_UP_TO_ON_GPU) >= M

    def decode(self, values_BK: Tensor, W_FD: Tensor) -> Tensor:
        if self.dense:
            return self.p.grouped_decode(values_BK, self.indices_BK, W_FD, *self.dense_options)
        return self.p.sparse_decode(values_BK, self.indices_BK, W_FD)

    def at_indices(self, g_BD: Tensor, W_FD: Tensor) -> Tensor:
        if self.dense:
            return self.p.grouped_matmul_at_indices(g_BD, W_FD, self.indices_BK, *self.dense_options)
        return self.p.matmul_at_indices(g_BD, W_FD, self.indices_BK)

    def weight_grads(
        self, values_BK: Tensor, g_BD: Tensor, d_pre_BK: Tensor, x_BD: Tensor, along_BK: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Which rows, None for all, of dW_dec, dW_enc and d_bias; and of along's sums, if given."""
        if self.dense:
            dW_dec_FD, dW_enc_FD = (
                self.p.grouped_weight_grad(v_BK, self.indices_BK, y_BD, self.n_latents, *self.dense_options)
                for v_BK, y_BD in ((values_BK, g_BD), (d_pre_BK, x_BD))
            )
            sums = [self._sums(t_BK) for t_BK in (d_pre_BK, along_BK) if t_BK is not None]
            return None, (dW_dec_FD, dW_enc_FD, *sums)
        rows_R, index = None, None
        if self.active_only:
            rows_R, index = active_latent_index(self.indices_BK)
        index = index or latent_index(self.indices_BK, self.n_latents)
        grads = self.p.latent_weight_grads(index, values_BK, g_BD, d_pre_BK, x_BD)[:3]
        return rows_R, grads if along_BK is None else (*grads, index.sums(along_BK.flatten()[index.order_N]))

    def _sums(self, t_BK: Tensor) -> Tensor:
        """[F], of each latent's entries, in a fixed order: index_add_ has none on a GPU, and sums in t's dtype."""
        if t_BK.device.type == "cpu" and self.p is plain:
            return t_BK.new_zeros(self.n_latents).index_add_(0, self.indices_BK.flatten(), t_BK.flatten())
        ones_B1 = t_BK.new_ones(len(t_BK), 1)
        sums_F1 = self.p.grouped_weight_grad(t_BK, self.indices_BK, ones_B1, self.n_latents, *self.dense_options)
        return sums_F1.squeeze(1)


def _check_range(name: str, t: Tensor, end: int) -> None:
    if t.device.type == "cpu":
        low, high = (int(v) for v in t.aminmax()) if t.numel() else (0, 0)
        if low < 0 or high >= max(end, 1):
            raise ValueError(f"{name} must lie in [0, {end}); got values from {low} to {high}")
    else:  # reading a value back would stall a GPU every call, so there it is an assertion on the device
        torch.ops.aten._assert_async.msg(((t >= 0) & (t < end)).all(), f"{name} must lie in [0, {end})")


def _groups(x_BD: Tensor, expert_B: Tensor | None, n_experts: int) -> ExpertGroups:
    if expert_B is not None:
        _check_range("expert_B", expert_B, n_experts)
    return one_group(len(x_BD), x_BD.device) if expert_B is None else expert_groups(expert_B, n_experts)


def _centered(x_BD: Tensor, pre_bias_D: Tensor | None, groups: ExpertGroups) -> Tensor:
    if pre_bias_D is None:
        return groups.sorted(x_BD)
    return x_BD - pre_bias_D if groups.order_B is None else groups.sorted(x_BD).sub_(pre_bias_D)


def _gated(values_BK: Tensor, gates_B: Tensor | None, groups: ExpertGroups) -> Tensor:
    return values_BK if gates_B is None else values_BK * groups.sorted(gates_B).unsqueeze(1).to(values_BK.dtype)
