"""Both halves of an SAE in one operator, for training, so that they share work in the backward pass.

The backward pass groups tokens and sorts active latents once for all five products. It can leave the weight gradients
of the active latents in a ``RowGrads``, and it includes AuxK, the reconstruction from dead latents. Its gradient has
no gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from sae_lens_switch_kernels.backend import SelfChecked, primitives
from sae_lens_switch_kernels.dead_latents import DeadLatents, dead_latents
from sae_lens_switch_kernels.indexing import ExpertGroups, RowGrads
from sae_lens_switch_kernels.inputs import EncoderInputs, check_range, flat_schema
from sae_lens_switch_kernels.operators import Gradients, encode_sorted
from sae_lens_switch_kernels.products import CodeProducts, is_dense
from sae_lens_switch_kernels.torch_codes import gated


class DecoderInputs(NamedTuple):
    """The arguments of ``autoencode`` that follow the encoder's.

    Attributes:
        W_dec_FD: Decoder weights.
        gates_B: Multiplies each token's values before decoding.
        dead_N: The dead latents, for AuxK.
        aux_k: How many of them are chosen per token.
    """

    W_dec_FD: Tensor
    gates_B: Tensor | None
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
            return, and on a GPU, which makes it anew in less time than it takes to save it.
        order_B: Of the ``ExpertGroups``; empty if there is one group.
        offsets_E1: Likewise.
    """

    out_BD: Tensor
    values_BK: Tensor
    indices_BK: Tensor
    aux_out_BD: Tensor
    aux_values_BA: Tensor
    aux_slots_BA: Tensor
    centered_BD: Tensor
    order_B: Tensor
    offsets_E1: Tensor


class BackwardInputs(NamedTuple):
    """Arguments of ``autoencode_backward``: upstream gradients, then what forward saved, then what is needed."""

    grad_out_BD: Tensor | None
    grad_values_BK: Tensor | None
    grad_aux_BD: Tensor | None
    x_BD: Tensor
    centered_BD: Tensor
    W_enc_FD: Tensor
    W_dec_FD: Tensor
    pre_bias_D: Tensor | None
    gates_B: Tensor | None
    dead_N: Tensor | None
    order_B: Tensor
    offsets_E1: Tensor
    values_BK: Tensor
    indices_BK: Tensor
    aux_values_BA: Tensor
    aux_slots_BA: Tensor
    dtype: torch.dtype
    needs_x: bool
    needs_pre_bias: bool

    def groups(self) -> ExpertGroups:
        return ExpertGroups(self.order_B if self.order_B.numel() else None, self.offsets_E1)

    def centered(self, groups: ExpertGroups, dtype: torch.dtype) -> Tensor:
        if self.centered_BD.numel():
            return self.centered_BD
        return primitives(self.x_BD).sorted_rows(self.x_BD, self.pre_bias_D, groups, dtype)


class InputGrads(NamedTuple):
    """Gradients, under the names of the arguments of ``autoencode``; empty where not needed."""

    x_BD: Tensor
    W_enc_FD: Tensor
    W_dec_FD: Tensor
    gates_B: Tensor
    pre_bias_D: Tensor
    bias_F: Tensor


_ARGUMENTS = EncoderInputs._fields + DecoderInputs._fields
_SAVED = BackwardInputs._fields[3:16]  # tensors, from x_BD to aux_slots_BA


def _split(arguments: tuple[Any, ...]) -> tuple[EncoderInputs, DecoderInputs]:
    n = len(EncoderInputs._fields)
    return EncoderInputs(*arguments[:n]), DecoderInputs(*arguments[n:])


@custom_op(
    "sae_lens_switch::autoencode", mutates_args=(), schema=flat_schema(EncoderInputs, DecoderInputs, n_outputs=9)
)
def autoencode(*arguments: Any) -> tuple[Tensor, ...]:
    """The fields of Outputs; takes those of EncoderInputs and DecoderInputs one by one."""
    return tuple(forward(*_split(arguments)))


