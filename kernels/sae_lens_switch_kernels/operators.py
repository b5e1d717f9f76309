"""The three linear operators and the encoder as torch knows them: forward, fake and backward beside each.

sparse_decode, matmul_at_indices and latent_weight_grad are each other's derivatives, so they can be differentiated
any number of times; ``encode`` is differentiated through them. All are written once, above every backend.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from sae_lens_switch_kernels.backend import primitives
from sae_lens_switch_kernels.candidates import Selected, select_from_candidates
from sae_lens_switch_kernels.indexing import ExpertGroups
from sae_lens_switch_kernels.inputs import EncoderInputs, check_range, flat_schema
from sae_lens_switch_kernels.several_experts import times_gates

Gradients = tuple[Tensor | None, ...]


def _save_tensors(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


@custom_op("sae_lens_switch::sparse_decode", mutates_args=())
def sparse_decode(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor) -> Tensor:
    check_range("indices_BK", indices_BK, len(W_FD))
    return primitives(W_FD).sparse_decode(values_BK, indices_BK, W_FD)


@sparse_decode.register_fake
def _(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor) -> Tensor:
    return W_FD.new_empty(values_BK.shape[0], W_FD.shape[1])


def _sparse_decode_backward(ctx: Any, grad_BD: Tensor) -> Gradients:
    values_BK, indices_BK, W_FD = ctx.saved_tensors
    needs_values, _, needs_W = ctx.needs_input_grad
    return (
        matmul_at_indices(grad_BD, W_FD, indices_BK) if needs_values else None,
        None,
        latent_weight_grad(values_BK, indices_BK, grad_BD, len(W_FD)) if needs_W else None,
    )


sparse_decode.register_autograd(_sparse_decode_backward, setup_context=_save_tensors)


@custom_op("sae_lens_switch::matmul_at_indices", mutates_args=())
def matmul_at_indices(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    check_range("indices_BK", indices_BK, len(W_FD))
    return primitives(W_FD).matmul_at_indices(g_BD, W_FD, indices_BK)


@matmul_at_indices.register_fake
def _(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    return g_BD.new_empty(indices_BK.shape)


def _matmul_at_indices_backward(ctx: Any, grad_BK: Tensor) -> Gradients:
    g_BD, W_FD, indices_BK = ctx.saved_tensors
    needs_g, needs_W, _ = ctx.needs_input_grad
    return (
        sparse_decode(grad_BK, indices_BK, W_FD) if needs_g else None,
        latent_weight_grad(grad_BK, indices_BK, g_BD, len(W_FD)) if needs_W else None,
        None,
    )


matmul_at_indices.register_autograd(_matmul_at_indices_backward, setup_context=_save_tensors)


@custom_op("sae_lens_switch::latent_weight_grad", mutates_args=())
def latent_weight_grad(values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_latents: int) -> Tensor:
    check_range("indices_BK", indices_BK, n_latents)
    p = primitives(g_BD)
    return p.latent_weight_grads(p.latent_index(indices_BK, n_latents), values_BK, g_BD).dW_dec_FD


@latent_weight_grad.register_fake
def _(values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_latents: int) -> Tensor:
    return g_BD.new_empty(n_latents, g_BD.shape[1])


def _latent_weight_grad_backward(ctx: Any, grad_FD: Tensor) -> Gradients:
    values_BK, indices_BK, g_BD = ctx.saved_tensors
    needs_values, _, needs_g, _ = ctx.needs_input_grad
    return (
        matmul_at_indices(g_BD, grad_FD, indices_BK) if needs_values else None,
        None,
        sparse_decode(values_BK, indices_BK, grad_FD) if needs_g else None,
        None,
    )


latent_weight_grad.register_autograd(_latent_weight_grad_backward, setup_context=_save_tensors)


@custom_op("sae_lens_switch::encode", mutates_args=(), schema=flat_schema(EncoderInputs, n_outputs=2))
def encode(*arguments: Any) -> tuple[Tensor, Tensor]:
    """values and indices, [B, K]; takes the fields of EncoderInputs one by one."""
    inputs = EncoderInputs(*arguments)
    groups = inputs.groups()
    values_BK, indices_BK, _ = encode_sorted(inputs, inputs.centered(groups), groups)
    return groups.unsorted(values_BK), groups.unsorted(indices_BK)


def encode_sorted(inputs: EncoderInputs, centered_BD: Tensor, groups: ExpertGroups) -> Selected:
    """relu of the k largest pre-activations per token, in the order of ``groups``."""
    pairs = inputs.pairs()
    if pairs is None:
        return _encode_rows(inputs, centered_BD, groups)
    found = _encode_rows(inputs.of_experts(), pairs.rows(centered_BD), pairs.groups)
    values_BN, indices_BN = pairs.by_token(found.values_BK), pairs.by_token(found.indices_BK)
    ranked_BN, doubtful_B = times_gates(values_BN, inputs.gates_B), pairs.any_of_token(found.doubtful_B)
    if inputs.n_shared:
        shared = _encode_rows(inputs.of_shared(), centered_BD, groups)
        values_BN, ranked_BN = (torch.cat([shared.values_BK, t_BN], dim=1) for t_BN in (values_BN, ranked_BN))
        indices_BN = torch.cat([shared.indices_BK, indices_BN + inputs.n_shared], dim=1)
        doubtful_B = _either(doubtful_B, shared.doubtful_B)
    place_BK = ranked_BN.topk(inputs.k, dim=1, sorted=False).indices
    return Selected(values_BN.gather(1, place_BK), indices_BN.gather(1, place_BK), doubtful_B)


def _either(a_B: Tensor, b_B: Tensor) -> Tensor:
    """Where either is true; an empty one is true nowhere."""
    return a_B | b_B if len(a_B) == len(b_B) else a_B if len(a_B) else b_B


def _encode_rows(inputs: EncoderInputs, centered_BD: Tensor, groups: ExpertGroups) -> Selected:
    """relu of the k largest pre-activations per row of one expert each, rows sorted by expert."""
    p = primitives(centered_BD)
    with torch.autocast(centered_BD.device.type, enabled=False):
        if inputs.candidate_dtype is None:
            values_BK, indices_BK = p.topk_encode(
                centered_BD, inputs.W_enc_FD, inputs.k, groups, inputs.bias_F, inputs.scale_F, inputs.dtype, True
            )
            return Selected(values_BK, indices_BK, centered_BD.new_empty(0, dtype=torch.bool))
        selected = select_from_candidates(p, inputs, centered_BD, groups)
    selected.values_BK.relu_()
    return selected


@encode.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = EncoderInputs(*arguments)
    shape = inputs.x_BD.shape[0], inputs.k
    return inputs.W_enc_FD.new_empty(shape), inputs.x_BD.new_empty(shape, dtype=torch.long)


def _encode_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_BD, W_FD, pre_bias_D, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_BD, W_FD, pre_bias_D, *output)


def _encode_backward(ctx: Any, grad_BK: Tensor, grad_indices: None) -> Gradients:
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
        *[None] * (len(EncoderInputs._fields) - 4),
    )


encode.register_autograd(_encode_backward, setup_context=_encode_setup)
