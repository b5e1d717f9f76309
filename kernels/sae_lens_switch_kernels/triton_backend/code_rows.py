"""Elementwise work on rows that are sorted by expert, each chain of it one launch.

Letters beside the package's: E1 stands for the offsets of E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.indexing import ExpertGroups
from sae_lens_switch_kernels.triton_backend.blocks import cdiv, next_power_of_2, row_block
from sae_lens_switch_kernels.triton_backend.launch import Traffic, arch_of, launch, load_row

_BLOCK = 1024  # codes per program


@triton.jit
def expert_of(row, offsets, E, BLOCK_E: tl.constexpr):
    """The expert of a sorted row: as many as end at or before it."""
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets + 1 + e, mask=e < E, other=0x7FFFFFFF).to(tl.int32)
    return tl.sum((ends <= row).to(tl.int32), 0)


@triton.jit
def _sorted_rows_kernel(
    t,  # [B, D]
    more,  # [B, D] or None, without the bias
    bias,  # [D] or None
    order,  # [B] or None
    out,  # [B, D]
    more_out,  # [B, D] or None
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = row
    if order is not None:
        b = tl.load(order + row).to(tl.int64)
    number = load_row(t + b * D + d, d < D).to(tl.float32)
    if bias is not None:
        number -= load_row(bias + d, d < D).to(tl.float32)
    tl.store(out + row * D + d, number.to(out.dtype.element_ty), mask=d < D)
    if more is not None:
        number = load_row(more + b * D + d, d < D)
        tl.store(more_out + row * D + d, number.to(more_out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["B"])
def _gated_codes_kernel(
    values,  # [B, K]
    indices,  # [B, K]
    gates,  # [B] or None
    order,  # [B]
    acts,  # [B, K], sorted
    values_out,  # [B, K]
    indices_out,  # [B, K]
    B,
    K,
    UNSORT: tl.constexpr,  # whether values and indices go from sorted to original rows, or the other way
    BLOCK: tl.constexpr,
):
    S = B.to(tl.int64) * K  # a multiple of 16 if K is, which makes loads wide
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(order + at // K, mask=at < S, other=0).to(tl.int64)
    away = b * K + at % K
    source, target = at, at
    if UNSORT:
        target = away
    else:
        source = away
    value = tl.load(values + source, mask=at < S, other=0.0)
    tl.store(values_out + target, value, mask=at < S)
    tl.store(indices_out + target, tl.load(indices + source, mask=at < S, other=0), mask=at < S)
    if gates is not None:
        gate = tl.load(gates + b, mask=at < S, other=0.0).to(acts.dtype.element_ty)
        act = value.to(tl.float32) * gate.to(tl.float32)
        tl.store(acts + at, act.to(acts.dtype.element_ty), mask=at < S)


@triton.jit(do_not_specialize=["B"])
def _code_grads_kernel(
    values,  # [B, K], sorted
    d_acts,  # [B, K], sorted
    gates,  # [B] or None
    grad_values,  # [B, K] or None
    order,  # [B] or None
    d_pre,  # [B, K], sorted
    d_gates,  # [B] or None
    B,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK_K)
    inside = (row < B)[:, None] & (j < K)[None, :]
    b = row
    if order is not None:
        b = tl.load(order + row, mask=row < B, other=0).to(tl.int64)
    at = row[:, None] * K + j[None, :]
    value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(d_acts + at, mask=inside, other=0.0).to(tl.float32)
    if gates is not None:
        tl.store(d_gates + b, tl.sum(slope * value, 1).to(d_gates.dtype.element_ty), mask=row < B)
        slope *= tl.load(gates + b, mask=row < B, other=0.0).to(tl.float32)[:, None]
    if grad_values is not None:
        slope += tl.load(grad_values + b[:, None] * K + j[None, :], mask=inside, other=0.0).to(tl.float32)
    slope *= (value != 0).to(tl.float32)
    tl.store(d_pre + at, slope.to(d_pre.dtype.element_ty), mask=inside)


@triton.jit
def _dense_rows_kernel(
    values,  # [B, K]
    more,  # [B, K] or None
    indices,  # [B, K]
    offsets,  # [E + 1]
    dense,  # [B, M]
    more_dense,  # [B, M] or None
    E,
    K,
    M,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = expert_of(row, offsets, E, BLOCK_E) * M
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        nothing = tl.zeros([BLOCK_M], dense.dtype.element_ty)
        tl.store(dense + row * M + m, nothing, mask=m < M)
        if more is not None:
            tl.store(more_dense + row * M + m, nothing, mask=m < M)
    tl.debug_barrier()  # the zeros of other threads must not overwrite what follows
    for start in range(0, K, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        m = tl.load(indices + row * K + j, mask=j < K, other=0) - first
        value = tl.load(values + row * K + j, mask=j < K, other=0.0)
        tl.store(dense + row * M + m, value.to(dense.dtype.element_ty), mask=j < K)
        if more is not None:
            value = tl.load(more + row * K + j, mask=j < K, other=0.0)
            tl.store(more_dense + row * M + m, value.to(dense.dtype.element_ty), mask=j < K)


@triton.jit
def _take_in_rows_kernel(
    dense,  # [B, M]
    indices,  # [B, K]
    offsets,  # [E + 1]
    out,  # [B, K]
    E,
    K,
    M,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = expert_of(row, offsets, E, BLOCK_E) * M
    for start in range(0, K, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        m = tl.load(indices + row * K + j, mask=j < K, other=0) - first
        value = tl.load(dense + row * M + m, mask=j < K, other=0.0)
        tl.store(out + row * K + j, value.to(out.dtype.element_ty), mask=j < K)


def sorted_rows(t_BD: Tensor, bias_D: Tensor | None, groups: ExpertGroups, dtype: torch.dtype) -> Tensor:
    """t - bias, rows sorted by expert, in ``dtype``; t itself where that changes nothing."""
    if bias_D is None and groups.order_B is None:
        return t_BD.to(dtype)
    out_BD = torch.empty(t_BD.shape, dtype=dtype, device=t_BD.device)
    _sort_rows(t_BD, None, bias_D, groups, out_BD, None)
    return out_BD


def sorted_row_pair(
    t_BD: Tensor, x_BD: Tensor, bias_D: Tensor | None, groups: ExpertGroups, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """t and x - bias, rows of both sorted by expert, in ``dtype``; in one launch if they are as wide as each other."""
    if t_BD.shape != x_BD.shape:
        return sorted_rows(t_BD, None, groups, dtype), sorted_rows(x_BD, bias_D, groups, dtype)
    t_out_BD, x_out_BD = (torch.empty(x_BD.shape, dtype=dtype, device=x_BD.device) for _ in range(2))
    _sort_rows(x_BD, t_BD, bias_D, groups, x_out_BD, t_out_BD)
    return t_out_BD, x_out_BD


def _sort_rows(
    t_BD: Tensor,
    more_BD: Tensor | None,
    bias_D: Tensor | None,
    groups: ExpertGroups,
    out_BD: Tensor,
    more_out_BD: Tensor | None,
) -> None:
    B, D = t_BD.shape
    BLOCK_D, num_warps = row_block(D, arch_of(t_BD.device).lanes, max_warps=4)
    tensors = {"t": t_BD.contiguous(), "more": _contiguous(more_BD), "bias": _contiguous(bias_D)}
    tensors |= {"order": groups.order_B, "out": out_BD, "more_out": more_out_BD}
    launch(_sorted_rows_kernel, (B, cdiv(D, BLOCK_D)), num_warps, **tensors, D=D, BLOCK_D=BLOCK_D)


def sorted_codes(
    values_BK: Tensor, indices_BK: Tensor, gates_B: Tensor | None, groups: ExpertGroups
) -> tuple[Tensor, Tensor, Tensor]:
    """values * gate, values and indices, rows sorted by expert."""
    return _gated_codes(values_BK, indices_BK, gates_B, groups, unsort=False)


def unsorted_codes(
    values_BK: Tensor, indices_BK: Tensor, gates_B: Tensor | None, groups: ExpertGroups
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows sorted by expert: values * gate, still sorted; them, values and indices in the order of the tokens."""
    sorted_acts_BK, values_BK, indices_BK = _gated_codes(values_BK, indices_BK, gates_B, groups, unsort=True)
    acts_BK = values_BK if gates_B is None else values_BK * gates_B.unsqueeze(1).to(values_BK.dtype)
    return sorted_acts_BK, acts_BK, values_BK, indices_BK


