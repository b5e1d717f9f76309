"""topk_rows: the k largest of rows that fit in registers, exact, in one launch; or of chosen blocks of wider rows.

One program holds one row as integers in the order of its keys, and searches for a border: at least k keys lie at or
above lo, fewer than k at or above hi. Halving ends as soon as exactly k keys lie at or above lo, or when nothing lies
between lo and hi, so that lo is the k-th key itself. Chosen are all keys from hi up and the first of those from lo up;
a prefix sum gives each its place.

The middle is in turn that of the two numbers, which leads straight to the border of a bell-shaped row, and that of the
two integers, which bounds the steps whatever the row holds.

Letters: R counts the rows, F is their length.
"""

# Triton declares that a reduction may return a tuple.
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.triton_backend.blocks import cdiv, next_power_of_2, registers_warps
from sae_lens_switch_kernels.triton_backend.code_rows import expert_of
from sae_lens_switch_kernels.triton_backend.launch import Traffic, arch_of, launch, load_row


@triton.jit
def load_vector(vector, columns, inside, absent):
    return absent if vector is None else load_row(vector + columns, inside).to(tl.float32)


@triton.jit
def _key(number, SHIFT: tl.constexpr):
    """Integers in the order of torch.topk, to which NaN is the largest number."""
    bits = number.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(number == number, bits, 0x7FFF0000) >> SHIFT


