"""Block sizes and warps: pure functions of shape, dtype and architecture. No autotuning, so every run is the same.

Letters: D and F as in the package.
"""

from typing import NamedTuple

import torch


class Arch(NamedTuple):
    """What block sizes depend on: threads per warp (64 on AMD's data-centre GPUs), shared memory per block in bytes."""

    lanes: int
    shared: int


class GemmBlocks(NamedTuple):
    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# Eight elements per lane: one 16-byte load of bf16, two of fp32. Wider blocks would waste lanes on widths such as
# 576 and 2304; and the narrower the slice of D that all tokens visit together, the more of it stays in L2.
_PER_LANE = 8


def row_block(D: int, lanes: int, max_warps: int = 1) -> tuple[int, int]:
    """Columns of D per program, and its warps. More than one warp only where D is wide enough to fill them."""
    num_warps = min(max_warps, next_power_of_2(max(1, D // 2048)))
    return min(next_power_of_2(D), _PER_LANE * lanes * num_warps), num_warps


def rows_in_flight(itemsize: int) -> int:
    """Rows that a lane loads at a time: 128 bytes, 32 registers, whatever the dtype."""
    return 128 // (_PER_LANE * max(2, itemsize))


def candidate_block(n_latents: int, k: int) -> int:
    """Latents per block of select_topk: the power of two nearest to sqrt(F / k).

    That leaves the fewest numbers to select from: F / b maxima, then k b candidates.
    """
    block = 1
    while block < 1024 and 2 * block * block * k <= n_latents:
        block *= 2
    return block


def tile_warps(elements: int, lanes: int) -> int:
    """As many warps as leave every lane at least eight elements, so that it can load 16 bytes at once."""
    return min(4, max(1, elements // (_PER_LANE * lanes)))


_WIDE = 64  # rows that the tensor cores of Hopper multiply at a time

# Of a row held in registers: up to here one launch over all of it is used, and beyond, block by block, up to this many.
ONE_PASS, WIDEST_ROW = 2048, 16384


def registers_warps(elements: int, lanes: int) -> int:
    """Warps that hold a row, 32 numbers per lane. Rows of one warp are counted without a barrier."""
    return min(16, max(1, elements // (32 * lanes)))


def swaps(blocks: "GemmBlocks", arch: Arch) -> bool:
    """Whether a product is computed transposed: where rows are too few for the instruction of Hopper and later GPUs."""
    return arch.lanes == 32 and arch.shared > 200_000 and blocks.rows < _WIDE <= blocks.columns


def gemm_blocks(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    arch: Arch,
    *,
    tf32: bool = False,
    in_parts: bool = False,
    inner_contiguous: bool = False,
) -> GemmBlocks:
    """Tile of a matrix product.

    Args:
        rows: Rows of the result.
        columns: Columns of the result.
        dtype: Dtype of the operands.
        arch: The GPU.
        tf32: Whether float32 is multiplied on tensor cores.
        in_parts: Whether float32 is multiplied as three products of TF32 parts.
        inner_contiguous: Whether both operands are contiguous along the summed dimension.
    """
    itemsize = max(2, dtype.itemsize)
    if itemsize > 2 and not tf32:
        # Plain fp32 runs outside the tensor cores and holds its operands in registers: larger tiles would spill.
        largest_rows, largest_columns, inner, threads = 64, 64, 16, 256
    elif in_parts:
        # The parts of both operands are in registers at once; only Hopper's tensor cores leave enough of those.
        largest_rows, largest_columns, inner, threads = 64, 128 if arch.shared > 200_000 else 64, 32, 128
    elif tf32 and not inner_contiguous:
        # Tensor cores need TF32 operands contiguous along the sum. An asynchronous copy that transposes moves four
        # bytes at a time; a plain load moves sixteen, and three small blocks per multiprocessor hide its latency.
        largest_rows, largest_columns, inner, threads = 64, 128, 32, 128
    else:
        largest_rows, largest_columns, inner, threads = 128, 128, 128 // itemsize, 256
    block_rows = min(largest_rows, max(16, next_power_of_2(rows)))
    block_columns = min(largest_columns, max(16, next_power_of_2(columns)))
    if block_rows * block_columns < largest_rows * largest_columns:
        threads = 128
    num_warps = max(4, threads // arch.lanes)  # one per scheduler of a multiprocessor
    # So many rows that every lane loads 16 bytes at once; fewer TF32 rows that are transposed spill on sm_80.
    fewest = max(16 * num_warps * arch.lanes // (inner * itemsize), 32 if tf32 and not inner_contiguous else 16)
    block_rows = max(block_rows, min(largest_rows, fewest))
    stage_bytes = (block_rows + block_columns) * inner * itemsize
    num_stages = 3 if arch.shared >= 3 * stage_bytes else 2
    return GemmBlocks(block_rows, block_columns, inner, num_warps, 1 if tf32 and not inner_contiguous else num_stages)