def _gated_codes(
    values_BK: Tensor, indices_BK: Tensor, gates_B: Tensor | None, groups: ExpertGroups, unsort: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if groups.order_B is None:
        acts_BK = values_BK if gates_B is None else values_BK * gates_B.unsqueeze(1).to(values_BK.dtype)
        return acts_BK, values_BK, indices_BK
    values_out_BK, indices_out_BK = torch.empty_like(values_BK), torch.empty_like(indices_BK)
    acts_BK = None if gates_B is None else torch.empty_like(values_BK)
    launch(
        _gated_codes_kernel,
        (cdiv(values_BK.numel(), _BLOCK),),
        4,
        values=values_BK.contiguous(),
        indices=indices_BK.contiguous(),
        gates=_contiguous(gates_B),
        order=groups.order_B,
        acts=acts_BK,
        values_out=values_out_BK,
        indices_out=indices_out_BK,
        B=len(values_BK),
        K=max(1, values_BK.shape[1]),
        UNSORT=unsort,
        BLOCK=_BLOCK,
    )
    if acts_BK is None:
        acts_BK = values_BK if unsort else values_out_BK
    return acts_BK, values_out_BK, indices_out_BK


def code_grads(
    values_BK: Tensor,
    d_acts_BK: Tensor,
    gates_B: Tensor | None,
    grad_values_BK: Tensor | None,
    groups: ExpertGroups,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of pre-activations, sorted, and of gates, in the order of the tokens; as torch_codes."""
    B, K = values_BK.shape
    d_pre_BK = torch.empty_like(values_BK)
    d_gates_B = None if gates_B is None else gates_B.new_empty(B)
    BLOCK_K = next_power_of_2(max(1, K))
    ROWS = max(1, _BLOCK // BLOCK_K)
    launch(
        _code_grads_kernel,
        (cdiv(B, ROWS),),
        4,
        values=values_BK.contiguous(),
        d_acts=d_acts_BK.contiguous(),
        gates=_contiguous(gates_B),
        grad_values=_contiguous(grad_values_BK),
        order=groups.order_B,
        d_pre=d_pre_BK,
        d_gates=d_gates_B,
        B=B,
        K=K,
        ROWS=ROWS,
        BLOCK_K=BLOCK_K,
    )
    return d_pre_BK, d_gates_B


def dense_rows(
    values_BK: Tensor,
    indices_BK: Tensor,
    n_latents: int,
    offsets_E1: Tensor,
    dtype: torch.dtype,
    more_BK: Tensor | None = None,
) -> list[Tensor]:
    """[B, M]: each row's codes among the latents of its own expert, distinct in a row; of one or two values."""
    B, K = values_BK.shape
    E = len(offsets_E1) - 1
    M = n_latents // E
    out = [values_BK.new_empty(B, M, dtype=dtype) for _ in range(1 if more_BK is None else 2)]
    launch(
        _dense_rows_kernel,
        (B,),
        1 if M <= _BLOCK else 4,
        values=values_BK.contiguous(),
        more=_contiguous(more_BK),
        indices=indices_BK.contiguous(),
        offsets=offsets_E1,
        dense=out[0],
        more_dense=out[1] if more_BK is not None else None,
        E=E,
        K=K,
        M=M,
        BLOCK_E=next_power_of_2(E),
        BLOCK_K=min(_BLOCK, next_power_of_2(max(1, K))),
        BLOCK_M=min(_BLOCK, next_power_of_2(M)),
    )
    return out


def take_in_rows(dense_BM: Tensor, indices_BK: Tensor, offsets_E1: Tensor, dtype: torch.dtype) -> Tensor:
    """What rows of their own expert's latents hold at these latents, [B, K]."""
    B, K = indices_BK.shape
    E = len(offsets_E1) - 1
    out_BK = dense_BM.new_empty(B, K, dtype=dtype)
    sizes = {"E": E, "K": K, "M": dense_BM.shape[1], "BLOCK_E": next_power_of_2(E)}
    tensors = {"dense": dense_BM, "indices": indices_BK.contiguous(), "offsets": offsets_E1, "out": out_BK}
    launch(_take_in_rows_kernel, (B,), 1, **tensors, **sizes, BLOCK_K=min(_BLOCK, next_power_of_2(max(1, K))))
    return out_BK


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def sorted_rows_traffic(B: int, D: int, itemsize: int, out_itemsize: int) -> Traffic:
    return Traffic(flops=B * D, streamed=B * D * (itemsize + out_itemsize) + 8 * B + D * itemsize)


def codes_traffic(B: int, K: int, itemsize: int) -> Traffic:
    """Of sorted_codes and unsorted_codes: values and indices read and written, values written once more."""
    return Traffic(flops=B * K, streamed=B * K * (3 * itemsize + 16) + (8 + itemsize) * B)


def code_grads_traffic(B: int, K: int, itemsize: int) -> Traffic:
    """With gates, without a gradient of the values themselves."""
    return Traffic(flops=4 * B * K, streamed=3 * B * K * itemsize + (8 + 2 * itemsize) * B)


def dense_rows_traffic(B: int, K: int, M: int, itemsize: int, out_itemsize: int, outputs: int = 1) -> Traffic:
    return Traffic(flops=0, streamed=B * K * (outputs * (itemsize + out_itemsize) + 8) + outputs * B * M * out_itemsize)


def take_in_rows_traffic(B: int, K: int, itemsize: int, out_itemsize: int) -> Traffic:
    return Traffic(flops=0, streamed=B * K * (8 + out_itemsize), gathered=B * K * itemsize, pool=B * K * itemsize)
