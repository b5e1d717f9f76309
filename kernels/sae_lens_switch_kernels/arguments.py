"""Checks of the public functions' arguments: each raises ValueError with its name, its value and what it must be.

Values of indices are checked by the operators, where they are read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_lens_switch_kernels.candidates import EncoderPrecision, with_candidates
from sae_lens_switch_kernels.inputs import EncoderInputs, check_ends


def checked(inputs: EncoderInputs, encoder_precision: EncoderPrecision) -> EncoderInputs:
    """The inputs with the dtypes of the matrix products: autocast's where it is enabled. Raises ValueError."""
    x_BD, W_FD, k, n_experts, expert_B = inputs.x_BD, inputs.W_enc_FD, inputs.k, inputs.n_experts, inputs.expert_B
    check_matrix("x_BD", x_BD)
    check_matrix("W_enc_FD", W_FD, columns=x_BD.shape[1])
    check_like("x_BD", x_BD, "W_enc_FD", W_FD)
    F, n_shared = len(W_FD), inputs.n_shared
    if not 0 <= n_shared < max(F, 1):
        raise ValueError(f"n_shared must be at least 0 and less than the number of latents; got {n_shared}, F={F}")
    if n_experts < 1 or (F - n_shared) % n_experts:
        of = "" if n_shared == 0 else f" beside the {n_shared} shared ones"
        raise ValueError(f"n_experts must divide the number of latents{of}; got n_experts={n_experts}, F={F}")
    n_active = 1
    if expert_B is not None:
        n_active = check_experts(expert_B, x_BD, n_experts)
        if n_active == 1:  # a token with one expert and shared latents chooses from two, as one with two experts
            shape = (-1, 1) if n_shared or inputs.over_batch else (-1,)
            gates_B = inputs.gates_B
            if gates_B is not None and gates_B.shape == expert_B.shape:
                gates_B = gates_B.reshape(shape)
            inputs = inputs._replace(expert_B=expert_B.reshape(shape), gates_B=gates_B)
    elif n_experts != 1 or n_shared:
        raise ValueError(f"expert_B must be given for n_experts={n_experts}, n_shared={n_shared}")
    if inputs.by_magnitude and (inputs.over_batch or expert_B is not None):
        raise ValueError("by_magnitude must be False with over_batch or expert_B; got True")
    most = n_active * inputs.blocks.width + n_shared
    if inputs.over_batch:
        check_over_batch(inputs)
    elif not 1 <= k <= most:
        F_E = "F / n_experts" if n_shared == 0 else "(F - n_shared) / n_experts + n_shared"
        raise ValueError(f"k must be between 1 and {'' if n_active == 1 else f'{n_active} '}{F_E} = {most}; got k={k}")
    if inputs.gates_B is not None:
        expected = x_BD.shape[:1] if inputs.expert_B is None else inputs.expert_B.shape
        if inputs.gates_B.shape != expected:
            raise ValueError(f"gates_B must have shape {tuple(expected)}; got {tuple(inputs.gates_B.shape)}")
        check_device("gates_B", inputs.gates_B, "W_enc_FD", W_FD)
    check_vector("pre_bias_D", inputs.pre_bias_D, x_BD.shape[1], W_FD)
    check_vector("bias_F", inputs.bias_F, F, W_FD)
    if inputs.scale_F is not None and (n_active > 1 or n_shared):
        what = f"n_active={n_active}, n_shared={n_shared}"  # of which each has its own best, ranked by gates alone
        raise ValueError(f"scale_F must be None with several experts per token or shared latents; got it with {what}")
    check_vector("scale_F", inputs.scale_F, F, W_FD)
    device_type = x_BD.device.type
    if torch.is_autocast_enabled(device_type) and W_FD.dtype != torch.float64:
        inputs = inputs._replace(dtype=torch.get_autocast_dtype(device_type))
    return with_candidates(inputs, encoder_precision)


def check_experts(expert_B: Tensor, x_BD: Tensor, n_experts: int) -> int:
    """The number of experts per token. Raises ValueError."""
    n_active = expert_B.shape[1] if expert_B.ndim == 2 else 1
    if expert_B.ndim not in (1, 2) or len(expert_B) != len(x_BD) or not 1 <= n_active <= n_experts:
        expected = f"({len(x_BD)},) or ({len(x_BD)}, n_active) with n_active from 1 to {n_experts}"
        raise ValueError(f"expert_B must have shape {expected}; got {tuple(expert_B.shape)}")
    check_integers("expert_B", expert_B)
    check_device("expert_B", expert_B, "x_BD", x_BD)
    return n_active