def forward(inputs: EncoderInputs, decoder: DecoderInputs) -> Outputs:
    x_BD, (W_dec_FD, gates_B, dead_N, aux_k) = inputs.x_BD, decoder
    p, groups = primitives(x_BD), inputs.groups()
    dense = inputs.expert_B is not None and is_dense(len(W_dec_FD), inputs.k, groups, x_BD.device)
    centered_BD = inputs.centered(groups, inputs.dtype if dense else None)
    with torch.autocast(x_BD.device.type, enabled=False):
        sorted_values_BK, sorted_indices_BK = encode_sorted(inputs, centered_BD, groups)
        acts_BK, values_BK, indices_BK = p.unsorted_codes(sorted_values_BK, sorted_indices_BK, gates_B, groups)
        codes = CodeProducts(p, sorted_indices_BK, len(W_dec_FD), groups, inputs.dtype)
        out_BD = codes.decode(acts_BK, W_dec_FD)
        aux_out_BD, aux_values_BA, aux_slots_BA = (W_dec_FD.new_empty(0) for _ in range(3))
        if dead_N is not None:
            check_range("dead_N", dead_N, len(inputs.W_enc_FD))
            dead = dead_latents(dead_N, groups, len(inputs.W_enc_FD), aux_k)
            aux_values_BA, aux_slots_BA = dead.encode(p, inputs, centered_BD, aux_k)
            aux = CodeProducts(p, aux_slots_BA, len(dead.latents_Z), groups, inputs.dtype)
            aux_out_BD = aux.decode(gated(aux_values_BA, gates_B, groups), W_dec_FD[dead.latents_Z])
    none = x_BD.new_empty
    return Outputs(
        out_BD,
        values_BK,
        indices_BK,
        aux_out_BD,
        aux_values_BA,
        aux_slots_BA,
        none(0) if centered_BD is x_BD or isinstance(p, SelfChecked) else centered_BD,
        none(0, dtype=torch.long) if groups.order_B is None else groups.order_B,
        groups.offsets_E1,
    )


