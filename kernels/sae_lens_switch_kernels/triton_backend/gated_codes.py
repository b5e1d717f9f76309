"""Codes among all latents of their own expert, on the way to a dense product and back, each way in one launch.

Forward, what top-k has chosen is gated, laid out densely for the decoder, and put back in the order of the tokens.
Backward, the products of a token's gradient with all decoder rows of its expert become its gradients: those at the
chosen latents pass gate and ReLU, and are laid out densely for both weight gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.indexing import ExpertGroups
from sae_lens_switch_kernels.triton_backend.blocks import next_power_of_2
from sae_lens_switch_kernels.triton_backend.code_rows import expert_of
from sae_lens_switch_kernels.triton_backend.launch import Traffic, launch

_BLOCK = 1024  # numbers of a row at a time


@triton.jit
def _token_of(order, row):
    return row if order is None else tl.load(order + row).to(tl.int64)


@triton.jit
def _zero_row(dense, row, M, BLOCK_M: tl.constexpr):
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        tl.store(dense + row * M + m, tl.zeros([BLOCK_M], dense.dtype.element_ty), mask=m < M)


@triton.jit
def _gated_rows_kernel(
    values,  # [B, K], sorted, as are indices
    indices,  # [B, K]
    gates,  # [B] or None
    order,  # [B] or None
    offsets,  # [E + 1]
    dense,  # [B, M], sorted
    acts,  # [B, K] or None
    values_out,  # [B, K]
    indices_out,  # [B, K]
    E,
    K,
    M,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = expert_of(row, offsets, E, BLOCK_E) * M
    b = _token_of(order, row)
    gate = 1.0
    if gates is not None:
        gate = tl.load(gates + b).to(values.dtype.element_ty).to(tl.float32)
    _zero_row(dense, row, M, BLOCK_M)
    tl.debug_barrier()  # the zeros of other threads must not overwrite what follows
    for start in range(0, K, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        latent = tl.load(indices + row * K + j, mask=j < K, other=0)
        value = tl.load(values + row * K + j, mask=j < K, other=0.0)
        act = (value.to(tl.float32) * gate).to(values.dtype.element_ty)
        tl.store(dense + row * M + (latent - first), act.to(dense.dtype.element_ty), mask=j < K)
        tl.store(values_out + b * K + j, value, mask=j < K)
        tl.store(indices_out + b * K + j, latent, mask=j < K)
        if acts is not None:
            tl.store(acts + b * K + j, act, mask=j < K)


@triton.jit
def _gated_row_grads_kernel(
    values,  # [B, K], in the order of the tokens, as are indices and grad_values
    indices,  # [B, K]
    gates,  # [B] or None
    grad_values,  # [B, K] or None
    order,  # [B] or None
    offsets,  # [E + 1]
    dots,  # [B, M], sorted
    dense,  # [B, M], sorted
    d_pre,  # [B, M], sorted
    d_gates,  # [B] or None
    E,
    K,
    M,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = expert_of(row, offsets, E, BLOCK_E) * M
    b = _token_of(order, row)
    gate = 1.0
    if gates is not None:
        gate = tl.load(gates + b).to(tl.float32)
    _zero_row(dense, row, M, BLOCK_M)
    _zero_row(d_pre, row, M, BLOCK_M)
    tl.debug_barrier()  # the zeros of other threads must not overwrite what follows
    d_gate = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        m = tl.load(indices + b * K + j, mask=j < K, other=0) - first
        value = tl.load(values + b * K + j, mask=j < K, other=0.0).to(tl.float32)
        slope = tl.load(dots + row * M + m, mask=j < K, other=0.0).to(tl.float32)
        d_gate += slope * value
        slope *= gate
        if grad_values is not None:
            slope += tl.load(grad_values + b * K + j, mask=j < K, other=0.0).to(tl.float32)
        slope *= (value > 0).to(tl.float32)
        tl.store(dense + row * M + m, (value * gate).to(dense.dtype.element_ty), mask=j < K)
        tl.store(d_pre + row * M + m, slope.to(d_pre.dtype.element_ty), mask=j < K)
    if d_gates is not None:
        tl.store(d_gates + b, tl.sum(d_gate, 0).to(d_gates.dtype.element_ty))


def gated_rows(
    values_BK: Tensor,
    indices_BK: Tensor,
    gates_B: Tensor | None,
    n_latents: int,
    groups: ExpertGroups,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values * gate, dense [B, M] in ``dtype`` and sorted; them, values and indices in the order of the tokens."""
    dense_BM = values_BK.new_empty(len(values_BK), n_latents // (len(groups.offsets_E1) - 1), dtype=dtype)
    values_out_BK, indices_out_BK = torch.empty_like(values_BK), torch.empty_like(indices_BK)
    acts_BK = None if gates_B is None else torch.empty_like(values_BK)
    _launch(
        _gated_rows_kernel,
        groups,
        values=values_BK.contiguous(),
        indices=indices_BK.contiguous(),
        gates=None if gates_B is None else gates_B.contiguous(),
        dense=dense_BM,
        acts=acts_BK,
        values_out=values_out_BK,
        indices_out=indices_out_BK,
    )
    return dense_BM, values_out_BK if acts_BK is None else acts_BK, values_out_BK, indices_out_BK


def gated_row_grads(
    values_BK: Tensor,
    indices_BK: Tensor,
    gates_B: Tensor | None,
    grad_values_BK: Tensor | None,
    dots_BM: Tensor,
    groups: ExpertGroups,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """values * gate and the gradient of the pre-activations, dense like ``dots`` and sorted; and that of the gates."""
    dense_BM, d_pre_BM = torch.empty_like(dots_BM), torch.empty_like(dots_BM)
    d_gates_B = None if gates_B is None else gates_B.new_empty(len(gates_B))
    _launch(
        _gated_row_grads_kernel,
        groups,
        values=values_BK.contiguous(),
        indices=indices_BK.contiguous(),
        gates=None if gates_B is None else gates_B.contiguous(),
        grad_values=None if grad_values_BK is None else grad_values_BK.contiguous(),
        dots=dots_BM,
        dense=dense_BM,
        d_pre=d_pre_BM,
        d_gates=d_gates_B,
    )
    return dense_BM, d_pre_BM, d_gates_B


def _launch(kernel: object, groups: ExpertGroups, **tensors: Tensor | None) -> None:
    """One program per sorted row."""
    values_BK, dense_BM = tensors["values"], tensors["dense"]
    assert values_BK is not None
    assert dense_BM is not None
    (B, K), M, E = values_BK.shape, dense_BM.shape[1], len(groups.offsets_E1) - 1
    sizes = {"E": E, "K": K, "M": M, "BLOCK_E": next_power_of_2(E)}
    sizes |= {"BLOCK_K": min(_BLOCK, next_power_of_2(max(1, K))), "BLOCK_M": min(_BLOCK, next_power_of_2(M))}
    warps = 1 if M <= _BLOCK else 4
    launch(kernel, (B,), warps, **tensors, order=groups.order_B, offsets=groups.offsets_E1, **sizes)


def gated_rows_traffic(B: int, K: int, M: int, itemsize: int, dense_itemsize: int) -> Traffic:
    """Values and indices read and written, gated values written once more, and the dense rows."""
    return Traffic(flops=B * K, streamed=B * K * (3 * itemsize + 16 + dense_itemsize) + B * M * dense_itemsize)


def gated_row_grads_traffic(B: int, K: int, M: int, itemsize: int, dense_itemsize: int) -> Traffic:
    return Traffic(flops=4 * B * K, streamed=B * K * (itemsize + 8 + 3 * dense_itemsize) + 2 * B * M * dense_itemsize)
