"""Both halves of an SAE in one operator, for training, so that they share work in the backward pass.

The backward pass groups tokens and sorts active latents once for all five products. It can leave the weight gradients
of the active latents in a ``RowGrads``, and it includes AuxK, the reconstruction from dead latents. Its gradient has
no gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from sae_lens_switch_kernels.backend import primitives
from sae_lens_switch_kernels.dead_latents import DeadLatents, dead_latents
from sae_lens_switch_kernels.indexing import ExpertGroups, RowGrads
from sae_lens_switch_kernels.inputs import EncoderInputs, check_range, flat_schema, token_groups
from sae_lens_switch_kernels.operators import Gradients, encode_sorted
from sae_lens_switch_kernels.products import CodeProducts
from sae_lens_switch_kernels.several_experts import are_several, gate_grads, gates_of_codes


class DecoderInputs(NamedTuple):
    """The arguments of ``autoencode`` that follow the encoder's.

    Attributes:
        W_dec_FD: Decoder weights.
        dead_N: The dead latents, for AuxK.
        aux_k: How many of them are chosen per token.
    """

    W_dec_FD: Tensor
    dead_N: Tensor | None
    aux_k: int


class Outputs(NamedTuple):
    """What ``autoencode`` computes; empty tensors where there is no AuxK.

    Attributes:
        out_BD: Reconstruction.
        values_BK: Values of the active latents, after ReLU and before the gate.
        indices_BK: The active latents.
        aux_out_BD: Reconstruction from dead latents alone.
        aux_values_BA: Pre-activations of the chosen dead latents, rows sorted by expert.
        aux_slots_BA: Their slots in ``DeadLatents``, rows sorted by expert.
        centered_BD: The encoder's input, rows sorted by expert; empty if it is x itself, which an operator may not
            return.
        doubtful_B: Whether low precision may have missed a latent of the token; empty without candidates.
    """

    out_BD: Tensor
    values_BK: Tensor
    indices_BK: Tensor
    aux_out_BD: Tensor
    aux_values_BA: Tensor
    aux_slots_BA: Tensor
    centered_BD: Tensor
    doubtful_B: Tensor


class BackwardInputs(NamedTuple):
    """Arguments of ``autoencode_backward``: upstream gradients, then what forward saved, then what is needed."""

    grad_out_BD: Tensor | None
    grad_values_BK: Tensor | None
    grad_aux_BD: Tensor | None
    x_BD: Tensor
    centered_BD: Tensor
    W_enc_FD: Tensor
    W_dec_FD: Tensor
    gates_B: Tensor | None
    expert_B: Tensor | None
    dead_N: Tensor | None
    values_BK: Tensor
    indices_BK: Tensor
    aux_values_BA: Tensor
    aux_slots_BA: Tensor
    n_experts: int
    dtype: torch.dtype
    needs_x: bool
    needs_pre_bias: bool


class InputGrads(NamedTuple):
    """Gradients, under the names of the arguments of ``autoencode``; empty where not needed."""

    x_BD: Tensor
    W_enc_FD: Tensor
    W_dec_FD: Tensor
    gates_B: Tensor
    pre_bias_D: Tensor
    bias_F: Tensor


_ARGUMENTS = EncoderInputs._fields + DecoderInputs._fields
_SAVED = BackwardInputs._fields[3:14]  # tensors, from x_BD to aux_slots_BA


def _split(arguments: tuple[Any, ...]) -> tuple[EncoderInputs, DecoderInputs]:
    n = len(EncoderInputs._fields)
    return EncoderInputs(*arguments[:n]), DecoderInputs(*arguments[n:])


@custom_op(
    "sae_lens_switch::autoencode", mutates_args=(), schema=flat_schema(EncoderInputs, DecoderInputs, n_outputs=8)
)
def autoencode(*arguments: Any) -> tuple[Tensor, ...]:
    """The fields of Outputs; takes those of EncoderInputs and DecoderInputs one by one."""
    return tuple(forward(*_split(arguments)))


def forward(inputs: EncoderInputs, decoder: DecoderInputs) -> Outputs:
    x_BD, E, (W_dec_FD, dead_N, aux_k) = inputs.x_BD, inputs.n_experts, decoder
    p, groups = primitives(x_BD), inputs.groups()
    centered_BD = inputs.centered(groups)
    with torch.autocast(x_BD.device.type, enabled=False):
        values_BK, indices_BK, doubtful_B = encode_sorted(inputs, centered_BD, groups)
        codes = CodeProducts(p, indices_BK, len(W_dec_FD), groups, inputs.dtype)
        gates_BK = gates_of_codes(inputs.gates_B, inputs.expert_B, indices_BK, len(W_dec_FD) // E, groups)
        out_BD = codes.decode(_gated(values_BK, gates_BK), W_dec_FD)
        aux_out_BD, aux_values_BA, aux_slots_BA = (W_dec_FD.new_empty(0) for _ in range(3))
        if dead_N is not None:
            check_range("dead_N", dead_N, len(inputs.W_enc_FD))
            dead = dead_latents(dead_N, E, len(inputs.W_enc_FD), aux_k)
            aux_values_BA, aux_slots_BA = dead.encode(p, inputs, centered_BD, groups, aux_k)
            aux = CodeProducts(p, aux_slots_BA, len(dead.latents_Z), groups, inputs.dtype)
            gates_BA = gates_of_codes(inputs.gates_B, inputs.expert_B, aux_slots_BA, dead.n_slots, groups)
            aux_out_BD = groups.unsorted(aux.decode(_gated(aux_values_BA, gates_BA), W_dec_FD[dead.latents_Z]))
    return Outputs(
        groups.unsorted(out_BD),
        groups.unsorted(values_BK),
        groups.unsorted(indices_BK),
        aux_out_BD,
        aux_values_BA,
        aux_slots_BA,
        x_BD.new_empty(0) if centered_BD is x_BD else centered_BD,
        groups.unsorted(doubtful_B) if inputs.candidate_dtype is not None else doubtful_B,
    )


@autoencode.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, decoder = _split(arguments)
    x_BD, W_enc_FD, W_dec_FD = inputs.x_BD, inputs.W_enc_FD, decoder.W_dec_FD
    B, long, has_aux = x_BD.shape[0], torch.long, decoder.dead_N is not None
    is_sorted = inputs.expert_B is not None and not are_several(inputs.expert_B)
    has_centered = inputs.pre_bias_D is not None or is_sorted
    return (
        W_dec_FD.new_empty(x_BD.shape),
        W_enc_FD.new_empty(B, inputs.k),
        x_BD.new_empty(B, inputs.k, dtype=long),
        W_dec_FD.new_empty(x_BD.shape if has_aux else 0),
        W_enc_FD.new_empty((B, decoder.aux_k) if has_aux else 0),
        x_BD.new_empty(B, decoder.aux_k, dtype=long) if has_aux else W_dec_FD.new_empty(0),
        x_BD.new_empty(x_BD.shape if has_centered else 0),
        x_BD.new_empty(0 if inputs.candidate_dtype is None else B, dtype=torch.bool),
    )


@custom_op("sae_lens_switch::autoencode_backward", mutates_args=(), schema=flat_schema(BackwardInputs, n_outputs=6))
def autoencode_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The fields of InputGrads; takes those of BackwardInputs one by one."""
    return tuple(backward(BackwardInputs(*arguments)))


