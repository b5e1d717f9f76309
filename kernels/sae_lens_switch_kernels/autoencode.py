"""Both halves of an SAE in one operator, for training, so that they share work in the backward pass.

The backward pass groups tokens and sorts active latents once for all five products. It can leave the weight gradients
of the active latents in a ``RowGrads``, and it includes AuxK, the reconstruction from dead latents. Its gradient has
no gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from sae_lens_switch_kernels.autoencode_tensors import BackwardInputs, DecoderInputs, InputGrads, Outputs
from sae_lens_switch_kernels.backend import SelfChecked, primitives
from sae_lens_switch_kernels.dead_latents import DeadLatents, dead_latents, encode_groups
from sae_lens_switch_kernels.indexing import CodeRows, ExpertGroups, by_level, code_rows
from sae_lens_switch_kernels.inputs import EncoderInputs, check_range, flat_schema
from sae_lens_switch_kernels.operators import Gradients, encode_sorted
from sae_lens_switch_kernels.products import CodeProducts, is_dense
from sae_lens_switch_kernels.row_grads import RowGrads, merge_rows, minus_weighted_sum
from sae_lens_switch_kernels.several_experts import are_several, gating, own_gates

_ARGUMENTS = EncoderInputs._fields + DecoderInputs._fields
_SAVED = BackwardInputs._fields[3:19]  # tensors, from x_BD to aux_offsets_Q1


def _split(arguments: tuple[Any, ...]) -> tuple[EncoderInputs, DecoderInputs]:
    n = len(EncoderInputs._fields)
    return EncoderInputs(*arguments[:n]), DecoderInputs(*arguments[n:])


@custom_op(
    "sae_lens_switch::autoencode", mutates_args=(), schema=flat_schema(EncoderInputs, DecoderInputs, n_outputs=13)
)
def autoencode(*arguments: Any) -> tuple[Tensor, ...]:
    """The fields of Outputs; takes those of EncoderInputs and DecoderInputs one by one."""
    return tuple(forward(*_split(arguments)))


def forward(inputs: EncoderInputs, decoder: DecoderInputs) -> Outputs:
    x_BD, (W_dec_FD, dead_N, aux_k, dead_counts, ends_L) = inputs.x_BD, decoder
    p, groups = primitives(x_BD), inputs.groups()
    dense = inputs.expert_B is not None and is_dense(len(W_dec_FD), inputs.k, groups, x_BD.device, inputs.dtype)
    dense = dense and not inputs.over_batch and ends_L is None
    # Candidates are recomputed from x in its own dtype.
    centered_BD = inputs.centered(groups, inputs.dtype if dense and inputs.candidate_dtype is None else None)
    with torch.autocast(x_BD.device.type, enabled=False):
        sorted_values_BK, sorted_indices_BK, doubtful_B, offsets_Q1 = encode_sorted(inputs, centered_BD, groups)
        if ends_L is not None:
            found = _in_levels(inputs, sorted_values_BK, sorted_indices_BK, offsets_Q1, ends_L)
            sorted_values_BK, sorted_indices_BK, offsets_Q1 = found
        rows = _code_rows(offsets_Q1, len(sorted_indices_BK), len(x_BD))
        gates = gating(p, inputs.expert_B, sorted_indices_BK, inputs.gates_B, inputs.blocks, rows)
        codes = CodeProducts(p, sorted_indices_BK, len(W_dec_FD), groups, inputs.dtype, rows=rows)
        out_BD, acts_BK, values_BK, indices_BK = codes.decode_gated(gates, sorted_values_BK, inputs.gates_B, W_dec_FD)
        aux_out_BD, aux_values_BA, aux_slots_BA = (W_dec_FD.new_empty(0) for _ in range(3))
        aux_offsets_Q1 = x_BD.new_empty(0, dtype=torch.long)
        if dead_N is not None:
            if dead_N.dtype != torch.bool:
                check_range("dead_N", dead_N, len(inputs.W_enc_FD))
            dead = dead_latents(dead_N, inputs.blocks, aux_k)
            if dead_counts:
                aux_values_BA, aux_slots_BA, aux_offsets_Q1 = encode_groups(
                    p, inputs, centered_BD, dead_N, aux_k, dead_counts
                )
            else:
                aux_values_BA, aux_slots_BA = dead.encode(p, inputs, centered_BD, groups, aux_k)
            aux_rows = _code_rows(aux_offsets_Q1, len(aux_slots_BA), len(x_BD))
            aux = CodeProducts(p, aux_slots_BA, dead.slots.n_latents, groups, inputs.dtype, rows=aux_rows)
            gates_BA = own_gates(inputs.gates_B, inputs.expert_B, aux_slots_BA, dead.slots, groups)
            aux_out_BD = aux.decode(_gated(aux_values_BA, gates_BA), dead.rows(W_dec_FD))
    none, is_given = x_BD.new_empty, inputs.given_groups is not None
    is_changed = inputs.pre_bias_D is not None or groups.order_B is not None
    return Outputs(
        out_BD,
        values_BK,
        indices_BK,
        aux_out_BD,
        aux_values_BA,
        aux_slots_BA,
        centered_BD if is_changed and not isinstance(p, SelfChecked) else none(0),
        none(0, dtype=torch.long) if groups.order_B is None or is_given else groups.order_B,
        none(0, dtype=torch.long) if is_given else groups.offsets_E1,
        doubtful_B if inputs.candidate_dtype is None else groups.unsorted(doubtful_B),
        offsets_Q1,
        aux_offsets_Q1,
        none(0) if inputs.gates_B is None else acts_BK,
    )


@autoencode.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, decoder = _split(arguments)
    x_BD, W_enc_FD, W_dec_FD = inputs.x_BD, inputs.W_enc_FD, decoder.W_dec_FD
    B, long, has_aux = x_BD.shape[0], torch.long, decoder.dead_N is not None
    is_given = inputs.given_groups is not None
    is_sorted = (inputs.sorted_B if is_given else inputs.expert_B) is not None and not are_several(inputs.expert_B)
    has_centered = (inputs.pre_bias_D is not None or is_sorted) and not isinstance(primitives(x_BD), SelfChecked)
    shape, Q = (inputs.k,) if inputs.over_batch else (B, inputs.k), B
    if decoder.ends_L is not None:
        shape, Q = (inputs.k if inputs.over_batch else B * inputs.k,), B * decoder.ends_L.shape[0]
    aux_shape, n_aux = (B, decoder.aux_k) if has_aux else (0,), len(decoder.dead_counts)
    if n_aux:
        aux_shape = (B * sum(min(decoder.aux_k, n) for n in decoder.dead_counts),)
    return (
        W_dec_FD.new_empty(Q, W_dec_FD.shape[1]),
        W_enc_FD.new_empty(shape),
        x_BD.new_empty(shape, dtype=long),
        W_dec_FD.new_empty((B * max(1, n_aux), W_dec_FD.shape[1]) if has_aux else 0),
        W_enc_FD.new_empty(aux_shape),
        x_BD.new_empty(aux_shape, dtype=long) if has_aux else W_dec_FD.new_empty(0),
        x_BD.new_empty(x_BD.shape if has_centered else 0),
        x_BD.new_empty(B if is_sorted and not is_given else 0, dtype=long),
        x_BD.new_empty(0 if is_given else inputs.n_experts + 1 if is_sorted else 2, dtype=long),
        x_BD.new_empty(0 if inputs.candidate_dtype is None else B, dtype=torch.bool),
        x_BD.new_empty(Q + 1 if len(shape) == 1 else 0, dtype=long),
        x_BD.new_empty(B * n_aux + 1 if n_aux else 0, dtype=long),
        x_BD.new_empty(0) if inputs.gates_B is None else W_enc_FD.new_empty(shape),
    )


@custom_op("sae_lens_switch::autoencode_backward", mutates_args=(), schema=flat_schema(BackwardInputs, n_outputs=6))
def autoencode_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The fields of InputGrads; takes those of BackwardInputs one by one."""
    return tuple(backward(BackwardInputs(*arguments)))