def check_over_batch(inputs: EncoderInputs) -> None:
    n, has_experts = len(inputs.x_BD) * inputs.choices, inputs.expert_B is not None
    if not 0 <= inputs.k <= n:
        of = f"B times the {inputs.choices} latents of a token" if has_experts else "B F"
        raise ValueError(f"k must be between 0 and {of} = {n}; got k={inputs.k}")
    if inputs.gates_B is not None and not has_experts:
        raise ValueError("over_batch must be False with gates_B, unless expert_B is given; got True")
    for name in ("bias_F", "scale_F") if has_experts else ():
        if inputs._asdict()[name] is not None:
            raise ValueError(f"{name} must be None with expert_B where tokens differ in number of codes; got a tensor")


def check_lone_gates(inputs: EncoderInputs, ends_L: Tensor | None, dead_counts: Sequence[int]) -> None:
    """Gates of tokens without experts have no form of their own for codes [S]."""
    name = "ends_L" if ends_L is not None else "dead_counts" if dead_counts else ""
    if name and inputs.gates_B is not None and inputs.expert_B is None:
        raise ValueError(f"gates_B must be None with {name}, unless expert_B is given; got a tensor")


def check_levels(ends_L: Tensor, width: int, x_BD: Tensor) -> None:
    if ends_L.ndim != 1 or len(ends_L) == 0:
        raise ValueError(f"ends_L must have shape (at least 1,); got {tuple(ends_L.shape)}")
    check_integers("ends_L", ends_L)
    check_device("ends_L", ends_L, "x_BD", x_BD)
    check_ends(ends_L, width)


def check_dead(dead_N: Tensor, aux_k: int, inputs: EncoderInputs) -> None:
    is_mask, F = dead_N.dtype == torch.bool, len(inputs.W_enc_FD)
    if is_mask and dead_N.shape != (F,):
        raise ValueError(f"dead_N must have shape ({F},) as a mask of latents; got {tuple(dead_N.shape)}")
    if not is_mask:
        check_integers("dead_N", dead_N)
    check_device("dead_N", dead_N, "x_BD", inputs.x_BD)
    most, what = (inputs.blocks.width, "latents of an expert") if is_mask else (len(dead_N), "dead latents")
    if not 1 <= aux_k <= most:
        raise ValueError(f"aux_k must be between 1 and the {most} {what}; got aux_k={aux_k}")


def check_dead_counts(counts: Sequence[int], dead_N: Tensor | None, expert_B: Tensor | None) -> None:
    n_dead = 0 if dead_N is None else len(dead_N)
    is_mask = dead_N is not None and dead_N.dtype == torch.bool
    if counts and (expert_B is not None or is_mask or min(counts) < 1 or sum(counts) != n_dead):
        raise ValueError(
            f"dead_counts must be positive and sum to the {n_dead} dead latents, which are indices, without expert_B; "
            f"got {list(counts)}"
        )


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


def check_codes(values_BK: Tensor, indices_BK: Tensor, offsets_B1: Tensor | None) -> None:
    if offsets_B1 is None:
        check_matrix("values_BK", values_BK)
    if values_BK.shape != indices_BK.shape:
        raise ValueError(
            f"values_BK and indices_BK must share a shape; got {tuple(values_BK.shape)} and {tuple(indices_BK.shape)}"
        )
    check_indices(indices_BK, offsets_B1)
    check_device("indices_BK", indices_BK, "values_BK", values_BK)


def check_indices(indices_BK: Tensor, offsets_B1: Tensor | None, rows: int | None = None) -> None:
    if offsets_B1 is not None:
        check_offsets(offsets_B1, indices_BK, rows)
    elif indices_BK.ndim != 2 or rows not in (None, len(indices_BK)):
        expected = f"({'any' if rows is None else rows}, any)"
        raise ValueError(f"indices_BK must have shape {expected}; got {tuple(indices_BK.shape)}")
    check_integers("indices_BK", indices_BK)


def check_offsets(offsets_B1: Tensor, indices_S: Tensor, rows: int | None) -> None:
    """Codes of a number that varies by token: one dimension, and where each token's begin."""
    if indices_S.ndim != 1:
        raise ValueError(f"indices_BK must have shape (any,) with offsets_B1; got {tuple(indices_S.shape)}")
    if offsets_B1.ndim != 1 or len(offsets_B1) == 0 or rows not in (None, len(offsets_B1) - 1):
        expected = "(B + 1,)" if rows is None else f"({rows + 1},)"
        raise ValueError(f"offsets_B1 must have shape {expected}; got {tuple(offsets_B1.shape)}")
    check_integers("offsets_B1", offsets_B1)
    check_device("offsets_B1", offsets_B1, "indices_BK", indices_S)


def check_integers(name: str, t: Tensor) -> None:
    if t.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64; got {t.dtype}")
