"""Which form of a primitive runs: Triton's on a GPU where it has passed its self-check, plain torch's elsewhere.

Before a kernel first runs on a device in a dtype, it is compared with the plain form on a small case and, on a GPU, on
one that takes the tiles of real shapes. If it disagrees or fails, one warning says so and the plain form runs for the
rest of the process.
"""

import os
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sae_lens_switch_kernels import torch_backend
from sae_lens_switch_kernels.check_cases import Shape, cases_of

PRIMITIVES = (
    "sparse_decode",
    "matmul_at_indices",
    "latent_weight_grads",
    "topk_encode",
    "gated_decode",
    "gated_grads",
    "grouped_encode",
    "grouped_decode",
    "grouped_matmul_at_indices",
    "grouped_weight_grads",
    "expert_groups",
    "latent_index",
    "sorted_rows",
    "sorted_codes",
    "unsorted_codes",
    "code_grads",
    "codes_above",
    "count_codes",
    "loss",
    "loss_backward",
    "route",
    "route_backward",
    "update_loads",
    "update_expert_bias",
    "clip",
    "adam_rows",
    "adam_tensors",
    "lazy_adam_rows",
)
# Which of a primitive's arguments it changes.
_IN_PLACE = {
    "adam_rows": (0, 2, 3, -1),
    "adam_tensors": (0, 2, 3),
    "clip": (3, 4),
    "count_codes": (4, 5),
    "lazy_adam_rows": (0, 2, 3, 4, -1),
    "update_expert_bias": (0,),
    "update_loads": (1, 2, 3),
}
# RMS error of a self-check relative to the RMS of the result: TF32 and bf16 keep 10 and 8 bits.
_TOLERATED = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def primitives(t: Tensor) -> "ModuleType | SelfChecked":
    """The primitives for a tensor's device and dtype. SAE_LENS_SWITCH_BACKEND=torch or triton overrides the choice.

    Raises:
        ValueError: If the variable is neither.
    """
    choice = os.environ.get("SAE_LENS_SWITCH_BACKEND", "")
    if choice not in ("", "torch", "triton"):
        raise ValueError(f"SAE_LENS_SWITCH_BACKEND must be 'torch' or 'triton' if set; got {choice!r}")
    on_triton = t.device.type == "cuda" if choice == "" else choice == "triton"
    if not on_triton or t.dtype not in _TOLERATED or not _triton_imports():  # the kernels accumulate in float32
        return torch_backend
    return SelfChecked(t.device, t.dtype)


def triton_kernel(name: str, t: Tensor) -> Callable[..., Any] | None:
    """The Triton form of a primitive where ``primitives`` would run it; None where a plain form has to."""
    p = primitives(t)
    return getattr(p, name) if isinstance(p, SelfChecked) and p.is_proven(name) else None


class SelfChecked:
    """The Triton primitives for one device and dtype, each replaced by the plain one if it fails its self-check."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._key = device, dtype

    def is_proven(self, name: str) -> bool:
        return _proven(name, *self._key)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        module = _triton_ops() if self.is_proven(name) else torch_backend
        return getattr(module, name)


@cache
def _proven(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        failure = _compare(name, device, dtype)
    except Exception as error:  # noqa: BLE001, whatever a compiler or a driver may raise
        failure = f"failed with {type(error).__name__}: {error}"
    if failure:
        warnings.warn(
            f"sae_lens_switch_kernels: the Triton kernel of {name} {failure}, on {device} in {dtype}. Plain torch "
            "runs in its place, with the same results and slower. `make gpu-check` writes a report worth sending.",
            RuntimeWarning,
            stacklevel=2,
        )
    return not failure


@cache
def _triton_imports() -> bool:
    try:
        _triton_ops()
    except Exception as error:  # noqa: BLE001, an absent or broken Triton must not break training
        warnings.warn(
            f"sae_lens_switch_kernels: no Triton kernels ({type(error).__name__}: {error}). Plain torch runs in their "
            "place, with the same results and slower.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _triton_ops() -> ModuleType:
    return import_module("sae_lens_switch_kernels.triton_backend")


_SMALL = Shape(72, 80, 48, 4, 5)
# Block sizes follow from the shape: here products take the largest tiles and top-k its block maxima, as at real sizes.
_WIDE = Shape(768, 256, 256, 3, 5)


def _shapes(device: torch.device) -> tuple[Shape, ...]:
    """Both on a GPU. The interpreter has no tiles, and would be slow on the wide one."""
    return (_SMALL, _WIDE) if device.type == "cuda" else (_SMALL,)


def _compare(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """How the Triton form fails, or an empty string."""
    for shape in _shapes(device):
        failure = _compare_at(shape, name, device, dtype)
        if failure:
            return f"{failure} ({', '.join(f'{letter} {n}' for letter, n in shape._asdict().items())})"
    return ""


def _compare_at(shape: Shape, name: str, device: torch.device, dtype: torch.dtype) -> str:
    for arguments in cases_of(name, shape, device, dtype):
        failure = _compare_on(arguments, name, dtype)
        if failure:
            return failure
    return ""


def _compare_on(arguments: tuple[Any, ...], name: str, dtype: torch.dtype) -> str:
    ours, plain = (_results(m, name, arguments) for m in (_triton_ops(), torch_backend))
    if name == "topk_encode":  # nearly equal latents may win either way: compare what was selected
        (values_BK, indices_BK), (plain_BK, _) = ours, plain
        x_BD, W_FD, _, _, bias_F, *_ = arguments
        chosen_BK = torch_backend.matmul_at_indices(x_BD, W_FD, indices_BK)
        chosen_BK += 0 if bias_F is None else bias_F[indices_BK]
        ours, plain = [values_BK.sort(1).values, values_BK], [plain_BK.sort(1).values, chosen_BK]
    for a, b in zip(ours, plain, strict=True):
        if torch.equal(a, b) or not b.numel():  # zero has no size; and some by-products the plain form does not have
            continue
        if not b.is_floating_point():
            if not torch.equal(a.long(), b):
                return "disagrees with the plain form"
            continue
        error = ((a.float() - b.float()).square().mean().sqrt() / b.float().square().mean().sqrt()).item()
        if not error <= _TOLERATED[dtype]:
            return f"is off by {error:.2g} of the plain form's size"
    return ""


def _results(module: ModuleType, name: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    arguments = deepcopy(arguments)  # views of one memory stay views of one
    result = getattr(module, name)(*arguments)
    return _tensors([result, *(arguments[i] for i in _IN_PLACE.get(name, ()))])


def _tensors(found: Any) -> list[Tensor]:
    """Of nested lists and tuples, in order."""
    if isinstance(found, Tensor):
        return [found]
    return [t for part in found for t in _tensors(part)] if isinstance(found, (list, tuple)) else []