@autoencode_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    b = BackwardInputs(*arguments)
    empty = b.x_BD.new_empty
    return (  # contiguous, whatever the strides of the inputs
        empty(b.x_BD.shape if b.needs_x else 0),
        b.W_enc_FD.new_empty(b.W_enc_FD.shape),
        b.W_dec_FD.new_empty(b.W_dec_FD.shape),
        empty(0) if b.gates_B is None else b.gates_B.new_empty(b.gates_B.shape),
        empty(b.x_BD.shape[1] if b.needs_pre_bias else 0),
        empty(len(b.W_enc_FD)),
    )


def backward(b: BackwardInputs, row_grads: RowGrads | None = None) -> InputGrads:
    """The backward pass of ``autoencode``.

    Args:
        b: Upstream gradients and what the forward pass saved.
        row_grads: If given, stores what its ``active_only`` says; what it stores is empty in the result.

    Returns:
        Gradients of the inputs.

    Raises:
        RuntimeError: If ``row_grads`` still holds another backward pass.
    """
    p, groups = primitives(b.x_BD), b.groups()
    active_only = row_grads is not None and row_grads.active_only
    rows = _code_rows(b.offsets_Q1, len(b.indices_BK), len(b.x_BD))
    gates = gating(p, b.expert_B, b.indices_BK, b.gates_B, b.blocks, rows)
    is_sparse = active_only or rows is not None
    dense = not is_sparse and is_dense(len(b.W_dec_FD), b.indices_BK.shape[1], groups, b.x_BD.device, b.dtype)

    def none() -> Tensor:
        return b.x_BD.new_empty(0)  # one per output: those of an operator may not share memory

    has_radial = row_grads is not None and b.dtype == b.W_dec_FD.dtype and b.dtype.itemsize >= 4
    # On a GPU, a row of the gradient meets its row of W in the optimiser's kernel, where their product is free.
    has_radial = has_radial and not isinstance(p, SelfChecked)
    rows_dtype = b.dtype if dense else b.x_BD.dtype
    n_out = len(b.x_BD) if rows is None else len(rows.offsets_Q1) - 1
    grad_out_BD = b.x_BD.new_zeros(n_out, b.W_dec_FD.shape[1]) if b.grad_out_BD is None else b.grad_out_BD
    if dense and isinstance(p, SelfChecked) and gates is p and not b.needs_x:
        gated = b.values_BK, b.indices_BK, b.gates_B, b.grad_values_BK
        found = p.gated_grads(*gated, grad_out_BD, b.x_BD, b.pre_bias_D, b.W_dec_FD, groups, b.dtype)
        rows_R, grads, (d_gates_B, centered_BD), d_x_BD = None, found[:3], found[3:], none()
    else:
        acts_BK, values_BK, indices_BK = gates.sorted_codes(b.values_BK, b.indices_BK, b.gates_B, groups)
        codes = CodeProducts(p, indices_BK, len(b.W_dec_FD), groups, b.dtype, active_only, rows)
        g_BD, centered_BD = p.sorted_rows(grad_out_BD, None, groups, rows_dtype), b.centered(groups, rows_dtype)
        d_acts_BK = codes.matmul_at_indices(g_BD, b.W_dec_FD)
        d_pre_BK, d_gates_B = gates.code_grads(values_BK, d_acts_BK, b.gates_B, b.grad_values_BK, groups)
        # <dW_dec[f], W_dec[f]> per token: dW_dec[f] is the sum of acts g, and d_acts is <g, W_dec[f]>.
        radial_BK = acts_BK * d_acts_BK if has_radial else None
        rows_R, grads = codes.weight_grads(acts_BK, g_BD, d_pre_BK, centered_BD, radial_BK)
        d_x_BD = codes.decode_tokens(d_pre_BK, b.W_enc_FD) if b.needs_x else none()
    if b.dead_N is not None and b.grad_aux_BD is not None:
        dead = dead_latents(b.dead_N, b.blocks, b.aux_slots_BA.shape[-1])
        aux_rows = _code_rows(b.aux_offsets_Q1, len(b.aux_slots_BA), len(b.x_BD))
        aux = CodeProducts(p, b.aux_slots_BA, dead.slots.n_latents, groups, b.dtype, active_only, aux_rows)
        if not aux.dense and centered_BD.dtype != b.x_BD.dtype:  # it was for dense products in low precision
            centered_BD = b.centered(groups, b.x_BD.dtype)
        dead_R, dead_grads, d_dead_x_BD = _aux_backward(b, b.grad_aux_BD, groups, dead, aux, centered_BD, has_radial)
        rows_R, grads = merge_rows(rows_R, grads, dead_R, dead_grads)
        d_x_BD = d_x_BD + d_dead_x_BD if b.needs_x else d_x_BD

    dW_dec, dW_enc, d_bias, *radial = grads
    d_pre_bias_D = none()
    if b.needs_pre_bias:
        # The pre-bias is shared by all tokens, so its gradient needs the sum over the batch only: one mat-vec.
        d_pre_bias_D = minus_weighted_sum(d_bias, rows_R, b.W_enc_FD)
    if row_grads is not None:
        row_grads.store(rows_R, dW_enc, dW_dec, d_bias, radial[0] if radial else None)
    if active_only:
        dW_enc = dW_dec = d_bias = none()
    return InputGrads(d_x_BD, dW_enc, dW_dec, none() if d_gates_B is None else d_gates_B, d_pre_bias_D, d_bias)


