"""An encoder's product at half its price, values exact: candidates in low precision, recomputed in full.

Of the product's B * F numbers only k per token are kept: it selects. So it may run in bfloat16 or float8, if somewhat
more than k latents per token, the candidates, are taken from it, and their pre-activations are computed again in the
weights' own precision (2BCD flops beside 2BFD). The k largest of those are kept. Values, and with them all gradients,
are then exact; only which latents are chosen can differ, at the border.

How many candidates: let pre-activations have standard deviation s among latents and be off by at most e * s at the
border t * s, where k of F latents are larger. In a Gaussian's tail k * (exp(t * e) - 1) latents lie within the error of
the border, t being 3 to 4 for k / F from 1e-2 to 1e-4. Rounding both factors and the result to bfloat16 makes e = 0.02
(four standard deviations), so k / 12 latents; to float8 (e4m3), 0.15, so 0.7 k, of which the missed ones are the
smallest. Measured on trained SAEs in docs/training.md.

Letter beside the package's: C is the number of candidates.
"""

from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sae_lens_switch_kernels.backend import SelfChecked
from sae_lens_switch_kernels.huge_pages import empty_huge
from sae_lens_switch_kernels.indexing import ExpertGroups, code_rows
from sae_lens_switch_kernels.inputs import EncoderInputs
from sae_lens_switch_kernels.own_tiles import own_tiles
from sae_lens_switch_kernels.several_experts import are_several, gates_of_codes
from sae_lens_switch_kernels.torch_batch_topk import BatchTopK

EncoderPrecision = Literal["full", "bfloat16", "float8"]

