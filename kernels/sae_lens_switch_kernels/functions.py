"""The public functions: they check their arguments and call the registered operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_lens_switch_kernels import autoencode, operators
from sae_lens_switch_kernels.arguments import (
    check_codes,
    check_dead,
    check_dead_counts,
    check_device,
    check_indices,
    check_levels,
    check_like,
    check_lone_gates,
    check_matrix,
    checked,
)
from sae_lens_switch_kernels.autoencode_tensors import Outputs, Reconstruction
from sae_lens_switch_kernels.candidates import EncoderPrecision
from sae_lens_switch_kernels.indexing import ExpertGroups, n_rows
from sae_lens_switch_kernels.inputs import EncoderInputs
from sae_lens_switch_kernels.row_grads import RowGrads


def sparse_decode(values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor, offsets_B1: Tensor | None = None) -> Tensor:
    """x[b] = sum_j values[b, j] W_dec[indices[b, j]]: DenseSparseMatmul (Gao et al. 2024, D.2).

    Equals ``f @ W_dec`` for the dense [B, F] ``f`` that is zero elsewhere. Differentiable in values and W_dec.

    Args:
        values_BK: Values of the active latents; with offsets [S], those of one token after those of another.
        indices_BK: The active latents, int32 or int64; an index that occurs twice in a row counts twice.
        W_dec_FD: Decoder weights.
        offsets_B1: For tokens with differing numbers of codes: token b's are offsets[b] to offsets[b + 1].

    Returns:
        x, [B, D].

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or an index is outside [0, F).
    """
    check_matrix("W_dec_FD", W_dec_FD)
    check_codes(values_BK, indices_BK, offsets_B1)
    check_like("values_BK", values_BK, "W_dec_FD", W_dec_FD)
    return operators.sparse_decode(values_BK, indices_BK, W_dec_FD, offsets_B1)


def matmul_at_indices(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, offsets_B1: Tensor | None = None) -> Tensor:
    """<g[b], W[indices[b, j]]>: MatmulAtSparseIndices (Gao et al. 2024, D.2).

    Differentiable in g and W.

    Args:
        g_BD: One vector per token.
        W_FD: One vector per latent.
        indices_BK: Where to evaluate ``g @ W.T``, int32 or int64.
        offsets_B1: As in ``sparse_decode``.

    Returns:
        The dot products, in the shape of the indices.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or an index is outside [0, F).
    """
    check_matrix("g_BD", g_BD)
    check_matrix("W_FD", W_FD, columns=g_BD.shape[1])
    check_indices(indices_BK, offsets_B1, rows=len(g_BD))
    check_like("g_BD", g_BD, "W_FD", W_FD)
    check_device("indices_BK", indices_BK, "W_FD", W_FD)
    return operators.matmul_at_indices(g_BD, W_FD, indices_BK, offsets_B1)


def latent_weight_grad(
    values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_latents: int, offsets_B1: Tensor | None = None
) -> Tensor:
    """f^T g for the [B, F] ``f`` that (values, indices) stands for: DenseSparseMatmul, transposed.

    Row f is the sum of values[b, j] g[b] over all (b, j) with indices[b, j] = f, in the order of the tokens.
    Differentiable in values and g.

    Args:
        values_BK: Values of the active latents.
        indices_BK: The active latents, int32 or int64.
        g_BD: One vector per token.
        n_latents: F.
        offsets_B1: As in ``sparse_decode``.

    Returns:
        The sums, [F, D].

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or an index is outside [0, F).
    """
    check_codes(values_BK, indices_BK, offsets_B1)
    check_matrix("g_BD", g_BD, rows=n_rows(values_BK, offsets_B1))
    check_like("values_BK", values_BK, "g_BD", g_BD)
    return operators.latent_weight_grad(values_BK, indices_BK, g_BD, n_latents, offsets_B1)


def topk_encode(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    k: int,
    *,
    pre_bias_D: Tensor | None = None,
    bias_F: Tensor | None = None,
    scale_F: Tensor | None = None,
    encoder_precision: EncoderPrecision = "full",
    by_magnitude: bool = False,
) -> tuple[Tensor, Tensor]:
    """relu of the k pre-activations ``(x - pre_bias) W_enc^T + bias`` per row that are largest when scaled.

    Never makes a [B, F] tensor. Differentiable in x, W_enc, pre_bias and bias, through the selected positive latents
    only. Under autocast the matrix product runs in the autocast dtype and the rest in the dtype of W_enc.

    Args:
        x_BD: Tokens.
        W_enc_FD: Encoder weights.
        k: Active latents per token.
        pre_bias_D: Subtracted from x.
        bias_F: Added to the pre-activations.
        scale_F: Multiplies the pre-activations during selection only, and takes no gradient.
        encoder_precision: "bfloat16" or "float8": the product that selects runs in it and finds somewhat more than k
            candidates, whose pre-activations are computed again in the dtype of W_enc. Values and gradients are exact;
            the choice can differ among nearly equal latents.
        by_magnitude: The k farthest from 0, with their signs and without ReLU: AbsTopK (arXiv 2510.00404).

    Returns:
        values [B, K], without the scale, and indices [B, K], int64, distinct within a row and in no particular order.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or unless 1 <= k <= F.
    """
    inputs = EncoderInputs(x_BD, W_enc_FD, pre_bias_D, bias_F, scale_F, None, None, k, 1, W_enc_FD.dtype)
    return operators.encode(*checked(inputs._replace(by_magnitude=by_magnitude), encoder_precision))[:2]


def batch_topk_encode(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    k: int,
    *,
    expert_B: Tensor | None = None,
    n_experts: int = 1,
    n_shared: int = 0,
    gates_B: Tensor | None = None,
    pre_bias_D: Tensor | None = None,
    bias_F: Tensor | None = None,
    scale_F: Tensor | None = None,
    encoder_precision: EncoderPrecision = "full",
) -> tuple[Tensor, Tensor, Tensor]:
    """relu of the k pre-activations of the whole batch that are largest when scaled: BatchTopK (Bussmann et al. 2024).

    With experts, of those that ``switch_encode`` chooses from, each scaled by the gate of its expert. Exact, whatever
    the batch, and otherwise as ``topk_encode``.

    Args:
        x_BD: Tokens.
        W_enc_FD: Encoder weights.
        k: Active latents of all tokens together, from 0 to B F; with experts to B times the latents of a token.
        expert_B: The expert of each token, or its experts, as in ``switch_encode``; None: one owns all latents.
        n_experts: Number of experts.
        n_shared: Latents of no expert, as in ``switch_encode``.
        gates_B: As in ``switch_encode``; that of a single expert counts here, since tokens compete.
        pre_bias_D: Subtracted from x.
        bias_F: Added to the pre-activations; without experts.
        scale_F: Multiplies the pre-activations during selection only, and takes no gradient; without experts.
        encoder_precision: As in ``topk_encode``.

    Returns:
        values [k], without scale or gate; indices [k], ascending within a token; and offsets [B + 1], as in
        ``sparse_decode``.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or for a k that there cannot be.
    """
    inputs = EncoderInputs(x_BD, W_enc_FD, pre_bias_D, bias_F, scale_F, expert_B, gates_B, k, n_experts, W_enc_FD.dtype)
    inputs = inputs._replace(n_shared=n_shared, over_batch=True)
    return operators.encode(*checked(inputs, encoder_precision))


def switch_encode(
    x_BD: Tensor,
    expert_B: Tensor,
    W_enc_FD: Tensor,
    k: int,
    n_experts: int,
    *,
    n_shared: int = 0,
    gates_B: Tensor | None = None,
    pre_bias_D: Tensor | None = None,
    encoder_precision: EncoderPrecision = "full",
) -> tuple[Tensor, Tensor]:
    """TopK_k(relu((x - pre_bias) W_e^T)) for e = expert[b], where W_e is rows ``e * M : (e + 1) * M`` of W_enc.

    Only the chosen block is computed: 2BDM flops. With A experts per token, TopK_k over the latents of all of them,
    each multiplied by the gate of its expert for the selection: 2BDMA flops. With shared latents, of these as well,
    whose gate is 1: 2BD(MA + n_shared) flops. Otherwise as ``topk_encode``.

    Args:
        x_BD: Tokens.
        expert_B: The expert of each token, int32 or int64; or its experts, [B, A], distinct.
        W_enc_FD: Encoder weights.
        k: Active latents per token, over all its experts.
        n_experts: E; every expert owns M = (F - n_shared) / E latents.
        n_shared: The first so many latents belong to no expert, and every token may choose them.
        gates_B: Positive gates, of the shape of ``expert_B``. That of a single expert changes nothing, unless there
            are shared latents.
        pre_bias_D: Subtracted from x.
        encoder_precision: As in ``topk_encode``.

    Returns:
        values [B, K], without the gate, and indices [B, K], which count over all F latents.

    Raises:
        ValueError: As ``topk_encode``; also if n_experts does not divide F - n_shared, if k > A M + n_shared, or if an
            expert is outside [0, n_experts).
    """
    inputs = EncoderInputs(x_BD, W_enc_FD, pre_bias_D, None, None, expert_B, gates_B, k, n_experts, W_enc_FD.dtype)
    inputs = inputs._replace(n_shared=n_shared)
    return operators.encode(*checked(inputs, encoder_precision))[:2]


def sparse_autoencode(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    W_dec_FD: Tensor,
    k: int,
    *,
    expert_B: Tensor | None = None,
    groups: ExpertGroups | None = None,
    n_experts: int = 1,
    n_shared: int = 0,
    gates_B: Tensor | None = None,
    pre_bias_D: Tensor | None = None,
    bias_F: Tensor | None = None,
    scale_F: Tensor | None = None,
    dead_N: Tensor | None = None,
    aux_k: int = 0,
    dead_counts: Sequence[int] = (),
    row_grads: RowGrads | None = None,
    encoder_precision: EncoderPrecision = "full",
    by_magnitude: bool = False,
    over_batch: bool = False,
    ends_L: Tensor | None = None,
) -> Reconstruction:
    """Encode (top-k, or routed if ``expert_B`` is given), scale by the per-token gate, decode: one fused operator.

    For training: forward and backward share the grouping of tokens and the index of latents. Experts so small that
    a dense product beats the gather are computed densely within the expert. Differentiable once, in x, W_enc, W_dec,
    gates, pre_bias and bias, from out, values and aux_out.

    Args:
        x_BD: Tokens.
        W_enc_FD: Encoder weights.
        W_dec_FD: Decoder weights; their width may be another than that of x (transcoders).
        k: Active latents per token.
        expert_B: The expert of each token, or its experts, as in ``switch_encode``.
        groups: The tokens of each expert, as ``route`` has sorted them; None: they are sorted here.
        n_experts: Number of experts.
        n_shared: Latents of no expert, as in ``switch_encode``.
        gates_B: Multiplies the values of each token, or of each of its experts, before decoding; without experts,
            neither with ``ends_L`` nor with ``dead_counts``.
        pre_bias_D: Subtracted from x.
        bias_F: Added to the pre-activations.
        scale_F: Multiplies the pre-activations during selection only; with one expert per token at most, and no
            shared latents.
        dead_N: Dead latents, whose own aux_k largest pre-activations reconstruct into aux_out (AuxK, Gao et al. 2024,
            A.2); or a mask of them, [F]: all latents are then encoded, so that nobody need know how many are dead. Of
            indices only their rows of the weights are read, and get a gradient from it. With ``expert_B``: those of the
            token's own experts and the shared ones, all of them if there are fewer than aux_k, weighted by the gate,
            which gets no gradient from them.
        aux_k: Dead latents per token.
        dead_counts: Without experts, numbers of consecutive dead latents that reconstruct apart from the others, each
            with the best aux_k of its own or all if there are fewer: aux_out is then [B, len(dead_counts), D].
        row_grads: If given, the backward pass stores gradients of the active latents here instead of in ``.grad``, so
            no gradient has F rows. With ``active_only=False`` only ``radial_R`` is stored.
        encoder_precision: As in ``topk_encode``; dead latents are chosen in full precision.
        by_magnitude: As in ``topk_encode``, for dead latents too; without experts and ``over_batch``.
        over_batch: Whether k is of the whole batch, as in ``batch_topk_encode``.
        ends_L: The latents at which levels end (Matryoshka SAEs), counted from the first of each expert and ascending
            to its M; without experts to F. Shared latents are of the first level. The reconstruction is then [B, L, D],
            each level's own part: their running sum reconstructs at every width.

    Returns:
        Reconstruction, values, indices, the reconstruction from dead latents, and which tokens are in doubt.

    Raises:
        ValueError: As ``topk_encode``, ``switch_encode`` and ``sparse_decode``; also unless 1 <= aux_k <= N, or, with a
            mask, at most the M latents of an expert.
    """
    check_matrix("W_dec_FD", W_dec_FD, rows=len(W_enc_FD))
    check_like("W_dec_FD", W_dec_FD, "W_enc_FD", W_enc_FD)
    inputs = EncoderInputs(x_BD, W_enc_FD, pre_bias_D, bias_F, scale_F, expert_B, gates_B, k, n_experts, W_enc_FD.dtype)
    inputs = inputs._replace(n_shared=n_shared, by_magnitude=by_magnitude, over_batch=over_batch)
    inputs = checked(inputs, encoder_precision)
    check_lone_gates(inputs, ends_L, dead_counts)
    if ends_L is not None:
        check_levels(ends_L, inputs.blocks.width, x_BD)
        inputs = inputs.by_pairs()
    if groups is not None:
        if inputs.expert_B is None or inputs.expert_B.numel() != len(x_BD):
            raise ValueError("groups must be of tokens with one expert each, as route gives them, or None")
        inputs = inputs._replace(sorted_B=groups.order_B, ends_E1=groups.offsets_E1)
    if dead_N is not None:
        check_dead(dead_N, aux_k, inputs)
    check_dead_counts(dead_counts, dead_N, expert_B)
    arguments = *inputs, W_dec_FD, dead_N, aux_k, list(dead_counts), ends_L
    # While compiling, radial_R, a saving that an optimiser can do without, is not worth a graph break.
    if row_grads is None or (torch.compiler.is_compiling() and not row_grads.active_only):
        outputs = autoencode.autoencode(*arguments)
    else:
        outputs = autoencode.AutoencodeRows.apply(row_grads, *arguments)
    found, B, D, L = Outputs(*outputs), len(x_BD), W_dec_FD.shape[1], 1 if ends_L is None else len(ends_L)
    if ends_L is not None and not over_batch:  # each token has k, one level's after another's
        codes = {name: found._asdict()[name].view(B, k) for name in ("values_BK", "indices_BK")}
        found = found._replace(**codes, acts_BK=found.acts_BK if gates_B is None else found.acts_BK.view(B, k))
    aux_out_BD = found.aux_out_BD.view(B, len(dead_counts), D) if dead_counts else found.aux_out_BD
    return Reconstruction(
        found.out_BD if ends_L is None else found.out_BD.view(B, L, D),
        found.values_BK,
        found.indices_BK,
        None if dead_N is None else aux_out_BD,
        None if inputs.candidate_dtype is None else found.doubtful_B,
        found.offsets_Q1[::L] if over_batch else None,
        found.values_BK if gates_B is None else found.acts_BK,
    )
