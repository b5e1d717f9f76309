"""codes_above: what exceeds its threshold in a tile of pre-activations, in two launches.

The first counts each row's, so that a prefix sum gives every row its place in the result; the second reads the tile
again and writes them there. In between, the host waits to learn how many there are.

Letters: R rows of P latents, a tile; S codes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from sae_lens_switch_kernels.triton_backend.launch import Traffic, arch_of, launch, load_row

_PER_LANE, _WARPS = 8, 4  # numbers of one row at a time: of 16 bits, 16 bytes


@triton.jit
def _compare(pre, thresholds, bias, gate, columns, P):
    """Values, and 1 for those that exceed their threshold. Whatever is not a number exceeds everything."""
    inside = columns < P
    threshold = tl.load(thresholds + columns, mask=inside, other=0.0)
    value = load_row(pre + columns, inside).to(threshold.dtype)
    if bias is not None:
        shift = tl.load(bias + columns, mask=inside, other=0.0)
        value = (value.to(tl.float32) + shift.to(tl.float32)).to(threshold.dtype)
    gated = (value.to(tl.float32) * gate).to(threshold.dtype)
    return value, tl.where(gated.to(tl.float32) <= threshold.to(tl.float32), 0, inside.to(tl.int32))


@triton.jit
def _gate_of(row, gates, thresholds):
    return 1.0 if gates is None else tl.load(gates + row).to(thresholds.dtype.element_ty).to(tl.float32)


@triton.jit
def _count_above_kernel(
    pre,  # [R, P], rows `stride` apart
    thresholds,  # [P]
    bias,  # [P] or None
    gates,  # [R] or None
    counts,  # [R]
    stride,
    P,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gate = _gate_of(row, gates, thresholds)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, P, BLOCK):
        _value, above = _compare(pre + row * stride, thresholds, bias, gate, start + tl.arange(0, BLOCK), P)
        count += above
    tl.store(counts + row, tl.sum(count, 0).to(tl.int64))


@triton.jit
def _write_above_kernel(
    pre,
    thresholds,
    bias,
    gates,
    offsets,  # [R + 1]
    rows,  # [S]
    latents,  # [S]
    values,  # [S]
    stride,
    P,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gate = _gate_of(row, gates, thresholds)
    place = tl.load(offsets + row)
    for start in range(0, P, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value, above = _compare(pre + row * stride, thresholds, bias, gate, columns, P)
        to = place + tl.cumsum(above, 0) - 1
        tl.store(rows + to, tl.zeros([BLOCK], tl.int64) + row, mask=above != 0)
        tl.store(latents + to, columns.to(tl.int64), mask=above != 0)
        tl.store(values + to, value, mask=above != 0)
        place += tl.sum(above, 0)


def codes_above(
    pre_RP: Tensor, threshold_P: Tensor, bias_P: Tensor | None, gates_R1: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As torch_codes's; pre is left as it is."""
    offsets_R1 = functional.pad(count_above(pre_RP, threshold_P, bias_P, gates_R1).cumsum(0), (1, 0))
    return write_above(pre_RP, threshold_P, bias_P, gates_R1, offsets_R1, int(offsets_R1[-1]))


def count_above(pre_RP: Tensor, threshold_P: Tensor, bias_P: Tensor | None, gates_R1: Tensor | None) -> Tensor:
    """How many of each row, int64."""
    counts_R = torch.empty(len(pre_RP), dtype=torch.int64, device=pre_RP.device)
    launch(
        _count_above_kernel,
        (len(pre_RP),),
        _WARPS,
        counts=counts_R,
        **_given(pre_RP, threshold_P, bias_P, gates_R1),
    )
    return counts_R


def write_above(
    pre_RP: Tensor,
    threshold_P: Tensor,
    bias_P: Tensor | None,
    gates_R1: Tensor | None,
    offsets_R1: Tensor,
    n_codes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, latent and value of each, [S], where ``offsets_R1`` says."""
    # Not as two rows of one tensor, the second of which is aligned for an even number of codes only.
    row_S, latent_S = (torch.empty(n_codes, dtype=torch.int64, device=pre_RP.device) for _ in range(2))
    values_S = threshold_P.new_empty(n_codes)
    launch(
        _write_above_kernel,
        (len(pre_RP),),
        _WARPS,
        offsets=offsets_R1,
        rows=row_S,
        latents=latent_S,
        values=values_S,
        **_given(pre_RP, threshold_P, bias_P, gates_R1),
    )
    return row_S, latent_S, values_S


def _given(pre_RP: Tensor, threshold_P: Tensor, bias_P: Tensor | None, gates_R1: Tensor | None) -> dict[str, Any]:
    pre_RP = pre_RP if pre_RP.stride(1) == 1 else pre_RP.contiguous()
    return {
        "pre": pre_RP,
        "thresholds": threshold_P.contiguous(),
        "bias": None if bias_P is None else bias_P.contiguous(),
        "gates": None if gates_R1 is None else gates_R1.contiguous(),
        "stride": pre_RP.stride(0),
        "P": pre_RP.shape[1],
        "BLOCK": _PER_LANE * _WARPS * arch_of(pre_RP.device).lanes,
    }


def codes_above_traffic(R: int, P: int, S: int, itemsize: int, vectors: int = 1) -> Traffic:
    """Both launches, with ``vectors`` of thresholds and bias."""
    return Traffic(
        flops=4 * R * P,
        streamed=2 * R * P * itemsize + S * (8 + 8 + itemsize) + R * 16,
        gathered=2 * vectors * R * P * itemsize,
        pool=vectors * P * itemsize,
    )