@autoencode_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    b = BackwardInputs(*arguments)
    empty = b.x_BD.new_empty
    return (
        empty(b.x_BD.shape if b.needs_x else 0),
        torch.empty_like(b.W_enc_FD),
        torch.empty_like(b.W_dec_FD),
        empty(0) if b.gates_B is None else torch.empty_like(b.gates_B),
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
    p, groups = primitives(b.x_BD), token_groups(b.x_BD, b.expert_B, b.n_experts)
    centered_BD = b.centered_BD if b.centered_BD.numel() else b.x_BD
    active_only = row_grads is not None and row_grads.active_only
    has_radial = row_grads is not None and b.dtype == b.W_dec_FD.dtype and b.dtype.itemsize >= 4

    def none() -> Tensor:
        return b.x_BD.new_empty(0)  # one per output: those of an operator may not share memory

    def products_at(indices: Tensor, n_latents: int) -> CodeProducts:
        return CodeProducts(p, indices, n_latents, groups, b.dtype, active_only)

    values_BK, indices_BK = groups.sorted(b.values_BK), groups.sorted(b.indices_BK)
    width = len(b.W_dec_FD) // b.n_experts
    gates_BK = gates_of_codes(b.gates_B, b.expert_B, indices_BK, width, groups)
    acts_BK = _gated(values_BK, gates_BK)
    g_BD = b.x_BD.new_zeros(b.x_BD.shape) if b.grad_out_BD is None else groups.sorted(b.grad_out_BD).contiguous()
    codes = products_at(indices_BK, len(b.W_dec_FD))
    d_acts_BK = d_values_BK = codes.matmul_at_indices(g_BD, b.W_dec_FD)
    d_gates_B = none()
    if b.gates_B is not None:
        d_gates_B = _gate_grads(b, d_acts_BK * values_BK, width, groups)
        d_values_BK = _gated(d_acts_BK, gates_BK)
    if b.grad_values_BK is not None:
        d_values_BK = d_values_BK + groups.sorted(b.grad_values_BK)
    # ReLU comes before top-k: a token with fewer than k positive latents carries zeros, and no gradient.
    d_pre_BK = d_values_BK * (values_BK > 0)
    # <dW_dec[f], W_dec[f]> per token: dW_dec[f] is the sum of acts g, and d_acts is <g, W_dec[f]>.
    radial_BK = acts_BK * d_acts_BK if has_radial else None
    rows_R, grads = codes.weight_grads(acts_BK, g_BD, d_pre_BK, centered_BD, radial_BK)
    d_x_BD = codes.decode(d_pre_BK, b.W_enc_FD) if b.needs_x else none()
    if b.dead_N is not None and b.grad_aux_BD is not None:
        dead = dead_latents(b.dead_N, b.n_experts, len(b.W_enc_FD), b.aux_slots_BA.shape[1])
        aux, g_aux_BD = products_at(b.aux_slots_BA, len(dead.latents_Z)), groups.sorted(b.grad_aux_BD).contiguous()
        gates_BA = gates_of_codes(b.gates_B, b.expert_B, b.aux_slots_BA, dead.n_slots, groups)
        dead_R, dead_grads, d_dead_x_BD = _aux_backward(b, g_aux_BD, gates_BA, dead, aux, centered_BD, has_radial)
        rows_R, grads = _merge_rows(rows_R, grads, dead_R, dead_grads)
        d_x_BD = d_x_BD + d_dead_x_BD if b.needs_x else d_x_BD

    dW_dec, dW_enc, d_bias, *radial = grads
    d_pre_bias_D = none()
    if b.needs_pre_bias:
        # The pre-bias is shared by all tokens, so its gradient needs the sum over the batch only: one mat-vec.
        d_pre_bias_D = -(d_bias @ b.W_enc_FD if rows_R is None else _weighted_sum(d_bias, rows_R, b.W_enc_FD))
    d_x_BD = groups.unsorted(d_x_BD) if b.needs_x else d_x_BD
    if row_grads is not None:
        row_grads.store(rows_R, dW_enc, dW_dec, d_bias, radial[0] if radial else None)
    if active_only:
        dW_enc = dW_dec = d_bias = none()
    return InputGrads(d_x_BD, dW_enc, dW_dec, d_gates_B, d_pre_bias_D, d_bias)


def _gate_grads(b: BackwardInputs, d_gates_BK: Tensor, width: int, groups: ExpertGroups) -> Tensor:
    assert b.gates_B is not None
    if b.expert_B is not None and are_several(b.expert_B):
        expert_BK = torch.div(b.indices_BK, width, rounding_mode="floor")
        return gate_grads(d_gates_BK, b.expert_B, expert_BK).to(b.gates_B.dtype)
    return groups.unsorted(d_gates_BK.sum(1).to(b.gates_B.dtype))


def _aux_backward(
    b: BackwardInputs,
    g_BD: Tensor,
    gates_BA: Tensor | None,
    dead: DeadLatents,
    codes: CodeProducts,
    centered_BD: Tensor,
    radial: bool,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """The dead latents that have gradients, those gradients, and the gradient of x."""
    d_acts_BA = codes.matmul_at_indices(g_BD, b.W_dec_FD[dead.latents_Z])
    d_pre_BA = dead.without_padding(_gated(d_acts_BA, gates_BA), b.aux_slots_BA)
    acts_BA = _gated(b.aux_values_BA, gates_BA)
    radial_BA = acts_BA * d_acts_BA if radial else None
    rows_R, grads = codes.weight_grads(acts_BA, g_BD, d_pre_BA, centered_BD, radial_BA)
    d_x_BD = codes.decode(d_pre_BA, b.W_enc_FD[dead.latents_Z]) if b.needs_x else g_BD.new_empty(0)
    return dead.latents_Z if rows_R is None else dead.latents_Z[rows_R], grads, d_x_BD


def _gated(values_BK: Tensor, gates_BK: Tensor | None) -> Tensor:
    return values_BK if gates_BK is None else values_BK * gates_BK.to(values_BK.dtype)


def _merge_rows(
    rows_R: Tensor | None, grads: tuple[Tensor, ...], more_R: Tensor, more: tuple[Tensor, ...]
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The sum of two sets of rows; rows_R None: all rows."""
    if rows_R is None:
        return None, tuple(g.index_add_(0, more_R, m) for g, m in zip(grads, more, strict=True))
    both_R, where = torch.cat([rows_R, more_R]).unique(return_inverse=True)
    # rows_R are distinct and most of the result, so they are copied; the others may repeat.
    merged = []
    for g, m in zip(grads, more, strict=True):
        sums = g.new_zeros(len(both_R), *g.shape[1:])
        sums[where[: len(rows_R)]] = g
        merged.append(sums.index_add_(0, where[len(rows_R) :], m))
    return both_R, tuple(merged)


def _weighted_sum(weights_R: Tensor, rows_R: Tensor, W_FD: Tensor) -> Tensor:
    """sum_r weights[r] W[rows[r]], [D], without a copy of the rows; in parts, which run in parallel."""
    parts = max(1, len(rows_R) // 256)
    pad = -len(rows_R) % parts
    rows = torch.nn.functional.pad(rows_R, (0, pad)).view(parts, -1)
    weights = torch.nn.functional.pad(weights_R, (0, pad)).view(parts, -1)
    return primitives(W_FD).sparse_decode(weights, rows, W_FD).sum(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    encoder, decoder = _split(inputs)
    outputs = Outputs(*output)
    ctx.mark_non_differentiable(
        outputs.indices_BK, outputs.aux_values_BA, outputs.aux_slots_BA, outputs.centered_BD, outputs.doubtful_B
    )
    ctx.set_materialize_grads(False)
    saved = encoder._asdict() | decoder._asdict() | outputs._asdict()
    ctx.save_for_backward(*(saved[name] for name in _SAVED))
    ctx.constants = encoder.n_experts, encoder.dtype


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
