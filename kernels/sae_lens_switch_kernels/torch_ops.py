"""The primitives in plain torch: the CPU path, and the fallback on every other device.

None of them makes a [B, F] tensor. They know nothing of autograd; functions.py joins them into gradients.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of one expert are encoded in chunks whose [rows, M] pre-activations stay in a core's cache until
# top-k has read them.
_CHUNK_ELEMENTS = 1 << 18


def sparse_decode(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor) -> Tensor:
    """out[b] = sum_j v[b, j] W[i[b, j]] (DenseSparseMatmul): 2BKD flops, K rows of W read a token."""
    if indices_BK.numel() == 0:
        return W_FD.new_zeros(len(indices_BK), W_FD.shape[1])
    return F.embedding_bag(indices_BK, W_FD, mode="sum", per_sample_weights=values_BK)


def matmul_at_indices(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    """out[b, j] = <g[b], W[i[b, j]]> (MatmulAtSparseIndices): 2BKD flops instead of 2BFD."""
    B, K = indices_BK.shape
    if g_BD.device.type == "cpu" and g_BD.dtype in (torch.float32, torch.float64):
        with warnings.catch_warnings():  # torch calls its CSR layout beta, once a process
            warnings.simplefilter("ignore", UserWarning)
            pattern = torch.sparse_csr_tensor(
                torch.arange(0, B * K + 1, K) if K else torch.zeros(B + 1, dtype=torch.long),
                indices_BK.flatten(),
                g_BD.new_zeros(B * K),
                (B, len(W_FD)),
                check_invariants=False,
            )
            return torch.sparse.sampled_addmm(pattern, g_BD, W_FD.T, beta=0).values().view(B, K)
    out_BK = g_BD.new_empty(B, K)
    rows = max(1, _CHUNK_ELEMENTS // max(1, K * g_BD.shape[1]))
    for start in range(0, B, rows):
        chunk = slice(start, start + rows)
        out_BK[chunk] = torch.bmm(W_FD[indices_BK[chunk]], g_BD[chunk].unsqueeze(2)).squeeze(2)
    return out_BK


def latent_weight_grad(values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_latents: int) -> Tensor:
    """out[f] = sum of v[b, j] g[b] over all (b, j) with i[b, j] = f: 2BKD flops instead of 2BFD.

    The non-zeros are sorted by latent, tokens in order within a latent, so sums have one fixed order.
    """
    if indices_BK.numel() == 0:
        return g_BD.new_zeros(n_latents, g_BD.shape[1])
    by_latent, order = indices_BK.flatten().sort(stable=True)
    starts_F = torch.searchsorted(by_latent, torch.arange(n_latents, device=g_BD.device))
    tokens = order // indices_BK.shape[1]
    return F.embedding_bag(tokens, g_BD, starts_F, mode="sum", per_sample_weights=values_BK.flatten()[order])


def switch_topk(
    x_BD: Tensor, expert_B: Tensor, W_FD: Tensor, k: int, n_experts: int, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """relu and top-k of x W_e^T, e = expert[b]: 2BDM flops; only the chosen expert's block is computed."""
    B, M = len(x_BD), len(W_FD) // n_experts
    values_BK = x_BD.new_empty(B, k)
    indices_BK = torch.empty(B, k, dtype=torch.long, device=x_BD.device)
    tokens_by_expert = expert_B.argsort(stable=True)
    counts = torch.bincount(expert_B, minlength=n_experts).tolist()
    rows = max(1, _CHUNK_ELEMENTS // M)
    start = 0
    for expert, count in enumerate(counts):
        W_DM = W_FD[expert * M : (expert + 1) * M].to(matmul_dtype).T
        for tokens in tokens_by_expert[start : start + count].split(rows):
            top = (x_BD[tokens].to(matmul_dtype) @ W_DM).topk(k, sorted=False)
            values_BK[tokens] = top.values.relu().to(values_BK.dtype)
            indices_BK[tokens] = top.indices + expert * M
        start += count
    return values_BK, indices_BK


def summed_decode(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor) -> Tensor:
    """out = sum over all (b, j) of v[b, j] W[i[b, j]]: one mat-vec of W, or a gather when that reads less."""
    if values_BK.numel() < len(W_FD):
        return sparse_decode(values_BK.reshape(1, -1), indices_BK.reshape(1, -1), W_FD)[0]
    summed_F = values_BK.new_zeros(len(W_FD)).index_add_(0, indices_BK.flatten(), values_BK.flatten())
    return summed_F @ W_FD
