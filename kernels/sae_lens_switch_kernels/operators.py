"""The three linear operators and the encoder as torch knows them: forward, fake and backward beside each.

sparse_decode, matmul_at_indices and latent_weight_grad are each other's derivatives, so they can be differentiated
any number of times; ``encode`` is differentiated through them. All are written once, above every backend.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from sae_lens_switch_kernels.backend import primitives
from sae_lens_switch_kernels.candidates import Selected, select, select_from_candidates, selected_of
from sae_lens_switch_kernels.indexing import ExpertGroups, code_rows, n_rows
from sae_lens_switch_kernels.inputs import EncoderInputs, check_offsets, check_range, flat_schema
from sae_lens_switch_kernels.several_experts import times_gates

Gradients = tuple[Tensor | None, ...]


def _save_tensors(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3], inputs[-1])


@custom_op("sae_lens_switch::sparse_decode", mutates_args=())
def sparse_decode(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor, offsets_B1: Tensor | None) -> Tensor:
    check_range("indices_BK", indices_BK, len(W_FD))
    check_offsets(offsets_B1, len(indices_BK))
    return primitives(W_FD).sparse_decode(values_BK, indices_BK, W_FD, offsets_B1)


@sparse_decode.register_fake
def _(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor, offsets_B1: Tensor | None) -> Tensor:
    return W_FD.new_empty(n_rows(indices_BK, offsets_B1), W_FD.shape[1])


def _sparse_decode_backward(ctx: Any, grad_BD: Tensor) -> Gradients:
    values_BK, indices_BK, W_FD, offsets_B1 = ctx.saved_tensors
    needs_values, _, needs_W, _ = ctx.needs_input_grad
    return (
        matmul_at_indices(grad_BD, W_FD, indices_BK, offsets_B1) if needs_values else None,
        None,
        latent_weight_grad(values_BK, indices_BK, grad_BD, len(W_FD), offsets_B1) if needs_W else None,
        None,
    )


sparse_decode.register_autograd(_sparse_decode_backward, setup_context=_save_tensors)


@custom_op("sae_lens_switch::matmul_at_indices", mutates_args=())
def matmul_at_indices(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, offsets_B1: Tensor | None) -> Tensor:
    check_range("indices_BK", indices_BK, len(W_FD))
    check_offsets(offsets_B1, len(indices_BK))
    return primitives(W_FD).matmul_at_indices(g_BD, W_FD, indices_BK, offsets_B1)


@matmul_at_indices.register_fake
def _(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, offsets_B1: Tensor | None) -> Tensor:
    return g_BD.new_empty(indices_BK.shape)


def _matmul_at_indices_backward(ctx: Any, grad_BK: Tensor) -> Gradients:
    g_BD, W_FD, indices_BK, offsets_B1 = ctx.saved_tensors
    needs_g, needs_W, *_ = ctx.needs_input_grad
    return (
        sparse_decode(grad_BK, indices_BK, W_FD, offsets_B1) if needs_g else None,
        latent_weight_grad(grad_BK, indices_BK, g_BD, len(W_FD), offsets_B1) if needs_W else None,
        None,
        None,
    )


matmul_at_indices.register_autograd(_matmul_at_indices_backward, setup_context=_save_tensors)


@custom_op("sae_lens_switch::latent_weight_grad", mutates_args=())
def latent_weight_grad(
    values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_latents: int, offsets_B1: Tensor | None
) -> Tensor:
    check_range("indices_BK", indices_BK, n_latents)
    check_offsets(offsets_B1, len(indices_BK))
    p = primitives(g_BD)
    rows = None if offsets_B1 is None else code_rows(offsets_B1, len(indices_BK))
    return p.latent_weight_grads(p.latent_index(indices_BK, n_latents), values_BK, g_BD, rows=rows).dW_dec_FD


@latent_weight_grad.register_fake
def _(values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_latents: int, offsets_B1: Tensor | None) -> Tensor:
    return g_BD.new_empty(n_latents, g_BD.shape[1])


def _latent_weight_grad_backward(ctx: Any, grad_FD: Tensor) -> Gradients:
    values_BK, indices_BK, g_BD, offsets_B1 = ctx.saved_tensors
    needs_values, _, needs_g, *_ = ctx.needs_input_grad
    return (
        matmul_at_indices(g_BD, grad_FD, indices_BK, offsets_B1) if needs_values else None,
        None,
        sparse_decode(values_BK, indices_BK, grad_FD, offsets_B1) if needs_g else None,
        None,
        None,
    )


latent_weight_grad.register_autograd(_latent_weight_grad_backward, setup_context=_save_tensors)


@custom_op("sae_lens_switch::encode", mutates_args=(), schema=flat_schema(EncoderInputs, n_outputs=3))
def encode(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """values, indices, and offsets, empty unless over the batch; takes the fields of EncoderInputs one by one."""
    inputs = EncoderInputs(*arguments)
    groups = inputs.groups()
    selected = encode_sorted(inputs, inputs.centered(groups), groups)
    return groups.unsorted(selected.values_BK), groups.unsorted(selected.indices_BK), selected.offsets_B1


def encode_sorted(inputs: EncoderInputs, centered_BD: Tensor, groups: ExpertGroups) -> Selected:
    """relu of the k largest pre-activations per token, in the order of ``groups``."""
    pairs = None if inputs.over_batch else inputs.pairs()
    if pairs is None:  # one expert per token, or the whole batch at once
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
    return selected_of(values_BN.gather(1, place_BK), indices_BN.gather(1, place_BK), doubtful_B)


def _either(a_B: Tensor, b_B: Tensor) -> Tensor:
    """Where either is true; an empty one is true nowhere."""
    return a_B | b_B if len(a_B) == len(b_B) else a_B if len(a_B) else b_B


def _encode_rows(inputs: EncoderInputs, centered_BD: Tensor, groups: ExpertGroups) -> Selected:
    """relu of the k largest pre-activations per row of one expert each, rows sorted by expert; or of the batch."""
    p = primitives(centered_BD)
    with torch.autocast(centered_BD.device.type, enabled=False):
        if inputs.candidate_dtype is None:
            return select(p, inputs, centered_BD, groups, inputs.k, inputs.dtype, relu=not inputs.by_magnitude)
        selected = select_from_candidates(p, inputs, centered_BD, groups)
    if not inputs.by_magnitude:
        selected.values_BK.relu_()
    return selected


@encode.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = EncoderInputs(*arguments)
    B, long = inputs.x_BD.shape[0], torch.long
    shape = (inputs.k,) if inputs.over_batch else (B, inputs.k)
    offsets_B1 = inputs.x_BD.new_empty(B + 1 if inputs.over_batch else 0, dtype=long)
    return inputs.W_enc_FD.new_empty(shape), inputs.x_BD.new_empty(shape, dtype=long), offsets_B1


def _encode_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_BD, W_FD, pre_bias_D, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x_BD, W_FD, pre_bias_D, *output)


def _encode_backward(ctx: Any, grad_BK: Tensor, *grads_of_indices: None) -> Gradients:
    x_BD, W_FD, pre_bias_D, values_BK, indices_BK, offsets_B1 = ctx.saved_tensors
    offsets_B1 = offsets_B1 if offsets_B1.numel() else None
    needs_x, needs_W, needs_pre_bias, needs_bias = ctx.needs_input_grad[:4]
    # ReLU comes before top-k: a token with fewer than k positive latents carries zeros, and no gradient.
    d_pre_BK = grad_BK * (values_BK != 0)
    d_bias_F = None
    if needs_pre_bias or needs_bias:
        ones_B1 = d_pre_BK.new_ones(len(x_BD), 1)  # in the order of the tokens, which index_add_ has on a CPU alone
        d_bias_F = latent_weight_grad(d_pre_BK, indices_BK, ones_B1, len(W_FD), offsets_B1).squeeze(1)
    return (
        sparse_decode(d_pre_BK, indices_BK, W_FD, offsets_B1) if needs_x else None,
        latent_weight_grad(
            d_pre_BK, indices_BK, x_BD if pre_bias_D is None else x_BD - pre_bias_D, len(W_FD), offsets_B1
        )
        if needs_W
        else None,
        # The pre-bias is shared by all tokens, so its gradient needs the sum over the batch only: one mat-vec.
        None if d_bias_F is None or not needs_pre_bias else -(d_bias_F @ W_FD),
        d_bias_F if needs_bias else None,
        *[None] * (len(EncoderInputs._fields) - 4),
    )


encode.register_autograd(_encode_backward, setup_context=_encode_setup)
