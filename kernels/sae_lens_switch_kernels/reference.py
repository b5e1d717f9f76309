"""The truth every primitive is held to: dense, plain autograd, any dtype, no tricks.

Each function has the name and signature of the public one. Everything here makes [B, F] tensors on purpose.
"""

import torch
from torch import Tensor


def dense_codes(values_BK: Tensor, indices_BK: Tensor, n_latents: int) -> Tensor:
    """f[b, i[b, j]] += v[b, j]: the [B, F] matrix that (values, indices) stands for."""
    one_hot_BKF = torch.nn.functional.one_hot(indices_BK.long(), n_latents).to(values_BK.dtype)
    return torch.einsum("bk,bkf->bf", values_BK, one_hot_BKF)


def sparse_decode(values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """x[b] = sum_f f[b, f] W_dec[f]."""
    return torch.einsum("bf,fd->bd", dense_codes(values_BK, indices_BK, len(W_dec_FD)), W_dec_FD)


def matmul_at_indices(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    """(g W^T)[b, i[b, j]]."""
    return torch.einsum("bd,fd->bf", g_BD, W_FD).gather(1, indices_BK.long())


def latent_weight_grad(values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_latents: int) -> Tensor:
    """f^T g."""
    return torch.einsum("bf,bd->fd", dense_codes(values_BK, indices_BK, n_latents), g_BD)


def switch_encode(
    x_BD: Tensor,
    expert_B: Tensor,
    W_enc_FD: Tensor,
    k: int,
    n_experts: int,
    *,
    pre_bias_D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token: the k largest of relu((x - b) W_enc^T) within the token's own expert."""
    M = len(W_enc_FD) // n_experts
    values, indices = [], []
    for x_D, expert in zip(x_BD, expert_B.tolist(), strict=True):
        W_MD = W_enc_FD[expert * M : (expert + 1) * M]
        pre_M = W_MD @ (x_D if pre_bias_D is None else x_D - pre_bias_D)
        top = pre_M.topk(k)
        values.append(top.values.relu())
        indices.append(top.indices + expert * M)
    if not values:
        return x_BD.new_zeros(0, k), expert_B.new_zeros(0, k)
    return torch.stack(values), torch.stack(indices)


def topk_encode(x_BD: Tensor, W_enc_FD: Tensor, k: int, *, pre_bias_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """relu(TopK((x - b) W_enc^T)): one expert that owns every latent."""
    one_expert = torch.zeros(len(x_BD), dtype=torch.long, device=x_BD.device)
    return switch_encode(x_BD, one_expert, W_enc_FD, k, 1, pre_bias_D=pre_bias_D)