@triton.jit
def _number(key, SHIFT: tl.constexpr):
    bits = key << SHIFT
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _read(
    pre,
    bias,
    scale,
    blocks,
    first,
    n_blocks,
    F,
    SHIFT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    """Keys, pre + bias, columns and whether they exist, of BLOCKS blocks of a row."""
    N: tl.constexpr = BLOCKS * BLOCK_F
    j = first + tl.arange(0, BLOCKS)
    block = j
    if blocks is not None:
        block = tl.load(blocks + j, mask=j < n_blocks, other=0).to(tl.int32)
    columns = block[:, None] * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    inside = (j < n_blocks)[:, None] & (columns < F)
    shifted = load_row(pre + columns, inside).to(tl.float32) + load_vector(bias, columns, inside, 0.0)
    ranked = shifted * load_vector(scale, columns, inside, 1.0)
    if MAGNITUDE:
        ranked = tl.abs(ranked)
    keys = _key(ranked, SHIFT)
    keys = tl.where(inside, keys, -0x80000000 >> SHIFT)  # the padding, smaller than every key
    return tl.reshape(keys, [N]), tl.reshape(shifted, [N]), tl.reshape(columns, [N]), tl.reshape(inside, [N])


@triton.jit
def _border(keys, inside, k, SHIFT: tl.constexpr):
    """lo, hi and how many keys lie at or above hi."""
    lo = tl.min(tl.where(inside, keys, 0x7FFFFFFF), 0)
    hi = tl.max(keys, 0) + 1
    from_lo = tl.sum(inside.to(tl.int32), 0)
    from_hi = from_lo * 0
    step = from_lo * 0
    while (from_lo != k) & (lo + 1 < hi):
        between = (lo & hi) + ((lo ^ hi) >> 1)
        middle = _key(0.5 * _number(lo, SHIFT) + 0.5 * _number(hi, SHIFT), SHIFT)
        middle = tl.where((step % 2 == 0) & (lo < middle) & (middle < hi), middle, between)
        count = tl.sum((keys >= middle).to(tl.int32), 0)
        enough = count >= k
        lo, hi = tl.where(enough, middle, lo), tl.where(enough, hi, middle)
        from_lo, from_hi = tl.where(enough, count, from_lo), tl.where(enough, from_hi, count)
        step += 1
    return lo, hi, from_hi


@triton.jit(do_not_specialize=["k"])
def _topk_rows_kernel(
    pre,  # [R, F]
    bias,  # [F] or None
    scale,  # [F] or None
    blocks,  # [R, n_blocks], where to look; None: everywhere
    offsets,  # [E + 1] or None; expert e owns rows offsets[e] to offsets[e + 1], and indices from e * F
    values,  # [R, k]
    indices,  # [R, k]
    F,
    n_blocks,
    k,
    E,
    SHIFT: tl.constexpr,  # low bits of a key that are always zero
    BLOCKS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    AT_ONCE: tl.constexpr,  # blocks read again and stored at a time: few registers
    BLOCK_E: tl.constexpr,
    RELU: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    owner = 0
    if offsets is not None:
        owner = expert_of(row, offsets, E, BLOCK_E).to(tl.int64) * F
    pre += row * F
    values += row * k
    indices += row * k
    if blocks is not None:
        blocks += row * n_blocks
    keys, _all, _every, inside = _read(pre, bias, scale, blocks, 0, n_blocks, F, SHIFT, BLOCKS, BLOCK_F, MAGNITUDE)
    lo, hi, from_hi = _border(keys, inside, k, SHIFT)
    needed = k - from_hi  # of the keys from lo to hi
    stored = from_hi * 0  # keys from hi, and 2^16 times those from lo to hi, in all blocks so far
    for first in range(0, n_blocks, AT_ONCE):
        some, shifted, columns, _unused = _read(
            pre, bias, scale, blocks, first, n_blocks, F, SHIFT, AT_ONCE, BLOCK_F, MAGNITUDE
        )
        sure, border = some >= hi, (some >= lo) & (some < hi)
        counts = sure.to(tl.int32) + (border.to(tl.int32) << 16)
        ranks = stored + tl.cumsum(counts, 0)
        stored += tl.sum(counts, 0)
        chosen = sure | (border & (ranks >> 16 <= needed))
        place = (ranks & 0xFFFF) + tl.minimum(ranks >> 16, needed) - 1
        if RELU:  # what is not a number stays so
            shifted = tl.where(shifted < 0, 0.0, shifted)
        tl.store(values + place, shifted.to(values.dtype.element_ty), mask=chosen)
        tl.store(indices + place, columns.to(tl.int64) + owner, mask=chosen)


def topk_rows(
    pre_RF: Tensor,
    k: int,
    bias_F: Tensor | None = None,
    scale_F: Tensor | None = None,
    blocks_RN: Tensor | None = None,
    block: int = 0,
    offsets_E1: Tensor | None = None,
    dtype: torch.dtype | None = None,
    relu: bool = False,
    by_magnitude: bool = False,
) -> tuple[Tensor, Tensor]:
    """As ``select_topk``, indices in ascending order within a row, or within each of its blocks.

    Args:
        pre_RF: Rows. They, or the blocks to look at, have at most ``WIDEST_ROW`` numbers.
        k: How many are chosen per row.
        bias_F: Added to every row.
        scale_F: Multiplies the keys, not the values.
        blocks_RN: Of each row only these blocks are looked at; default: all of it.
        block: Their length, a power of two.
        offsets_E1: If given, rows are sorted by expert, and indices count over the latents of all experts.
        dtype: Of the values; default: that of the rows.
        relu: Whether negative values become 0.
        by_magnitude: Whether the k farthest from 0 are chosen.
    """
    R, F = pre_RF.shape
    lanes = arch_of(pre_RF.device).lanes
    width = next_power_of_2(F if blocks_RN is None else blocks_RN.shape[1] * block)
    num_warps = registers_warps(width, lanes)
    at_once = min(width, 8 * lanes * num_warps)
    BLOCK_F = at_once if blocks_RN is None else block
    n_blocks = cdiv(F, BLOCK_F) if blocks_RN is None else blocks_RN.shape[1]
    values_Rk = pre_RF.new_empty(R, k, dtype=dtype or pre_RF.dtype)
    indices_Rk = pre_RF.new_empty(R, k, dtype=torch.int64)
    E = 0 if offsets_E1 is None else len(offsets_E1) - 1
    launch(
        _topk_rows_kernel,
        (R,),
        num_warps,
        pre=pre_RF.contiguous(),
        bias=None if bias_F is None else bias_F.contiguous(),
        scale=None if scale_F is None else scale_F.contiguous(),
        blocks=blocks_RN,
        offsets=offsets_E1,
        values=values_Rk,
        indices=indices_Rk,
        F=F,
        n_blocks=n_blocks,
        k=k,
        E=E,
        SHIFT=16 if pre_RF.dtype == torch.bfloat16 and bias_F is None and scale_F is None else 0,
        BLOCKS=next_power_of_2(n_blocks),
        BLOCK_F=BLOCK_F,
        AT_ONCE=max(1, at_once // BLOCK_F),
        BLOCK_E=next_power_of_2(E),
        RELU=relu,
        MAGNITUDE=by_magnitude,
    )
    return values_Rk, indices_Rk


def topk_rows_traffic(R: int, F: int, k: int, itemsize: int, vectors: int = 0, vector_itemsize: int = 4) -> Traffic:
    """Whole rows, with ``vectors`` of bias and scale given; without the integer steps of the search."""
    return Traffic(
        flops=2 * R * F,
        streamed=R * F * itemsize + R * k * (itemsize + 8),
        gathered=vectors * vector_itemsize * R * F,
        pool=vectors * vector_itemsize * F,
    )
