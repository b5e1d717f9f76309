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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sae_lens_switch_kernels import torch_backend
from sae_lens_switch_kernels.indexing import ExpertGroups, expert_groups, latent_index

PRIMITIVES = (
    "sparse_decode",
    "matmul_at_indices",
    "latent_weight_grads",
    "topk_encode",
    "grouped_decode",
    "grouped_matmul_at_indices",
    "grouped_weight_grads",
    "expert_groups",
    "latent_index",
    "sorted_rows",
    "sorted_codes",
    "unsorted_codes",
    "code_grads",
    "route",
    "route_backward",
    "update_loads",
    "update_expert_bias",
    "clip",
    "adam_rows",
    "lazy_adam_rows",
)
# Where a primitive's results are among its arguments; the others return theirs.
_IN_PLACE = {
    "adam_rows": (0, 2, 3, -1),
    "lazy_adam_rows": (0, 2, 3, 4, -1),
    "update_loads": (1, 2, 3),
    "update_expert_bias": (0,),
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


class Shape(NamedTuple):
    """The shape of a self-check, by the package's letters."""

    B: int
    D: int
    M: int
    E: int
    K: int


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
    if "adam" in name:
        cases = _adam_cases(shape, device)[name]
    else:  # also those that are called "name, ..."
        cases = [given for key, given in _case(shape, device, dtype).items() if key.split(",")[0] == name]
    for arguments in cases:
        failure = _compare_on(arguments, name, dtype)
        if failure:
            return failure
    return ""


def _compare_on(arguments: tuple[Any, ...], name: str, dtype: torch.dtype) -> str:
    ours, plain = (_results(m, name, arguments) for m in (_triton_ops(), torch_backend))
    if name == "topk_encode":  # nearly equal latents may win either way: compare what was selected
        (values_BK, indices_BK), (plain_BK, _) = ours, plain
        x_BD, W_FD, *_ = arguments
        chosen_BK = torch_backend.matmul_at_indices(x_BD, W_FD, indices_BK)
        ours, plain = [values_BK.sort(1).values, values_BK], [plain_BK.sort(1).values, chosen_BK]
    for a, b in zip(ours, plain, strict=True):
        if torch.equal(a, b):  # both may be zero, which has no size
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
    if name in _IN_PLACE:
        arguments = deepcopy(arguments)  # views of one memory stay views of one
        getattr(module, name)(*arguments)
        result = [arguments[i] for i in _IN_PLACE[name]]
    else:
        result = getattr(module, name)(*arguments)
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def _case(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of every primitive: experts with uneven loads, and one latent of each active on all of its tokens."""
    B, D, M, E, K = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    expert_B = torch.randint(0, E, (B,), generator=generator).clamp(max=E - 2)  # the last has no token
    order_B, offsets_E1 = expert_groups(expert_B.to(device), E)
    groups, mixed = ExpertGroups(None, offsets_E1), ExpertGroups(order_B, offsets_E1)
    first_B1 = expert_B.to(device)[order_B].unsqueeze(1) * M  # type: ignore[index]
    indices_BK = torch.rand(B, M - 1, generator=generator).topk(K, dim=1).indices.to(device) + 1
    indices_BK[:, 0] = 0
    indices_BK += first_B1
    values_BK, x_BD, g_BD, W_FD = normal(B, K), normal(B, D), normal(B, D), normal(E * M, D)
    d_pre_BK, gates_B = normal(B, K), normal(B)
    index = latent_index(indices_BK, E * M)
    return {
        "sparse_decode": (values_BK, indices_BK, W_FD),
        "matmul_at_indices": (g_BD, W_FD, indices_BK),
        "latent_weight_grads": (index, values_BK, g_BD, d_pre_BK, x_BD),
        "topk_encode": (x_BD, W_FD, K, groups, None, None, dtype),
        "grouped_decode": (values_BK, indices_BK, W_FD, mixed, dtype),
        "grouped_matmul_at_indices": (g_BD, W_FD, indices_BK, groups, dtype),
        "grouped_weight_grads": (values_BK, indices_BK, g_BD, d_pre_BK, x_BD, E * M, groups, dtype),
        "expert_groups": (expert_B.to(device), E),
        "latent_index": (indices_BK, E * M),
        "sorted_rows": (x_BD, normal(D), mixed, dtype),
        "sorted_codes": (values_BK, indices_BK, gates_B, mixed),
        "unsorted_codes": (values_BK, indices_BK, gates_B, mixed),
        "route": (normal(B, E), None),
        "route, biased": (normal(B, E), normal(E)),
        "route_backward": (normal(B, E).softmax(1), expert_B.to(device), normal(B, E), gates_B, normal(E)),
        "update_loads": (normal(E).relu(), normal(E), normal(E), normal(1)[0] + 1, 0.02, -9.0),
        "update_expert_bias": (normal(E), normal(E).round(), normal(1)[0] < 9, 0.1),
        "clip": (normal(1)[0].abs() + 1, normal(1)[0], 0.5),
        "code_grads": (values_BK, d_pre_BK, gates_B, normal(B, K), mixed),
    }


def _adam_cases(shape: Shape, device: torch.device) -> dict[str, list[tuple[Any, ...]]]:
    """Rows as they are and as wide as they get, with and without a constraint, with numbers of either side."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(4, shape.E * shape.M, shape.D, generator=generator).to(device)
    W_FD, grad_FD, m_FD, v_FD = functional.normalize(matrices[0], dim=1), matrices[1], matrices[2], matrices[3].square()
    radial_F, (step, lr, scale, found) = (grad_FD * W_FD).sum(1), torch.tensor([3.0, 0.5, 2.0, 0.0]).to(device)
    rows, options = (W_FD, grad_FD, m_FD, v_FD), (0.9, 0.999, 1e-8)
    wide = tuple(t.view(shape.K - 1, -1) for t in rows)
    copy_FD, wide_copy = (t.to(torch.bfloat16) for t in (W_FD, wide[0]))
    dense = [
        (*rows, step, 0.5, *options, None, None, None, False, False, copy_FD),
        (*rows, step, 0.5, *options, scale, found, radial_F, True, True, None),
        (*rows, step, lr, *options, scale, found, None, True, True, copy_FD),
        (*wide, step, 0.5, *options, None, None, None, True, True, wide_copy),
        (*rows, step, 0.5, *options, scale, 1 - found, None, True, True, copy_FD),
    ]
    return {"adam_rows": dense, "lazy_adam_rows": [_of_some_rows(case) for case in dense[:4]]}


def _of_some_rows(case: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a dense case a lazy one: every other row, of either age, with moments side by side."""
    W_FD, grad_FD, m_FD, v_FD, _, lr, *options, _, radial_F, unit_rows, project, copy_FD = case
    rows_R = torch.arange(len(W_FD) // 2, device=W_FD.device).flip(0) * 2
    moments_F2D = torch.stack([m_FD, v_FD], 1)
    step_F = torch.arange(len(W_FD), device=W_FD.device) % 1000 + 1.0
    matrices = W_FD, grad_FD[rows_R], moments_F2D[:, 0], moments_F2D[:, 1], step_F, rows_R
    radial_R = None if radial_F is None else radial_F[rows_R]
    return (*matrices, lr, *options, radial_R, unit_rows, project, copy_FD)
