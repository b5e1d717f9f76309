"""Which form of the primitives runs: Triton's on a GPU that it has proven itself on, plain torch's elsewhere."""

import os
from functools import cache
from types import ModuleType

from torch import Tensor

from sae_lens_switch_kernels import torch_ops


def primitives(t: Tensor) -> ModuleType:
    """torch_ops or triton_ops, by the tensor's device. SAE_LENS_SWITCH_BACKEND=torch or triton overrides."""
    choice = os.environ.get("SAE_LENS_SWITCH_BACKEND", "")
    if choice not in ("", "torch", "triton"):
        raise ValueError(f"SAE_LENS_SWITCH_BACKEND must be 'torch' or 'triton' if set; got {choice!r}")
    if choice == "triton":
        return _triton_ops()
    return torch_ops


@cache
def _triton_ops() -> ModuleType:
    from sae_lens_switch_kernels import triton_ops

    return triton_ops
