"""The two halves of ``sparse_autoencode`` apart, where somebody else chooses the latents in between.

``topk_candidates`` finds the best latents of a part of the dictionary; once it is known which of them are among the
best of all, ``decode_chosen`` decodes these. Its backward pass is that of ``autoencode``, of encoder and decoder.

Letter beside the package's: C is the number of candidates per token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sae_lens_switch_kernels.arguments import checked
from sae_lens_switch_kernels.autoencode import backward
from sae_lens_switch_kernels.autoencode_tensors import BackwardInputs
from sae_lens_switch_kernels.backend import primitives
from sae_lens_switch_kernels.candidates import EncoderPrecision, select, select_from_candidates
from sae_lens_switch_kernels.dead_latents import dead_latents
from sae_lens_switch_kernels.indexing import code_rows, level_offsets, one_group
from sae_lens_switch_kernels.inputs import EncoderInputs
from sae_lens_switch_kernels.operators import Gradients
from sae_lens_switch_kernels.products import CodeProducts
from sae_lens_switch_kernels.row_grads import RowGrads


class Codes(NamedTuple):
    """Latents whose number varies by token: values [S], indices [S], and offsets as in ``sparse_decode``.

    In levels (Matryoshka SAEs), offsets are those of each token's levels, [B * L + 1], and each is decoded apart.
    """

    values_S: Tensor
    indices_S: Tensor
    offsets_B1: Tensor

    def after_relu(self) -> "Codes":
        return self._replace(values_S=self.values_S.relu())

    def in_levels(self, ends_L: Tensor, n_latents: int) -> "Codes":
        """Those of each token, which must ascend, in levels that end at these latents, the last at ``n_latents``."""
        return self._replace(offsets_B1=level_offsets(self.offsets_B1, self.indices_S, ends_L, n_latents))

    @classmethod
    def of_levels(cls, levels: Sequence["Codes"]) -> "Codes":
        """One level's after another's, token by token."""
        L = len(levels)
        counts_BL = torch.stack([codes.offsets_B1.diff() for codes in levels], dim=1)
        rows = (code_rows(codes.offsets_B1, len(codes.values_S)).row_S for codes in levels)
        order_S = torch.cat([row_S * L + level for level, row_S in enumerate(rows)]).argsort(stable=True)
        values_S, indices_S = torch.cat([c.values_S for c in levels]), torch.cat([c.indices_S for c in levels])
        return cls(values_S[order_S], indices_S[order_S], pad(counts_BL.flatten().cumsum(dim=0), (1, 0)))


class Candidates(NamedTuple):
    """The best latents of each token, in no particular order; or of a batch, token by token, [S].

    Attributes:
        values_BC: Pre-activations, before ReLU and without the scale.
        indices_BC: The latents.
        ranked_BC: What they are ranked by: values times the scale, in float32 at least; -inf where there is no latent.
        offsets_B1: Of a batch, where each token's begin.
    """

    values_BC: Tensor
    indices_BC: Tensor
    ranked_BC: Tensor
    offsets_B1: Tensor | None = None

    def chosen(self, is_chosen_BC: Tensor) -> Codes:
        """Waits for the device, to learn how many there are."""
        if self.offsets_B1 is None:
            offsets_B1 = pad(is_chosen_BC.sum(dim=1).cumsum(dim=0), (1, 0))
        else:
            offsets_B1 = pad(is_chosen_BC.cumsum(dim=0), (1, 0))[self.offsets_B1]
        places_S = is_chosen_BC.flatten().nonzero().flatten()
        return Codes(self.values_BC.flatten()[places_S], self.indices_BC.flatten()[places_S], offsets_B1)


@torch.no_grad()
def topk_candidates(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    k: int,
    *,
    pre_bias_D: Tensor | None = None,
    bias_F: Tensor | None = None,
    scale_F: Tensor | None = None,
    encoder_precision: EncoderPrecision = "full",
    over_batch: bool = False,
) -> Candidates:
    """The k latents of every token that ``topk_encode`` selects, before ReLU, without gradients.

    With ``over_batch`` those of the batch, as ``batch_topk_encode``.

    Raises:
        ValueError: As ``topk_encode``.
    """
    inputs = EncoderInputs(x_BD, W_enc_FD, pre_bias_D, bias_F, scale_F, None, None, k, 1, W_enc_FD.dtype)
    inputs, p = checked(inputs._replace(over_batch=over_batch), encoder_precision), primitives(x_BD)
    groups = inputs.groups()
    centered_BD = inputs.centered(groups)
    with torch.autocast(x_BD.device.type, enabled=False):
        if inputs.candidate_dtype is None:
            found = select(p, inputs, centered_BD, groups, k, inputs.dtype)
        else:
            found = select_from_candidates(p, inputs, centered_BD, groups)
    values_BC, indices_BC = found.values_BK, found.indices_BK
    ranked_BC = values_BC if scale_F is None else values_BC * scale_F[indices_BC]
    ranked_BC = ranked_BC.to(torch.promote_types(ranked_BC.dtype, torch.float32))
    return Candidates(values_BC, indices_BC, ranked_BC, found.offsets_B1 if over_batch else None)


@torch.no_grad()
def dead_candidates(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    dead_N: Tensor,
    aux_k: int,
    *,
    expert_B: Tensor,
    n_experts: int,
    pre_bias_D: Tensor | None = None,
) -> Candidates:
    """The aux_k best of the dead latents of each token's expert, as places among the N; -inf where it has fewer.

    Args:
        x_BD: Tokens.
        W_enc_FD: Encoder weights.
        dead_N: The dead latents, ascending.
        aux_k: How many per token.
        expert_B: The expert of each token.
        n_experts: E, each with F / E consecutive latents.
        pre_bias_D: What the encoder subtracts.
    """
    dtype = torch.promote_types(W_enc_FD.dtype, torch.float32)
    if len(x_BD) == 0 or len(dead_N) == 0:
        none_BC = W_enc_FD.new_zeros(len(x_BD), aux_k)
        return Candidates(none_BC, none_BC.long(), torch.full_like(none_BC, -torch.inf, dtype=dtype))
    inputs = EncoderInputs(x_BD, W_enc_FD, pre_bias_D, None, None, expert_B, None, aux_k, n_experts, W_enc_FD.dtype)
    n = min(aux_k, len(dead_N))
    groups, dead = inputs.groups(), dead_latents(dead_N, inputs.blocks, n)
    with torch.autocast(x_BD.device.type, enabled=False):
        found = dead.encode(primitives(x_BD), inputs, inputs.centered(groups), groups, n)
    values_BC, slots_BC = (groups.unsorted(t) for t in found)
    ranked_BC = values_BC.to(dtype)
    if dead.real_Z is not None:
        ranked_BC = ranked_BC.masked_fill(~dead.real_Z[slots_BC], -torch.inf)
    assert dead.latents_Z is not None
    places_BC = torch.searchsorted(dead_N, dead.latents_Z[slots_BC])
    lacking = (0, aux_k - n)
    return Candidates(pad(values_BC, lacking), pad(places_BC, lacking), pad(ranked_BC, lacking, value=-torch.inf))


class Dead(NamedTuple):
    """Dead latents [N], and the chosen ones of each token: their pre-activations, and their places among the N."""

    dead_N: Tensor
    codes: Codes


def decode_chosen(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    W_dec_FD: Tensor,
    codes: Codes,
    *,
    pre_bias_D: Tensor | None = None,
    bias_F: Tensor | None = None,
    dead: Dead | None = None,
    row_grads: RowGrads | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The sum of chosen latents' decoder rows, as of ``sparse_autoencode`` where it has chosen the same.

    Differentiable once, in W_enc, W_dec, pre_bias and bias, as if the values were computed from these here.

    Args:
        x_BD: Tokens.
        W_enc_FD: Encoder weights.
        W_dec_FD: Decoder weights.
        codes: Active latents, after ReLU.
        pre_bias_D: What the encoder subtracted.
        bias_F: What it added.
        dead: Those of AuxK, without ReLU.
        row_grads: As in ``sparse_autoencode``.

    Returns:
        The reconstruction [B, D], and that of the dead latents; of codes in levels, that of each level, [B * L, D].
    """
    return _DecodeChosen.apply(row_grads, codes, dead, x_BD, W_enc_FD, W_dec_FD, pre_bias_D, bias_F)