@autoencode.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, decoder = _split(arguments)
    x_BD, W_enc_FD, W_dec_FD = inputs.x_BD, inputs.W_enc_FD, decoder.W_dec_FD
    B, long, has_aux = x_BD.shape[0], torch.long, decoder.dead_N is not None
    has_centered = inputs.pre_bias_D is not None or inputs.expert_B is not None
    has_centered = has_centered and not isinstance(primitives(x_BD), SelfChecked)
    return (
        W_dec_FD.new_empty(x_BD.shape),
        W_enc_FD.new_empty(B, inputs.k),
        x_BD.new_empty(B, inputs.k, dtype=long),
        W_dec_FD.new_empty(x_BD.shape if has_aux else 0),
        W_enc_FD.new_empty((B, decoder.aux_k) if has_aux else 0),
        x_BD.new_empty(B, decoder.aux_k, dtype=long) if has_aux else W_dec_FD.new_empty(0),
        x_BD.new_empty(x_BD.shape if has_centered else 0),
        x_BD.new_empty(0 if inputs.expert_B is None else B, dtype=long),
        x_BD.new_empty(inputs.n_experts + 1, dtype=long),
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
    p, groups = primitives(b.x_BD), b.groups()
    active_only = row_grads is not None and row_grads.active_only
    has_radial = row_grads is not None and b.dtype == b.W_dec_FD.dtype and b.dtype.itemsize >= 4

    def none() -> Tensor:
        return b.x_BD.new_empty(0)  # one per output: those of an operator may not share memory

    def products_at(indices: Tensor, n_latents: int) -> CodeProducts:
        return CodeProducts(p, indices, n_latents, groups, b.dtype, active_only)

    acts_BK, values_BK, indices_BK = p.sorted_codes(b.values_BK, b.indices_BK, b.gates_B, groups)
    codes = products_at(indices_BK, len(b.W_dec_FD))
    # Dense on a GPU, a row of the gradient meets its row of W in the optimiser's kernel, where their product is free.
    has_radial = has_radial and not (isinstance(p, SelfChecked) and (codes.dense or b.dead_N is not None))
    rows_dtype = b.dtype if codes.dense else b.x_BD.dtype
    grad_out_BD = b.x_BD.new_zeros(b.x_BD.shape) if b.grad_out_BD is None else b.grad_out_BD
    g_BD, centered_BD = p.sorted_rows(grad_out_BD, None, groups, rows_dtype), b.centered(groups, rows_dtype)
    d_acts_BK = codes.matmul_at_indices(g_BD, b.W_dec_FD)
    d_pre_BK, d_gates_B = p.code_grads(values_BK, d_acts_BK, b.gates_B, b.grad_values_BK, groups)
    # <dW_dec[f], W_dec[f]> per token: dW_dec[f] is the sum of acts g, and d_acts is <g, W_dec[f]>.
    radial_BK = acts_BK * d_acts_BK if has_radial else None
    rows_R, grads = codes.weight_grads(acts_BK, g_BD, d_pre_BK, centered_BD, radial_BK)
    d_x_BD = codes.decode(d_pre_BK, b.W_enc_FD) if b.needs_x else none()
    if b.dead_N is not None and b.grad_aux_BD is not None:
        dead = dead_latents(b.dead_N, groups, len(b.W_enc_FD), b.aux_slots_BA.shape[1])
        aux = products_at(b.aux_slots_BA, len(dead.latents_Z))
        dead_R, dead_grads, d_dead_x_BD = _aux_backward(b, b.grad_aux_BD, dead, aux, centered_BD, has_radial)
        rows_R, grads = _merge_rows(rows_R, grads, dead_R, dead_grads)
        d_x_BD = d_x_BD + d_dead_x_BD if b.needs_x else d_x_BD

    dW_dec, dW_enc, d_bias, *radial = grads
    d_pre_bias_D = none()
    if b.needs_pre_bias:
        # The pre-bias is shared by all tokens, so its gradient needs the sum over the batch only: one mat-vec.
        d_pre_bias_D = _minus_weighted_sum(d_bias, rows_R, b.W_enc_FD)
    if row_grads is not None:
        row_grads.store(rows_R, dW_enc, dW_dec, d_bias, radial[0] if radial else None)
    if active_only:
        dW_enc = dW_dec = d_bias = none()
    return InputGrads(d_x_BD, dW_enc, dW_dec, none() if d_gates_B is None else d_gates_B, d_pre_bias_D, d_bias)


def _aux_backward(
    b: BackwardInputs, grad_aux_BD: Tensor, dead: DeadLatents, codes: CodeProducts, centered_BD: Tensor, radial: bool
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """The dead latents that have gradients, those gradients, and the gradient of x."""
    g_BD = dead.groups.sorted(grad_aux_BD).contiguous()
    d_acts_BA = codes.matmul_at_indices(g_BD, b.W_dec_FD[dead.latents_Z])
    d_pre_BA = dead.without_padding(gated(d_acts_BA, b.gates_B, dead.groups), b.aux_slots_BA)
    acts_BA = gated(b.aux_values_BA, b.gates_B, dead.groups)
    radial_BA = acts_BA * d_acts_BA if radial else None
    rows_R, grads = codes.weight_grads(acts_BA, g_BD, d_pre_BA, centered_BD, radial_BA)
    d_x_BD = codes.decode(d_pre_BA, b.W_enc_FD[dead.latents_Z]) if b.needs_x else g_BD.new_empty(0)
    return dead.latents_Z if rows_R is None else dead.latents_Z[rows_R], grads, d_x_BD


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


def _minus_weighted_sum(weights_R: Tensor, rows_R: Tensor | None, W_FD: Tensor) -> Tensor:
    """-sum_r weights[r] W[rows[r]], [D], without a copy of the rows; of some rows in parts, which run in parallel."""
    if rows_R is None:
        return torch.addmv(weights_R.new_empty(W_FD.shape[1]), W_FD.T, weights_R, beta=0, alpha=-1)
    parts = max(1, len(rows_R) // 256)
    pad = -len(rows_R) % parts
    rows = torch.nn.functional.pad(rows_R, (0, pad)).view(parts, -1)
    weights = torch.nn.functional.pad(weights_R, (0, pad)).view(parts, -1)
    return -primitives(W_FD).sparse_decode(weights, rows, W_FD).sum(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    encoder, decoder = _split(inputs)
    outputs = Outputs(*output)
    ctx.mark_non_differentiable(outputs.indices_BK, *outputs[4:])
    ctx.set_materialize_grads(False)
    saved = encoder._asdict() | decoder._asdict() | outputs._asdict()
    ctx.save_for_backward(*(saved[name] for name in _SAVED))
    ctx.constants = (encoder.dtype,)


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