_DTYPES = {"full": None, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
# The margin: one more candidate for so many latents per token, and at least so many.
_ONE_IN = {torch.bfloat16: 8, torch.float8_e4m3fn: 2}
_AT_LEAST = {torch.bfloat16: 4, torch.float8_e4m3fn: 16}
# A token is in doubt if a latent outside its candidates would be chosen, were it off by this many times the error that
# its candidates show.
_STANDARD_DEVIATIONS = 4
# Of the summed dimension, for the product; and rows of weights that are scaled at a time, to stay in cache.
_MULTIPLE, _ROWS = 32, 256


class Selected(NamedTuple):
    """The active latents of every token, before ReLU.

    Attributes:
        values_BK: Pre-activations, without the scale.
        indices_BK: The latents.
        doubtful_B: Whether low precision may have missed a latent; empty where there was none.
        offsets_B1: Where each token's codes begin, if they vary in number, values and indices being [S]; else empty.
    """

    values_BK: Tensor
    indices_BK: Tensor
    doubtful_B: Tensor
    offsets_B1: Tensor


def selected_of(
    values_BK: Tensor, indices_BK: Tensor, doubtful_B: Tensor | None = None, offsets_B1: Tensor | None = None
) -> Selected:
    """With empty tensors for what there is not."""
    none = indices_BK.new_empty(0)
    return Selected(
        values_BK,
        indices_BK,
        none.bool() if doubtful_B is None else doubtful_B,
        none if offsets_B1 is None else offsets_B1,
    )


def with_candidates(inputs: EncoderInputs, precision: EncoderPrecision) -> EncoderInputs:
    """The inputs with the candidates' dtype and number; unchanged where low precision would save nothing.

    Raises:
        ValueError: If ``precision`` is none of EncoderPrecision.
    """
    if precision not in _DTYPES:
        raise ValueError(f"encoder_precision must be one of {', '.join(map(repr, _DTYPES))}; got {precision!r}")
    dtype, width = _DTYPES[precision], max(inputs.blocks.width, inputs.n_shared)
    if inputs.over_batch:
        width = inputs.choices * len(inputs.x_BD)
    if inputs.k == 0 or dtype is None or dtype.itemsize >= inputs.W_enc_FD.dtype.itemsize:
        return inputs
    n_candidates = inputs.k + max(_AT_LEAST[dtype], -(-inputs.k // _ONE_IN[dtype]))
    return inputs._replace(candidate_dtype=dtype, n_candidates=n_candidates) if n_candidates < width else inputs


def select(
    p: ModuleType | SelfChecked,
    inputs: EncoderInputs,
    centered_BD: Tensor,
    groups: ExpertGroups,
    k: int,
    dtype: torch.dtype,
    relu: bool = False,
) -> Selected:
    """The k largest per row, or of the batch, of a product in ``dtype``; rows are sorted by expert."""
    W_FD, bias_F, scale_F = inputs.W_enc_FD, inputs.bias_F, inputs.scale_F
    if not inputs.over_batch:
        return selected_of(
            *p.topk_encode(centered_BD, W_FD, k, groups, bias_F, scale_F, dtype, relu, inputs.by_magnitude)
        )
    values_S, indices_S, offsets_B1 = _select_over_batch(p, inputs, centered_BD, k, dtype)
    return selected_of(values_S.relu_() if relu else values_S, indices_S, offsets_B1=offsets_B1)


def _select_over_batch(
    p: ModuleType | SelfChecked, inputs: EncoderInputs, centered_BD: Tensor, k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest, gated or scaled, of all that tokens may choose from: values without that, indices, offsets.

    In the order of the tokens, and by latent within a token.
    """
    W_FD, scale_F, B = inputs.W_enc_FD, inputs.scale_F, len(centered_BD)

    def searched(n_numbers: int | None) -> BatchTopK:
        best = BatchTopK(k, len(W_FD), n_numbers)
        for tile in own_tiles(p, inputs, centered_BD, dtype, alone=False):
            scale_P = None if scale_F is None or tile.latents is None else scale_F[tile.latents]
            best.add(tile.pre_RP, scale_P if tile.gates_R1 is None else tile.gates_R1, tile.first_R)
        return best

    # Nothing is guessed of experts' tiles, which are not alike: their gates and the sizes of their latents differ.
    best = searched(None if are_several(inputs.expert_B) else B * len(W_FD))
    best = best if best.is_complete else searched(None)
    values_S, indices_S, offsets_B1 = best.codes(B, centered_BD.device)
    return values_S.to(W_FD.dtype), indices_S, offsets_B1


def select_from_candidates(
    p: ModuleType | SelfChecked, inputs: EncoderInputs, centered_BD: Tensor, groups: ExpertGroups
) -> Selected:
    """The k largest of the candidates by their exact pre-activations; rows are sorted by expert, if not over_batch."""
    bias_F, dtype = inputs.bias_F, inputs.candidate_dtype
    assert dtype is not None
    has_passes = bias_F is not None or inputs.scale_F is not None
    is_folded = has_passes and dtype == torch.bfloat16 and not isinstance(p, SelfChecked)
    low, low_BD = folded(inputs, centered_BD, dtype) if is_folded else (inputs, centered_BD)
    guesses_BC, candidates_BC, _, offsets_B1 = select(p, low, low_BD, groups, inputs.n_candidates, dtype)
    exact_BC = p.matmul_at_indices(
        centered_BD, inputs.W_enc_FD, candidates_BC, offsets_B1 if inputs.over_batch else None
    )
    if bias_F is not None:
        exact_BC += bias_F[candidates_BC]
    ranked_BC, scale_BC = exact_BC, _scale_of(inputs, candidates_BC, offsets_B1)
    if scale_BC is not None:
        ranked_BC, guesses_BC = exact_BC * scale_BC, guesses_BC if is_folded else guesses_BC * scale_BC
    if inputs.by_magnitude:
        ranked_BC, guesses_BC = ranked_BC.abs(), guesses_BC.abs()
    best_BK, place_BK = ranked_BC.topk(inputs.k, dim=-1, sorted=False)
    doubtful_B = _is_doubtful(guesses_BC, ranked_BC, best_BK)
    if inputs.over_batch:  # they stay in order, and one border is that of all tokens
        place_BK, doubtful_B = place_BK.sort().values, doubtful_B.expand(len(centered_BD)).clone()
        offsets_B1 = torch.searchsorted(place_BK, offsets_B1)
    return Selected(exact_BC.gather(-1, place_BK), candidates_BC.gather(-1, place_BK), doubtful_B, offsets_B1)


def _scale_of(inputs: EncoderInputs, candidates_BC: Tensor, offsets_B1: Tensor) -> Tensor | None:
    """What candidates are ranked times; over the batch their gates, where tokens have experts."""
    if inputs.over_batch and are_several(inputs.expert_B):
        token_C = code_rows(offsets_B1, len(candidates_BC)).row_S
        expert_C = inputs.blocks.expert_of(candidates_BC)
        gates_C = gates_of_codes(inputs.gates_B, inputs.expert_B, expert_C, token_C)
        return None if gates_C is None else gates_C.to(inputs.W_enc_FD.dtype)
    return None if inputs.scale_F is None else inputs.scale_F[candidates_BC]


def folded(inputs: EncoderInputs, x_BD: Tensor, dtype: torch.dtype) -> tuple[EncoderInputs, Tensor]:
    """Bias and scale inside the product, which is then what ranks: (x, 1) times scale (W, bias).

    On a CPU each would be a pass over the product's B * F numbers.
    """
    W_FD, bias_F, scale_F = inputs.W_enc_FD, inputs.bias_F, inputs.scale_F
    F, D = W_FD.shape
    width = D + 1 + -(D + 1) % _MULTIPLE
    low_FD, low_BD = (empty_huge(len(t), width, dtype=dtype, device=t.device) for t in (W_FD, x_BD))
    low_FD[:, D:], low_BD[:, D:] = 0, 0
    for start in range(0, F, _ROWS):
        rows = slice(start, start + _ROWS)
        low_FD[rows, :D] = W_FD[rows] if scale_F is None else W_FD[rows] * scale_F[rows].unsqueeze(1)
    low_BD[:, :D] = x_BD
    if bias_F is not None:
        low_FD[:, D] = bias_F if scale_F is None else bias_F * scale_F
        low_BD[:, D] = 1
    return inputs._replace(W_enc_FD=low_FD, bias_F=None, scale_F=None), low_BD


def _is_doubtful(guesses_BC: Tensor, exact_BC: Tensor, best_BK: Tensor) -> Tensor:
    """Whether a latent that is no candidate, so whose guess is at most the least of these, may be among the k largest.

    Below zero nothing is at stake: ReLU removes it.
    """
    error_B = (guesses_BC - exact_BC).square().mean(-1).sqrt()
    return guesses_BC.amin(-1) + _STANDARD_DEVIATIONS * error_B > best_BK.amin(-1).clamp_min(0)
