"""A penalty on decoder rows of different experts that fire for the same token: such rows become duplicates.

Letters: S tokens, and N latents of each in its own experts and in another; P is 2N.
"""

import torch
from sae_lens_switch_kernels import matmul_at_indices
from torch import Tensor

# One token in so many is looked at, with its strongest latents: enough to meet duplicates often, at little cost.
TOKENS_PER_SAMPLE, STRONGEST = 8, 8
# Cosines up to here cost nothing: features that are only related have them too.
_MARGIN = 0.3


def overlap_penalty(W_dec_FD: Tensor, own_SN: Tensor, other_SN: Tensor, fires_SNN: Tensor) -> Tensor:
    """mean_S sum_ij max(0, cosine of W_dec[own_i] and W_dec[other_j] - 0.3)^2, over the pairs that fire.

    Differentiable once, in W_dec. The gradient is computed here, orthogonal to each row, so that the backward pass is
    one product at indices, in a fixed order.

    Args:
        W_dec_FD: Decoder weights.
        own_SN: Latents of each token in its own experts.
        other_SN: Latents that it would have in another.
        fires_SNN: Whether both latents of a pair are active.
    """
    index_SP = torch.cat([own_SN, other_SN], dim=1)
    with torch.no_grad(), torch.autocast(W_dec_FD.device.type, enabled=False):
        rows_SPD = W_dec_FD[index_SP].to(torch.promote_types(W_dec_FD.dtype, torch.float32))
        norms_SP1 = rows_SPD.norm(dim=2, keepdim=True).clamp_min(torch.finfo(rows_SPD.dtype).tiny)
        own_SND, other_SND = (rows_SPD / norms_SP1).chunk(2, dim=1)
        cosine_SNN = own_SND @ other_SND.mT
        excess_SNN = (cosine_SNN - _MARGIN).relu() * fires_SNN
        penalty = excess_SNN.square().sum() / len(own_SN)
        slope_SNN = 2 * excess_SNN / len(own_SN)
        along_SNN = slope_SNN * cosine_SNN
        d_own_SND = slope_SNN @ other_SND - along_SNN.sum(2, keepdim=True) * own_SND
        d_other_SND = slope_SNN.mT @ own_SND - along_SNN.sum(1).unsqueeze(2) * other_SND
        grad_SPD = (torch.cat([d_own_SND, d_other_SND], dim=1) / norms_SP1).to(W_dec_FD.dtype)
    # Linear in W_dec with this gradient; its value, zero for orthogonal gradients but for rounding, is taken out.
    linear = matmul_at_indices(grad_SPD.flatten(0, 1), W_dec_FD, index_SP.view(-1, 1)).sum()
    return penalty + (linear - linear.detach())