def _decode(codes: Codes, W_FD: Tensor) -> Tensor:
    rows = code_rows(codes.offsets_B1, len(codes.indices_S))
    groups = one_group(len(codes.offsets_B1) - 1, W_FD.device)
    products = CodeProducts(primitives(W_FD), codes.indices_S, len(W_FD), groups, W_FD.dtype, rows=rows)
    return products.decode(codes.values_S, W_FD)


class _DecodeChosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        row_grads: RowGrads | None,
        codes: Codes,
        dead: Dead | None,
        x_BD: Tensor,
        W_enc_FD: Tensor,
        W_dec_FD: Tensor,
        pre_bias_D: Tensor | None,
        bias_F: Tensor | None,  # noqa: ARG004, its gradient is that of the pre-activations
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.row_grads, ctx.codes, ctx.dead = row_grads, codes, dead
        ctx.save_for_backward(x_BD, W_enc_FD, W_dec_FD, pre_bias_D)
        with torch.autocast(x_BD.device.type, enabled=False):
            aux_out_BD = None if dead is None else _decode(dead.codes, W_dec_FD[dead.dead_N])
            return _decode(codes, W_dec_FD), aux_out_BD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        grad_out_BD, grad_aux_BD = grads
        x_BD, W_enc_FD, W_dec_FD, pre_bias_D = ctx.saved_tensors
        codes, dead, row_grads = ctx.codes, ctx.dead, ctx.row_grads
        none, nowhere = x_BD.new_empty(0), codes.indices_S.new_empty(0)
        aux = Codes(none, nowhere, nowhere) if dead is None else dead.codes
        *_, needs_pre_bias, needs_bias = ctx.needs_input_grad
        found = backward(
            BackwardInputs(
                grad_out_BD,
                None,
                grad_aux_BD,
                x_BD,
                centered_BD=none,
                W_enc_FD=W_enc_FD,
                W_dec_FD=W_dec_FD,
                pre_bias_D=pre_bias_D,
                gates_B=None,
                expert_B=None,
                dead_N=None if dead is None else dead.dead_N,
                order_B=nowhere,
                offsets_E1=one_group(len(x_BD), x_BD.device).offsets_E1,
                values_BK=codes.values_S,
                indices_BK=codes.indices_S,
                offsets_Q1=codes.offsets_B1,
                aux_values_BA=aux.values_S,
                aux_slots_BA=aux.indices_S,
                aux_offsets_Q1=aux.offsets_B1,
                n_experts=1,
                n_shared=0,
                dtype=W_dec_FD.dtype,
                needs_x=False,
                needs_pre_bias=needs_pre_bias,
            ),
            row_grads,
        )
        d_pre_bias_D = found.pre_bias_D if needs_pre_bias else None
        if row_grads is not None and row_grads.active_only:
            return *[None] * 6, d_pre_bias_D, None
        d_bias_F = found.bias_F if needs_bias else None
        return *[None] * 4, found.W_enc_FD, found.W_dec_FD, d_pre_bias_D, d_bias_F
