"""select_topk: the k largest of every row, exact, without torch.topk ever reading the whole row.

The k largest numbers of a row all lie in the k blocks with the largest maxima: whatever lies elsewhere is at most
its own block's maximum, and k blocks hold a maximum at least as large. So

    1. one read of pre gives the maximum of every block of b latents           [R, F / b]
    2. torch.topk picks k blocks
    3. a gather reads those blocks again, torch.topk picks k of them           [R, k b]

With b near sqrt(F / k) the two selections see 2 sqrt(F k) numbers per row instead of F.

Letters: R counts the rows, any rows; F their length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.triton_backend.blocks import candidate_block, cdiv, next_power_of_2, tile_warps
from sae_lens_switch_kernels.triton_backend.launch import Traffic, arch_of, launch, load_row

_TILE = 2048  # numbers of one row per program
_ROWS = 4  # rows per program: bias and scale are read once for all of them


@triton.jit
def _vector(vector, columns, inside, absent):
    return absent if vector is None else load_row(vector + columns, inside).to(tl.float32)


@triton.jit
def _keys(pre, shift, factor, inside):
    """(pre + bias) * scale in the order of torch.topk, to which NaN is the largest number.

    The padding past F is smaller than every key, so that it is never chosen, not even in a row of minus infinities.
    """
    keys = (load_row(pre, inside).to(tl.float32) + shift) * factor
    keys = tl.where(keys == keys, tl.maximum(keys, -3.4028234663852886e38), float("inf"))
    return tl.where(inside, keys, float("-inf"))


@triton.jit
def _select_topk_maxima_kernel(
    pre,  # [R, F]
    bias,  # [F] or None
    scale,  # [F] or None
    maxima,  # [R, n_blocks]
    R,
    F,
    n_blocks,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = block[:, None] * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    shift = _vector(bias, columns, columns < F, 0.0)
    factor = _vector(scale, columns, columns < F, 1.0)
    for i in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        keys = _keys(pre + row * F + columns, shift, factor, columns < tl.where(row < R, F, 0))
        tl.store(maxima + row * n_blocks + block, tl.max(keys, 1), mask=block < tl.where(row < R, n_blocks, 0))


@triton.jit
def _select_topk_candidates_kernel(
    pre,  # [R, F]
    bias,  # [F] or None
    scale,  # [F] or None
    blocks,  # [R, k] the winning blocks
    candidates,  # [R, k * BLOCK_F]
    F,
    k,
    BLOCKS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    block = tl.load(blocks + row * k + j, mask=j < k, other=0).to(tl.int32)
    within = tl.arange(0, BLOCK_F)[None, :]
    columns = block[:, None] * BLOCK_F + within
    shift = _vector(bias, columns, columns < F, 0.0)
    factor = _vector(scale, columns, columns < F, 1.0)
    keys = _keys(pre + row * F + columns, shift, factor, columns < F)
    tl.store(candidates + (row * k + j[:, None]) * BLOCK_F + within, keys, mask=(j < k)[:, None])


def select_topk(
    pre_RF: Tensor, k: int, bias_F: Tensor | None = None, scale_F: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Values and indices (int64), [R, k], of the k largest (pre + bias) * scale; values are pre + bias, unscaled.

    Keys are compared in float32. Indices are distinct within a row and in no particular order; the choice between equal
    keys is arbitrary but the same on every run.
    """
    R, F = pre_RF.shape
    BLOCK_F = candidate_block(F, k)
    n_blocks = cdiv(F, BLOCK_F)
    pre_RF = pre_RF.contiguous()
    if n_blocks + k * BLOCK_F > F // 2:
        indices_Rk = _direct_keys(pre_RF, bias_F, scale_F).topk(k, sorted=False).indices
    else:
        lanes = arch_of(pre_RF.device).lanes
        arguments = {
            "pre": pre_RF,
            "bias": None if bias_F is None else bias_F.contiguous(),
            "scale": None if scale_F is None else scale_F.contiguous(),
            "F": F,
            "BLOCK_F": BLOCK_F,
        }
        maxima = pre_RF.new_empty(R, n_blocks, dtype=torch.float32)
        BLOCKS = min(_TILE // BLOCK_F, next_power_of_2(n_blocks))
        launch(
            _select_topk_maxima_kernel,
            (cdiv(R, _ROWS), cdiv(n_blocks, BLOCKS)),
            tile_warps(BLOCKS * BLOCK_F, lanes),
            maxima=maxima,
            R=R,
            n_blocks=n_blocks,
            ROWS=_ROWS,
            BLOCKS=BLOCKS,
            **arguments,
        )
        blocks_Rk = maxima.topk(k, sorted=False).indices
        candidates = pre_RF.new_empty(R, k * BLOCK_F, dtype=torch.float32)
        BLOCKS = min(_TILE // BLOCK_F, next_power_of_2(k))
        launch(
            _select_topk_candidates_kernel,
            (R, cdiv(k, BLOCKS)),
            tile_warps(BLOCKS * BLOCK_F, lanes),
            blocks=blocks_Rk,
            candidates=candidates,
            k=k,
            BLOCKS=BLOCKS,
            **arguments,
        )
        chosen_Rk = candidates.topk(k, sorted=False).indices
        indices_Rk = blocks_Rk.gather(1, chosen_Rk // BLOCK_F) * BLOCK_F + chosen_Rk % BLOCK_F
    values_Rk = pre_RF.gather(1, indices_Rk)
    return (values_Rk if bias_F is None else values_Rk + bias_F[indices_Rk]).to(pre_RF.dtype), indices_Rk


def _direct_keys(pre_RF: Tensor, bias_F: Tensor | None, scale_F: Tensor | None) -> Tensor:
    if bias_F is not None:
        pre_RF = pre_RF.float() + bias_F
    return pre_RF if scale_F is None else pre_RF.float() * scale_F


def select_topk_traffic(R: int, F: int, k: int, itemsize: int, vectors: int = 0, vector_itemsize: int = 4) -> Traffic:
    """Both kernels, with ``vectors`` of bias and scale given; without torch.topk's own passes over the few numbers."""
    block = candidate_block(F, k)
    candidates = R * k * block
    return Traffic(
        flops=2 * (R * F + candidates),
        streamed=R * F * itemsize + 4 * R * cdiv(F, block) + 8 * R * k + candidates * (itemsize + 4),
        gathered=vectors * vector_itemsize * (cdiv(R, _ROWS) * F + candidates),
        pool=vectors * vector_itemsize * F,
    )
