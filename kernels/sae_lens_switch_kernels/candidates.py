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
from sae_lens_switch_kernels.indexing import ExpertGroups
from sae_lens_switch_kernels.inputs import EncoderInputs

EncoderPrecision = Literal["full", "bfloat16", "float8"]

_DTYPES = {"full": None, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
# The margin: one more candidate for so many latents per token, and at least so many.
_ONE_IN = {torch.bfloat16: 8, torch.float8_e4m3fn: 2}
_AT_LEAST = {torch.bfloat16: 4, torch.float8_e4m3fn: 16}
# A token is in doubt if a latent outside its candidates would be chosen, were it off by this many times the error that
# its candidates show.
_STANDARD_DEVIATIONS = 4


class Selected(NamedTuple):
    """The active latents of every token, before ReLU.

    Attributes:
        values_BK: Pre-activations, without the scale.
        indices_BK: The latents.
        doubtful_B: Whether low precision may have missed a latent; empty where there was none.
    """

    values_BK: Tensor
    indices_BK: Tensor
    doubtful_B: Tensor


def with_candidates(inputs: EncoderInputs, precision: EncoderPrecision) -> EncoderInputs:
    """The inputs with the candidates' dtype and number; unchanged where low precision would save nothing.

    Raises:
        ValueError: If ``precision`` is none of EncoderPrecision.
    """
    if precision not in _DTYPES:
        raise ValueError(f"encoder_precision must be one of {', '.join(map(repr, _DTYPES))}; got {precision!r}")
    dtype, width = _DTYPES[precision], max(inputs.blocks.width, inputs.n_shared)
    if dtype is None or dtype.itemsize >= inputs.W_enc_FD.dtype.itemsize:
        return inputs
    n_candidates = inputs.k + max(_AT_LEAST[dtype], -(-inputs.k // _ONE_IN[dtype]))
    return inputs._replace(candidate_dtype=dtype, n_candidates=n_candidates) if n_candidates < width else inputs


def select_from_candidates(
    p: ModuleType | SelfChecked, inputs: EncoderInputs, centered_BD: Tensor, groups: ExpertGroups
) -> Selected:
    """The k largest of the candidates by their exact pre-activations; rows are sorted by expert."""
    W_FD, bias_F, scale_F, dtype = inputs.W_enc_FD, inputs.bias_F, inputs.scale_F, inputs.candidate_dtype
    assert dtype is not None
    guesses_BC, candidates_BC = p.topk_encode(centered_BD, W_FD, inputs.n_candidates, groups, bias_F, scale_F, dtype)
    exact_BC = p.matmul_at_indices(centered_BD, W_FD, candidates_BC)
    if bias_F is not None:
        exact_BC += bias_F[candidates_BC]
    scale_BC = None if scale_F is None else scale_F[candidates_BC]
    ranked_BC = exact_BC if scale_BC is None else exact_BC * scale_BC
    best_BK, place_BK = ranked_BC.topk(inputs.k, dim=1, sorted=False)
    doubtful_B = _is_doubtful(guesses_BC if scale_BC is None else guesses_BC * scale_BC, ranked_BC, best_BK)
    return Selected(exact_BC.gather(1, place_BK), candidates_BC.gather(1, place_BK), doubtful_B)


def _is_doubtful(guesses_BC: Tensor, exact_BC: Tensor, best_BK: Tensor) -> Tensor:
    """Whether a latent that is no candidate, so whose guess is at most the least of these, may be among the k largest.

    Below zero nothing is at stake: ReLU removes it.
    """
    error_B = (guesses_BC - exact_BC).square().mean(1).sqrt()
    return guesses_BC.amin(1) + _STANDARD_DEVIATIONS * error_B > best_BK.amin(1).clamp_min(0)
