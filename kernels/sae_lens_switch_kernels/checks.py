"""Checks of the arguments of the public functions: a ValueError names the argument, its value and what is expected."""

import torch
from torch import Tensor


def check_experts(expert_B: Tensor, x_BD: Tensor, n_experts: int) -> int:
    """The number of experts per token. Raises ValueError."""
    n_active = expert_B.shape[1] if expert_B.ndim == 2 else 1
    if expert_B.ndim not in (1, 2) or len(expert_B) != len(x_BD) or not 1 <= n_active <= n_experts:
        expected = f"({len(x_BD)},) or ({len(x_BD)}, n_active) with n_active from 1 to {n_experts}"
        raise ValueError(f"expert_B must have shape {expected}; got {tuple(expert_B.shape)}")
    check_integers("expert_B", expert_B)
    check_device("expert_B", expert_B, "x_BD", x_BD)
    return n_active


def check_vector(name: str, t: Tensor | None, length: int, W_FD: Tensor) -> None:
    if t is None:
        return
    if t.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},); got {tuple(t.shape)}")
    check_like(name, t, "W_enc_FD", W_FD)


def check_matrix(name: str, t: Tensor, rows: int | None = None, columns: int | None = None) -> None:
    fits = t.ndim == 2 and rows in (None, t.shape[0]) and columns in (None, t.shape[1])
    if not fits:
        expected = f"({'any' if rows is None else rows}, {'any' if columns is None else columns})"
        raise ValueError(f"{name} must have shape {expected}; got {tuple(t.shape)}")
    if not t.is_floating_point():
        raise ValueError(f"{name} must be floating point; got {t.dtype}")


def check_like(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.dtype != other.dtype:
        raise ValueError(f"{name} and {other_name} must share a dtype; got {t.dtype} and {other.dtype}")
    check_device(name, t, other_name, other)


def check_device(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.device != other.device:
        raise ValueError(f"{name} and {other_name} must share a device; got {t.device} and {other.device}")


def check_codes(values_BK: Tensor, indices_BK: Tensor) -> None:
    check_matrix("values_BK", values_BK)
    if values_BK.shape != indices_BK.shape:
        raise ValueError(
            f"values_BK and indices_BK must share a shape; got {tuple(values_BK.shape)} and {tuple(indices_BK.shape)}"
        )
    check_indices(indices_BK)
    check_device("indices_BK", indices_BK, "values_BK", values_BK)


def check_indices(indices_BK: Tensor, rows: int | None = None) -> None:
    if indices_BK.ndim != 2 or rows not in (None, len(indices_BK)):
        expected = f"({'any' if rows is None else rows}, any)"
        raise ValueError(f"indices_BK must have shape {expected}; got {tuple(indices_BK.shape)}")
    check_integers("indices_BK", indices_BK)


def check_integers(name: str, t: Tensor) -> None:
    if t.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64; got {t.dtype}")
