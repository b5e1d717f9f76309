"""select_topk: the k largest of every row, exact, in one launch for narrow rows and three for wide ones.

Narrow rows: topk_rows.py. Wide ones: the k largest numbers of a row all lie in the k blocks with the largest maxima,
since whatever lies elsewhere is at most its own block's maximum, and k blocks hold a maximum at least as large. So

    1. one read of pre gives the maximum of every block of b latents           [R, F / b]
    2. topk_rows picks k blocks
    3. topk_rows reads those blocks again and picks k of their numbers         [R, k b]

With b near sqrt(F / k) the two selections see 2 sqrt(F k) numbers per row instead of F.

Letters: R counts the rows, any rows; F their length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.indexing import ExpertGroups
from sae_lens_switch_kernels.triton_backend.blocks import (
    ONE_PASS,
    WIDEST_ROW,
    candidate_block,
    cdiv,
    next_power_of_2,
    tile_warps,
)
from sae_lens_switch_kernels.triton_backend.launch import Traffic, arch_of, launch, load_row
from sae_lens_switch_kernels.triton_backend.topk_rows import load_vector, topk_rows

_TILE = 2048  # numbers of one row per program
_ROWS = 4  # rows per program: bias and scale are read once for all of them


@triton.jit
def _keys(pre, shift, factor, inside, MAGNITUDE: tl.constexpr):
    """(pre + bias) * scale in the order of torch.topk, to which NaN is the largest number.

    The padding past F is smaller than every key, so that it is never chosen, not even in a row of minus infinities.
    """
    keys = (load_row(pre, inside).to(tl.float32) + shift) * factor
    if MAGNITUDE:
        keys = tl.abs(keys)
    keys = tl.where(keys == keys, tl.maximum(keys, -3.4028234663852886e38), float("inf"))
    return tl.where(inside, keys, float("-inf"))


@triton.jit(do_not_specialize=["R"])
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
    MAGNITUDE: tl.constexpr,
):
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = block[:, None] * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    shift = load_vector(bias, columns, columns < F, 0.0)
    factor = load_vector(scale, columns, columns < F, 1.0)
    for i in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        keys = _keys(pre + row * F + columns, shift, factor, columns < tl.where(row < R, F, 0), MAGNITUDE)
        tl.store(maxima + row * n_blocks + block, tl.max(keys, 1), mask=block < tl.where(row < R, n_blocks, 0))


def select_topk(
    pre_RF: Tensor,
    k: int,
    bias_F: Tensor | None = None,
    scale_F: Tensor | None = None,
    groups: ExpertGroups | None = None,
    dtype: torch.dtype | None = None,
    relu: bool = False,
    by_magnitude: bool = False,
) -> tuple[Tensor, Tensor]:
    """Values and indices (int64), [R, k], of the k largest (pre + bias) * scale; values are pre + bias, unscaled.

    Keys are compared in float32. Indices are distinct within a row and in no particular order; the choice between equal
    keys is arbitrary but the same on every run. With ``groups``, rows are sorted by expert, and indices count over the
    latents of all experts. ``dtype`` is that of the values, by default that of pre. With ``relu`` negative ones are 0,
    ``by_magnitude`` chooses the k farthest from 0.
    """
    F = pre_RF.shape[1]
    block = candidate_block(F, k)
    widest = max(cdiv(F, block), next_power_of_2(k) * block)
    pays = cdiv(F, block) + k * block <= F // 2
    if F <= ONE_PASS or (F <= WIDEST_ROW and not pays):
        options = {"dtype": dtype, "relu": relu, "by_magnitude": by_magnitude}
        return topk_rows(pre_RF, k, bias_F, scale_F, offsets_E1=groups and groups.offsets_E1, **options)
    if pays and widest <= WIDEST_ROW:
        return select_in_blocks(pre_RF, k, bias_F, scale_F, groups, dtype, relu, by_magnitude)
    keys_RF = _direct_keys(pre_RF, bias_F, scale_F)
    indices_Rk = (keys_RF.abs() if by_magnitude else keys_RF).topk(k, sorted=False).indices
    values_Rk = pre_RF.gather(1, indices_Rk)
    values_Rk = (values_Rk if bias_F is None else values_Rk + bias_F[indices_Rk]).to(pre_RF.dtype)
    values_Rk = values_Rk.relu_() if relu else values_Rk
    E = 1 if groups is None else len(groups.offsets_E1) - 1
    first = 0 if groups is None else groups.first_latents(len(pre_RF), E * F)
    return values_Rk.to(dtype or pre_RF.dtype), indices_Rk + first


def select_in_blocks(
    pre_RF: Tensor,
    k: int,
    bias_F: Tensor | None = None,
    scale_F: Tensor | None = None,
    groups: ExpertGroups | None = None,
    dtype: torch.dtype | None = None,
    relu: bool = False,
    by_magnitude: bool = False,
) -> tuple[Tensor, Tensor]:
    """``select_topk`` in three launches."""
    R, F = pre_RF.shape
    BLOCK_F = candidate_block(F, k)
    n_blocks = cdiv(F, BLOCK_F)
    BLOCKS = min(_TILE // BLOCK_F, next_power_of_2(n_blocks))
    pre_RF = pre_RF.contiguous()
    maxima_RN = pre_RF.new_empty(R, n_blocks, dtype=torch.float32)
    launch(
        _select_topk_maxima_kernel,
        (cdiv(R, _ROWS), cdiv(n_blocks, BLOCKS)),
        tile_warps(BLOCKS * BLOCK_F, arch_of(pre_RF.device).lanes),
        pre=pre_RF,
        bias=None if bias_F is None else bias_F.contiguous(),
        scale=None if scale_F is None else scale_F.contiguous(),
        maxima=maxima_RN,
        R=R,
        F=F,
        n_blocks=n_blocks,
        ROWS=_ROWS,
        BLOCKS=BLOCKS,
        BLOCK_F=BLOCK_F,
        MAGNITUDE=by_magnitude,
    )
    _, blocks_Rk = topk_rows(maxima_RN, k)
    owners = groups and groups.offsets_E1
    return topk_rows(pre_RF, k, bias_F, scale_F, blocks_Rk, BLOCK_F, owners, dtype, relu, by_magnitude)


def _direct_keys(pre_RF: Tensor, bias_F: Tensor | None, scale_F: Tensor | None) -> Tensor:
    if bias_F is not None:
        pre_RF = pre_RF.float() + bias_F
    return pre_RF if scale_F is None else pre_RF.float() * scale_F


def select_topk_traffic(R: int, F: int, k: int, itemsize: int, vectors: int = 0, vector_itemsize: int = 4) -> Traffic:
    """All launches, with ``vectors`` of bias and scale given; of rows that are selected from in blocks."""
    block = candidate_block(F, k)
    candidates = R * k * block
    return Traffic(
        flops=2 * (R * F + candidates),
        streamed=(R * F + candidates) * itemsize
        + R * cdiv(F, block) * (4 + 4)
        + R * k * (4 + 8 + 8)
        + R * k * (itemsize + 8),
        gathered=vectors * vector_itemsize * (cdiv(R, _ROWS) * F + candidates),
        pool=vectors * vector_itemsize * F,
    )
