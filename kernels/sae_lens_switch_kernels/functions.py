"""The public functions and their gradients, written once above every backend.

Forward and backward name the same primitives; which form of a primitive runs follows the tensor's device.
Gradients of gradients are refused by torch (`once_differentiable`), never wrong.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_lens_switch_kernels import torch_ops as ops


def sparse_decode(values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """x[b] = sum_j values[b, j] W_dec[indices[b, j]], shape [B, D]: DenseSparseMatmul (Gao et al. 2024, D.2).

    Differentiable in values and W_dec. Equals ``f @ W_dec`` for the dense [B, F] ``f`` that is zero elsewhere;
    an index that occurs twice in a row counts twice.
    Raises ValueError for mismatched shapes, dtypes or devices, and for indices outside [0, F).
    """
    _check_matrix("W_dec_FD", W_dec_FD)
    _check_codes(values_BK, indices_BK, len(W_dec_FD))
    _check_like("values_BK", values_BK, "W_dec_FD", W_dec_FD)
    return _SparseDecode.apply(values_BK, indices_BK, W_dec_FD)  # type: ignore[no-any-return]


def matmul_at_indices(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    """<g[b], W[indices[b, j]]>, shape [B, K]: MatmulAtSparseIndices (Gao et al. 2024, D.2). Not differentiable."""
    _check_matrix("g_BD", g_BD)
    _check_matrix("W_FD", W_FD, columns=g_BD.shape[1])
    _check_indices(indices_BK, len(W_FD), rows=len(g_BD))
    _check_like("g_BD", g_BD, "W_FD", W_FD)
    _check_device("indices_BK", indices_BK, "W_FD", W_FD)
    with torch.no_grad():
        return ops.matmul_at_indices(g_BD, W_FD, indices_BK)


def latent_weight_grad(values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_latents: int) -> Tensor:
    """f^T g, shape [F, D], for the [B, F] ``f`` that (values, indices) stands for: DenseSparseMatmul, transposed.

    Row f is the sum of values[b, j] g[b] over all (b, j) with indices[b, j] = f, in the order of the tokens.
    Not differentiable.
    """
    _check_codes(values_BK, indices_BK, n_latents)
    _check_matrix("g_BD", g_BD, rows=len(values_BK))
    _check_like("values_BK", values_BK, "g_BD", g_BD)
    with torch.no_grad():
        return ops.latent_weight_grad(values_BK, indices_BK, g_BD, n_latents)


def topk_encode(x_BD: Tensor, W_enc_FD: Tensor, k: int, *, pre_bias_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """values [B, K] and indices [B, K] of relu(TopK_k((x - pre_bias) W_enc^T)). One expert that owns every latent.

    Differentiable in x, W_enc and pre_bias, through the selected latents only.
    """
    everyone = torch.zeros(len(x_BD), dtype=torch.long, device=x_BD.device)
    return switch_encode(x_BD, everyone, W_enc_FD, k, 1, pre_bias_D=pre_bias_D)


def switch_encode(
    x_BD: Tensor,
    expert_B: Tensor,
    W_enc_FD: Tensor,
    k: int,
    n_experts: int,
    *,
    pre_bias_D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """values [B, K] and indices [B, K] of TopK_k(relu((x - pre_bias) W_e^T)), e = expert[b].

    W_e is rows ``e * M : (e + 1) * M`` of W_enc; indices count over all F latents, distinct in a row, in no
    particular order. Only the chosen block is computed: 2BDM flops, never a [B, F] tensor.
    Differentiable in x, W_enc and pre_bias, through the selected positive latents only. Under autocast the
    matrix product runs in the autocast dtype and the rest in the dtype of W_enc.
    Raises ValueError for mismatched shapes, dtypes or devices, F not a multiple of n_experts, k > M, and
    experts outside [0, n_experts).
    """
    _check_matrix("x_BD", x_BD)
    _check_matrix("W_enc_FD", W_enc_FD, columns=x_BD.shape[1])
    _check_like("x_BD", x_BD, "W_enc_FD", W_enc_FD)
    F = len(W_enc_FD)
    if n_experts < 1 or F % n_experts:
        raise ValueError(f"n_experts must divide the number of latents; got n_experts={n_experts}, F={F}")
    if not 1 <= k <= F // n_experts:
        raise ValueError(f"k must be between 1 and F / n_experts = {F // n_experts}; got k={k}")
    if expert_B.shape != x_BD.shape[:1]:
        raise ValueError(f"expert_B must have shape ({len(x_BD)},); got {tuple(expert_B.shape)}")
    _check_range("expert_B", expert_B, n_experts)
    _check_device("expert_B", expert_B, "x_BD", x_BD)
    if pre_bias_D is not None:
        if pre_bias_D.shape != x_BD.shape[1:]:
            raise ValueError(f"pre_bias_D must have shape ({x_BD.shape[1]},); got {tuple(pre_bias_D.shape)}")
        _check_like("pre_bias_D", pre_bias_D, "W_enc_FD", W_enc_FD)
    return _SwitchEncode.apply(x_BD, pre_bias_D, expert_B, W_enc_FD, k, n_experts)  # type: ignore[no-any-return]


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor) -> Tensor:
        ctx.save_for_backward(values_BK, indices_BK, W_FD)
        return ops.sparse_decode(values_BK, indices_BK, W_FD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_BD,) = grad_outputs
        values_BK, indices_BK, W_FD = ctx.saved_tensors
        grad_BD = grad_BD.contiguous()
        d_values_BK = d_W_FD = None
        if ctx.needs_input_grad[0]:
            d_values_BK = ops.matmul_at_indices(grad_BD, W_FD, indices_BK)
        if ctx.needs_input_grad[2]:
            d_W_FD = ops.latent_weight_grad(values_BK, indices_BK, grad_BD, len(W_FD))
        return d_values_BK, None, d_W_FD


class _SwitchEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        pre_bias_D: Tensor | None,
        expert_B: Tensor,
        W_FD: Tensor,
        k: int,
        n_experts: int,
    ) -> tuple[Tensor, Tensor]:
        device_type = x_BD.device.type
        matmul_dtype = W_FD.dtype
        if torch.is_autocast_enabled(device_type) and W_FD.dtype != torch.float64:
            matmul_dtype = torch.get_autocast_dtype(device_type)
        centered_BD = x_BD if pre_bias_D is None else x_BD - pre_bias_D
        with torch.autocast(device_type, enabled=False):
            values_BK, indices_BK = ops.switch_topk(centered_BD, expert_B, W_FD, k, n_experts, matmul_dtype)
        ctx.save_for_backward(centered_BD, W_FD, values_BK, indices_BK)
        ctx.mark_non_differentiable(indices_BK)
        return values_BK, indices_BK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_values_BK = grad_outputs[0]
        centered_BD, W_FD, values_BK, indices_BK = ctx.saved_tensors
        # ReLU comes before top-k: a token with fewer than k positive latents carries zeros, and no gradient.
        d_pre_BK = grad_values_BK * (values_BK > 0)
        d_x_BD = d_bias_D = d_W_FD = None
        if ctx.needs_input_grad[0]:
            d_x_BD = ops.sparse_decode(d_pre_BK, indices_BK, W_FD)
        if ctx.needs_input_grad[1]:
            # b is shared by all tokens, so its gradient needs the batch sum only: one mat-vec.
            d_bias_D = -ops.summed_decode(d_pre_BK, indices_BK, W_FD) if d_x_BD is None else -d_x_BD.sum(0)
        if ctx.needs_input_grad[3]:
            d_W_FD = ops.latent_weight_grad(d_pre_BK, indices_BK, centered_BD, len(W_FD))
        return d_x_BD, d_bias_D, None, d_W_FD, None, None


def _check_matrix(name: str, t: Tensor, rows: int | None = None, columns: int | None = None) -> None:
    fits = t.ndim == 2 and rows in (None, t.shape[0]) and columns in (None, t.shape[1])
    if not fits:
        expected = f"({'any' if rows is None else rows}, {'any' if columns is None else columns})"
        raise ValueError(f"{name} must have shape {expected}; got {tuple(t.shape)}")
    if not t.is_floating_point():
        raise ValueError(f"{name} must be floating point; got {t.dtype}")


def _check_like(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.dtype != other.dtype:
        raise ValueError(f"{name} and {other_name} must share a dtype; got {t.dtype} and {other.dtype}")
    _check_device(name, t, other_name, other)


def _check_device(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.device != other.device:
        raise ValueError(f"{name} and {other_name} must share a device; got {t.device} and {other.device}")


def _check_codes(values_BK: Tensor, indices_BK: Tensor, n_latents: int) -> None:
    _check_matrix("values_BK", values_BK)
    if values_BK.shape != indices_BK.shape:
        raise ValueError(
            f"values_BK and indices_BK must share a shape; got {tuple(values_BK.shape)} and {tuple(indices_BK.shape)}"
        )
    _check_indices(indices_BK, n_latents)
    _check_device("indices_BK", indices_BK, "values_BK", values_BK)


def _check_indices(indices_BK: Tensor, n_latents: int, rows: int | None = None) -> None:
    if indices_BK.ndim != 2 or rows not in (None, len(indices_BK)):
        expected = f"({'any' if rows is None else rows}, any)"
        raise ValueError(f"indices_BK must have shape {expected}; got {tuple(indices_BK.shape)}")
    _check_range("indices_BK", indices_BK, n_latents)


def _check_range(name: str, t: Tensor, end: int) -> None:
    if t.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64; got {t.dtype}")
    # Reading a value back from a GPU would stall it every call: there, an index out of range is an assert
    # inside torch's own indexing instead.
    if t.device.type == "cpu" and t.numel():
        low, high = (int(v) for v in t.aminmax())
        if low < 0 or high >= end:
            raise ValueError(f"{name} must lie in [0, {end}); got values from {low} to {high}")
