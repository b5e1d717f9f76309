"""Matrix products of rows rounded to float8 (e4m3): torch's own on a GPU that has them, elsewhere in bfloat16.

Every row has one scale, the power of two that brings its largest number just below e4m3's largest, 448. A rounded
number times such a scale is also a bfloat16, so both ways multiply the same numbers.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from sae_lens_switch_kernels.working_copy import working_copy

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max
_MULTIPLE = 16  # of both dimensions of a weight matrix, for torch's product


@dataclass
class Float8Rows:
    """Rows rounded to float8.

    Attributes:
        rounded_RD: The numbers, divided by the row's scale.
        scale_R1: The scales, float32 powers of two.
    """

    rounded_RD: Tensor
    scale_R1: Tensor

    @classmethod
    def of(cls, t_RD: Tensor) -> "Float8Rows":
        largest_R1 = t_RD.abs().amax(1, keepdim=True).float()
        _, exponent_R1 = (largest_R1 / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny).frexp()
        scale_R1 = torch.ldexp(torch.ones_like(largest_R1), exponent_R1)
        return cls((t_RD / scale_R1).to(FLOAT8), scale_R1)

    def __getitem__(self, rows: slice) -> "Float8Rows":
        return Float8Rows(self.rounded_RD[rows], self.scale_R1[rows])

    def __len__(self) -> int:
        return len(self.rounded_RD)

    def to_bfloat16(self) -> Tensor:
        """The rounded numbers themselves, exact but for those below bfloat16's smallest."""
        return self.rounded_RD.to(torch.bfloat16) * self.scale_R1.to(torch.bfloat16)

    def times(self, W: "Float8Rows") -> Tensor:
        """x W^T in bfloat16, [R, P]."""
        by_row = functional.ScalingType.RowWise
        return functional.scaled_mm(
            self.rounded_RD, W.rounded_RD.T, self.scale_R1, by_row, W.scale_R1.T, by_row, output_dtype=torch.bfloat16
        )


def operands(x_BD: Tensor, W_FD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both factors of a product in ``dtype``; of float8, rounded to it and held in bfloat16."""
    if dtype == FLOAT8:
        return Float8Rows.of(x_BD).to_bfloat16(), Float8Rows.of(W_FD).to_bfloat16()
    return x_BD.to(dtype), working_copy(W_FD, dtype)


def float8_operands(x_BD: Tensor, W_FD: Tensor) -> tuple[Float8Rows, Float8Rows] | None:
    """Both factors for ``Float8Rows.times``; None where torch has no product, or none that is fast."""
    fits = not (W_FD.shape[0] % _MULTIPLE or W_FD.shape[1] % _MULTIPLE)
    return (Float8Rows.of(x_BD), Float8Rows.of(W_FD)) if fits and _has_float8(x_BD.device) else None


@cache
def _has_float8(device: torch.device) -> bool:
    """NVIDIA's GPUs from Ada and Hopper on."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)
