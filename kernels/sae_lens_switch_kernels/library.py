"""The operators as torch knows them: registered, with shapes for tracing and gradients, above every backend.

sparse_decode, matmul_at_indices and latent_weight_grad are each other's derivatives, so they can be differentiated
any number of times. `encode` is differentiated through them. `autoencode` is both halves of an SAE at once, for
training: what encoder and decoder share in the backward pass is made once. Its gradient has no gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from sae_lens_switch_kernels.backend import primitives
from sae_lens_switch_kernels.index import ExpertGroups, expert_groups, latent_index, one_group

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
            W_dead, bias, scale = (None if t is None else t[dead_N] for t in (W_enc_FD, bias_F, scale_F))
            everyone = one_group(len(x_BD), x_BD.device)
            aux_values_BA, aux_indices_BA = p.topk_encode(centered_BD, W_dead, k_aux, everyone, bias, scale, dtype)
            aux = _Codes(p, aux_indices_BA, len(dead_N), everyone, dtype)
            aux_out_BD = groups.unsorted(aux.decode(aux_values_BA, W_dec_FD[dead_N]))
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
    p = primitives(x_BD)
    groups = _groups(x_BD, expert_B, n_experts)
    if not centered_BD.numel():
        centered_BD = x_BD
    values_BK, indices_BK = groups.sorted(values_BK), groups.sorted(indices_BK)
    acts_BK = _gated(values_BK, gates_B, groups)
    g_BD = x_BD.new_zeros(x_BD.shape) if grad_out_BD is None else groups.sorted(grad_out_BD).contiguous()
    codes = _Codes(p, indices_BK, len(W_dec_FD), groups, dtype)
    d_values_BK = codes.at_indices(g_BD, W_dec_FD)
    d_gates_B = x_BD.new_empty(0)
    if gates_B is not None:
        d_gates_B = groups.unsorted((d_values_BK * values_BK).sum(1).to(gates_B.dtype))
        d_values_BK = _gated(d_values_BK, gates_B, groups)
    if grad_values_BK is not None:
        d_values_BK = d_values_BK + groups.sorted(grad_values_BK)
    # ReLU comes before top-k: a token with fewer than k positive latents carries zeros, and no gradient.
    d_pre_BK = d_values_BK * (values_BK > 0)
    dW_dec_FD, dW_enc_FD, d_bias_F = codes.weight_grads(acts_BK, g_BD, d_pre_BK, centered_BD)
    d_x_BD = codes.decode(d_pre_BK, W_enc_FD) if needs_x else x_BD.new_empty(0)

    if dead_N is not None and grad_aux_BD is not None:
        g_BD = groups.sorted(grad_aux_BD).contiguous()
        aux = _Codes(p, aux_indices_BA, len(dead_N), one_group(len(x_BD), x_BD.device), dtype)
        d_aux_BA = aux.at_indices(g_BD, W_dec_FD[dead_N])
        for grad, dead in zip(
            (dW_dec_FD, dW_enc_FD, d_bias_F), aux.weight_grads(aux_values_BA, g_BD, d_aux_BA, centered_BD), strict=True
        ):
            grad.index_add_(0, dead_N, dead)
        if needs_x:
            d_x_BD += aux.decode(d_aux_BA, W_enc_FD[dead_N])

    # The pre-bias is shared by all tokens, so its gradient needs the sum over the batch only: one mat-vec.
    d_pre_bias_D = -(d_bias_F @ W_enc_FD) if needs_pre_bias else x_BD.new_empty(0)
    return groups.unsorted(d_x_BD) if needs_x else d_x_BD, dW_enc_FD, dW_dec_FD, d_gates_B, d_pre_bias_D, d_bias_F


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


class _Codes:
    """The products of codes at fixed indices: sparse, or dense within each expert where experts are small."""

    def __init__(self, p: Any, indices_BK: Tensor, n_latents: int, groups: ExpertGroups, dtype: torch.dtype) -> None:
        self.p, self.indices_BK, self.n_latents, self.dense_options = p, indices_BK, n_latents, (groups, dtype)
        M, K = n_latents // (len(groups.offsets_E1) - 1), indices_BK.shape[1]
        self.dense = K * _DENSE_UP_TO.get(indices_BK.device.type, _DENSE_UP_TO_ON_GPU) >= M

    def decode(self, values_BK: Tensor, W_FD: Tensor) -> Tensor:
        if self.dense:
            return self.p.grouped_decode(values_BK, self.indices_BK, W_FD, *self.dense_options)
        return self.p.sparse_decode(values_BK, self.indices_BK, W_FD)

    def at_indices(self, g_BD: Tensor, W_FD: Tensor) -> Tensor:
        if self.dense:
            return self.p.grouped_matmul_at_indices(g_BD, W_FD, self.indices_BK, *self.dense_options)
        return self.p.matmul_at_indices(g_BD, W_FD, self.indices_BK)

    def weight_grads(self, values_BK: Tensor, g_BD: Tensor, d_pre_BK: Tensor, x_BD: Tensor) -> tuple[Tensor, ...]:
        """dW_dec_FD, dW_enc_FD, d_bias_F."""
        if self.dense:
            dW_dec_FD, dW_enc_FD = (
                self.p.grouped_weight_grad(v_BK, self.indices_BK, y_BD, self.n_latents, *self.dense_options)
                for v_BK, y_BD in ((values_BK, g_BD), (d_pre_BK, x_BD))
            )
            zeros_F = d_pre_BK.new_zeros(self.n_latents)
            return dW_dec_FD, dW_enc_FD, zeros_F.index_add_(0, self.indices_BK.flatten(), d_pre_BK.flatten())
        index = latent_index(self.indices_BK, self.n_latents)
        return self.p.latent_weight_grads(index, values_BK, g_BD, d_pre_BK, x_BD)[:3]


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
