"""The primitives in plain torch: the CPU path, and the fallback on every other device.

None of them makes a [B, F] tensor. They know nothing of autograd; library.py joins them into gradients.
Where several routes of torch's own lead to a result, the one taken is the fastest measured on a CPU
(kernels/README.md has the numbers).
"""

import warnings
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_lens_switch_kernels.index import ExpertGroups, LatentGrads, LatentIndex

# Pre-activations are made and searched a tile at a time: rows enough for the matrix product to run at full speed,
# and latents few enough that a dictionary of any width takes the same memory.
_TILE_ROWS = 512
_TILE_LATENTS = 1 << 15
# Gathered rows [rows, K, D] of the generic route, likewise.
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


def latent_weight_grads(
    index: LatentIndex, values_BK: Tensor, g_BD: Tensor, d_pre_BK: Tensor | None = None, x_BD: Tensor | None = None
) -> LatentGrads:
    """Both weight gradients over one index: 2BKD flops each instead of 2BFD, sums in the order of the index."""
    tokens_N = torch.div(index.order_N, max(1, values_BK.shape[1]), rounding_mode="floor")
    starts_F = index.starts_F1[:-1]

    def transposed(v_BK: Tensor, y_BD: Tensor) -> tuple[Tensor, Tensor]:
        v_N = v_BK.flatten()[index.order_N]
        if not len(v_N):
            return y_BD.new_zeros(len(starts_F), y_BD.shape[1]), v_N
        return F.embedding_bag(tokens_N, y_BD, starts_F, mode="sum", per_sample_weights=v_N), v_N

    dW_dec_FD, values_N = transposed(values_BK, g_BD)
    counted_N1 = F.pad((values_N > 0).cumsum(0, dtype=torch.int32), (1, 0))
    fired_F = counted_N1[index.starts_F1].diff()
    if d_pre_BK is None or x_BD is None:
        return LatentGrads(dW_dec_FD, None, None, fired_F)
    dW_enc_FD, d_pre_N = transposed(d_pre_BK, x_BD)
    d_b_enc_F = torch.segment_reduce(d_pre_N, "sum", offsets=index.starts_F1, initial=0, unsafe=True)
    return LatentGrads(dW_dec_FD, dW_enc_FD, d_b_enc_F, fired_F)


