"""torch's own grouped product in place of ours, where that is the faster one.

Which multiplies is a rule, of dtype, shape and GPU, and not a measurement at first use: two runs of one config must
have the same bits, whatever else the machine does as they start, and so must a run that is resumed. The rule follows
what was measured on an H200 (docs/gpu): in bfloat16 torch's encoder product was 1.8 times as fast as ours with 256
tokens per expert, as fast with 128, and slower with 64. Ours computes weight gradients in two thirds of its time or in
the same, and decodes into float32 in the order of the tokens, for which torch's would need another pass. In float32
torch's is a loop over experts that waits for the device.

``SAE_LENS_SWITCH_GROUPED=triton`` forces ours, ``library`` torch's wherever it can be called.
"""

import os

import torch
from torch import Tensor

try:
    from torch.nn.functional import grouped_mm
except ImportError:  # before torch 2.10
    grouped_mm = None

_FROM_TOKENS = 128  # per expert, on average


def library_encode(x_BD: Tensor, W_FD: Tensor, offsets_E1: Tensor) -> Tensor | None:
    """``grouped_encode`` by torch; None where ours is to run.

    Raises:
        ValueError: If the variable is neither.
    """
    choice = os.environ.get("SAE_LENS_SWITCH_GROUPED", "")
    if choice not in ("", "triton", "library"):
        raise ValueError(f"SAE_LENS_SWITCH_GROUPED must be 'triton' or 'library' if set; got {choice!r}")
    E = len(offsets_E1) - 1
    is_faster = len(x_BD) >= _FROM_TOKENS * E if choice == "" else choice == "library"
    return product(x_BD, W_FD, offsets_E1) if is_faster and can_multiply(x_BD, W_FD, E) else None


def can_multiply(x_BD: Tensor, W_FD: Tensor, n_experts: int) -> bool:
    """Whether torch's fast path takes these: bfloat16 on Hopper or later, rows of whole 16 bytes."""
    if grouped_mm is None or not _is_hopper(x_BD.device) or not len(x_BD):
        return False
    widths = x_BD.shape[1], len(W_FD) // n_experts
    aligned = all(width % 8 == 0 for width in widths) and x_BD.data_ptr() % 16 == 0 and W_FD.data_ptr() % 16 == 0
    contiguous = x_BD.is_contiguous() and W_FD.is_contiguous()
    return x_BD.dtype == W_FD.dtype == torch.bfloat16 and contiguous and aligned


def product(x_BD: Tensor, W_FD: Tensor, offsets_E1: Tensor) -> Tensor:
    """out[r] = x[r] W_e^T; tokens of an expert end where the next one's begin."""
    assert grouped_mm is not None
    E, D = len(offsets_E1) - 1, x_BD.shape[1]
    W_EDM = W_FD.view(E, -1, D).transpose(1, 2)
    return grouped_mm(x_BD, W_EDM, offs=offsets_E1[1:].to(torch.int32))


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