def _aux_backward(
    b: BackwardInputs,
    grad_aux_BD: Tensor,
    groups: ExpertGroups,
    dead: DeadLatents,
    codes: CodeProducts,
    centered_BD: Tensor,
    radial: bool,
) -> tuple[Tensor | None, tuple[Tensor, ...], Tensor]:
    """The dead latents that have gradients, None for all latents, those gradients, and the gradient of x."""
    g_BD = groups.sorted(grad_aux_BD).contiguous()
    d_acts_BA = codes.matmul_at_indices(g_BD, dead.rows(b.W_dec_FD))
    gates_BA = own_gates(b.gates_B, b.expert_B, b.aux_slots_BA, dead.slots, groups)
    d_pre_BA = dead.without_padding(_gated(d_acts_BA, gates_BA), b.aux_slots_BA)
    acts_BA = _gated(b.aux_values_BA, gates_BA)
    radial_BA = acts_BA * d_acts_BA if radial else None
    rows_R, grads = codes.weight_grads(acts_BA, g_BD, d_pre_BA, centered_BD, radial_BA)
    d_x_BD = codes.decode_tokens(d_pre_BA, dead.rows(b.W_enc_FD)) if b.needs_x else g_BD.new_empty(0)
    return dead.latents_of(rows_R), grads, d_x_BD