def topk_encode(
    x_BD: Tensor,
    W_FD: Tensor,
    k: int,
    groups: ExpertGroups,
    bias_F: Tensor | None,
    scale_F: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The k largest of (x W_e^T + bias) * scale a row: pre-activations without the scale, and indices over all F.

    2BDM flops: only the block of a row's own expert is computed, a tile of rows at a time.
    """
    values_BK = W_FD.new_empty(len(x_BD), k)
    indices_BK = torch.empty(len(x_BD), k, dtype=torch.long, device=x_BD.device)
    for block, tile, buffer in _tiles(len(W_FD), groups, dtype, _TILE_LATENTS):
        x_RD, values, indices = x_BD[tile].to(dtype), [], []
        for low in range(block.start, block.stop, _TILE_LATENTS):
            part = slice(low, min(low + _TILE_LATENTS, block.stop))
            pre_RP = torch.mm(x_RD, W_FD[part].to(dtype).T, out=buffer[:, : part.stop - low])
            bias, scale = (None if t is None else t[part] for t in (bias_F, scale_F))
            v, i = select_topk(pre_RP, min(k, part.stop - low), bias, scale)
            values.append(v.to(W_FD.dtype))
            indices.append(i + low)
        v, i = torch.cat(values, 1), torch.cat(indices, 1)
        if v.shape[1] > k:  # the k largest of all are among the k largest of each part
            best = (v if scale_F is None else v * scale_F[i]).topk(k, dim=1, sorted=False).indices
            v, i = v.gather(1, best), i.gather(1, best)
        values_BK[tile], indices_BK[tile] = v, i
    return values_BK, indices_BK


def grouped_decode(
    values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor, groups: ExpertGroups, dtype: torch.dtype
) -> Tensor:
    """sparse_decode as one dense product an expert, 2BMD flops: faster while M / K is small."""
    out_BD = W_FD.new_empty(len(values_BK), W_FD.shape[1])
    for block, tile, buffer_RM in _tiles(len(W_FD), groups, dtype):
        acts_RM = _scatter(buffer_RM, values_BK[tile], indices_BK[tile] - block.start)
        _mm(out_BD[tile], acts_RM, W_FD[block].to(dtype))
    return out_BD


def grouped_matmul_at_indices(
    g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, groups: ExpertGroups, dtype: torch.dtype
) -> Tensor:
    """matmul_at_indices as one dense product an expert."""
    out_BK = g_BD.new_empty(indices_BK.shape)
    for block, tile, buffer_RM in _tiles(len(W_FD), groups, dtype):
        torch.mm(g_BD[tile].to(dtype), W_FD[block].to(dtype).T, out=buffer_RM)
        out_BK[tile] = buffer_RM.gather(1, indices_BK[tile] - block.start)
    return out_BK


def grouped_weight_grad(
    values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_latents: int, groups: ExpertGroups, dtype: torch.dtype
) -> Tensor:
    """latent_weight_grad as one dense product an expert."""
    grad_FD = g_BD.new_empty(n_latents, g_BD.shape[1])
    written = 0
    for block, tile, buffer_RM in _tiles(n_latents, groups, dtype):
        acts_RM = _scatter(buffer_RM, values_BK[tile], indices_BK[tile] - block.start)
        g_RD = g_BD[tile].to(dtype)
        if block.stop > written:  # the first tile of this expert
            grad_FD[written : block.start] = 0  # experts without tokens
            _mm(grad_FD[block], acts_RM.T, g_RD)
            written = block.stop
        elif dtype == grad_FD.dtype:
            grad_FD[block].addmm_(acts_RM.T, g_RD)
        else:
            grad_FD[block] += acts_RM.T @ g_RD
    grad_FD[written:] = 0
    return grad_FD


def _tiles(
    n_latents: int, groups: ExpertGroups, dtype: torch.dtype, widest: int | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Each expert's latents with each tile of its rows, and one buffer [rows, M or widest] lent to all in turn."""
    offsets = groups.offsets_E1.tolist()
    M = n_latents // (len(offsets) - 1)
    rows = min(_TILE_ROWS, max((end - start for start, end in pairwise(offsets)), default=0))
    buffer = torch.empty(rows, min(M, widest or M), dtype=dtype, device=groups.offsets_E1.device)
    for e, (start, end) in enumerate(pairwise(offsets)):
        for low in range(start, end, max(1, rows)):
            high = min(low + rows, end)
            yield slice(e * M, (e + 1) * M), slice(low, high), buffer[: high - low]


def _scatter(buffer_RM: Tensor, values_RK: Tensor, indices_RK: Tensor) -> Tensor:
    return buffer_RM.zero_().scatter_add_(1, indices_RK, values_RK.to(buffer_RM.dtype))


def _mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def select_topk(
    pre_RF: Tensor, k: int, bias_F: Tensor | None = None, scale_F: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest of (pre + bias) * scale a row, exact, in no particular order: pre + bias there, and where.

    The k largest of a row lie in the k blocks with the largest maxima. So: one pass for the maxima of n blocks,
    then two small top-k, over the maxima and over the k winning blocks, instead of one over all F.
    May overwrite pre.
    """
    if bias_F is not None:
        pre_RF.add_(bias_F)
    scaled_RF = pre_RF if scale_F is None else pre_RF * scale_F
    n = _block_count(scaled_RF.shape[1], k)
    if n == 0:
        indices_RK = scaled_RF.topk(k, dim=1, sorted=False).indices
    else:
        # Block j is columns j, j + n, j + 2n, ...: the maxima are then elementwise maxima of contiguous rows. The
        # columns that are left over, fewer than n, are candidates all.
        height = scaled_RF.shape[1] // n
        blocks_RHN = scaled_RF[:, : height * n].unflatten(1, (height, n))
        winners_RK = blocks_RHN.amax(dim=1).topk(k, dim=1, sorted=False).indices
        candidates = blocks_RHN.gather(2, winners_RK.unsqueeze(1).expand(-1, height, -1)).flatten(1)
        candidates = torch.cat([candidates, scaled_RF[:, height * n :]], dim=1)
        place_RK = candidates.topk(k, dim=1, sorted=False).indices
        in_blocks_RK = winners_RK.gather(1, place_RK % k) + n * (place_RK // k)
        indices_RK = torch.where(place_RK < height * k, in_blocks_RK, place_RK + height * (n - k))
    return pre_RF.gather(1, indices_RK), indices_RK


def _block_count(n_latents: int, k: int) -> int:
    """Blocks, near the least of what the two small top-k see, n + k * n_latents / n; 0 where they see too much."""
    n = 64 * max(1, round((k * n_latents) ** 0.5 / 64))
    return n if n >= 2 * k and 4 * (n + k * n_latents / n) < n_latents else 0