def _in_levels(
    inputs: EncoderInputs, values_BK: Tensor, indices_BK: Tensor, offsets_B1: Tensor, ends_L: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [S], each token's by level, and where each level's begin."""
    if not inputs.over_batch:
        K = indices_BK.shape[1]
        offsets_B1 = torch.arange(len(indices_BK) + 1, device=indices_BK.device) * K
    # Of one expert, and after the shared ones, latents ascend as their positions do.
    is_ordered = inputs.over_batch and not (are_several(inputs.expert_B) and inputs.expert_B.shape[1] > 1)
    return by_level(values_BK.flatten(), indices_BK.flatten(), offsets_B1, inputs.blocks, ends_L, is_ordered)


def _code_rows(offsets_Q1: Tensor, n_codes: int, n_tokens: int) -> CodeRows | None:
    """Of codes over the batch; None: each token has equally many."""
    if offsets_Q1.numel() == 0:
        return None
    return code_rows(offsets_Q1, n_codes, (len(offsets_Q1) - 1) // max(1, n_tokens) or 1)


def _gated(values_BK: Tensor, gates_BK: Tensor | None) -> Tensor:
    return values_BK if gates_BK is None else values_BK * gates_BK.to(values_BK.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    encoder, decoder = _split(inputs)
    outputs = Outputs(*output)
    ctx.mark_non_differentiable(outputs.indices_BK, *outputs[4:])
    ctx.set_materialize_grads(False)
    saved = encoder._asdict() | decoder._asdict() | outputs._asdict()
    if (given := encoder.given_groups) is not None:
        order_B = outputs.order_B if given.order_B is None else given.order_B
        saved |= {"order_B": order_B, "offsets_E1": given.offsets_E1}
    ctx.save_for_backward(*(saved[name] for name in _SAVED))
    ctx.constants = encoder.n_experts, encoder.n_shared, encoder.dtype


def _backward_inputs(ctx: Any, grads: tuple[Tensor | None, ...], needs: dict[str, bool]) -> BackwardInputs:
    grad_out_BD, grad_values_BK, _, grad_aux_BD, *_ = grads
    saved = *ctx.saved_tensors, *ctx.constants
    needed = {"needs_x": needs["x_BD"], "needs_pre_bias": needs["pre_bias_D"]}
    return BackwardInputs(grad_out_BD, grad_values_BK, grad_aux_BD, *saved, **needed)


def _autoencode_backward(ctx: Any, *grads: Tensor | None) -> Gradients:
    needs = dict(zip(_ARGUMENTS, ctx.needs_input_grad, strict=True))
    found = InputGrads(*autoencode_backward(*_backward_inputs(ctx, grads, needs)))._asdict()
    return tuple(found.get(name) if needed else None for name, needed in needs.items())


autoencode.register_autograd(_autoencode_backward, setup_context=_save)


class AutoencodeRows(torch.autograd.Function):
    """``autoencode`` whose backward pass also fills a RowGrads."""

    @staticmethod
    def forward(_row_grads: RowGrads, *arguments: Any) -> tuple[Tensor, ...]:
        return autoencode(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.row_grads = inputs[0]
        _save(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        needs = dict(zip(_ARGUMENTS, ctx.needs_input_grad[1:], strict=True))
        found = backward(_backward_inputs(ctx, grads, needs), ctx.row_grads)._asdict()
        for name in ("W_enc_FD", "W_dec_FD", "bias_F") if ctx.row_grads.active_only else ():
            needs[name] = False
        return None, *(found.get(name) if needed else None for name, needed in needs.items())
