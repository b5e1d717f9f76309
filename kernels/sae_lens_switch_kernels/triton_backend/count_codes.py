"""Which latents are active, and on how many tokens, in one launch.

The counts are sums of integers by atomics: the same in whatever order. All that is written to one place of ``last`` is
the same number.

Letters: S is the number of codes.
"""

import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.triton_backend.blocks import cdiv
from sae_lens_switch_kernels.triton_backend.launch import Traffic, launch

_BLOCK = 1024  # codes per program


@triton.jit(do_not_specialize=["number", "B"])
def _count_codes_kernel(
    values,  # [B, K], or [S] with K = 1
    indices,
    is_finite,
    number,  # or where it is
    last,  # [F]
    total,  # [F]
    B,
    K,
    ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    S = B.to(tl.int64) * K  # a multiple of 16 if K is, which makes loads wide
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + at, mask=at < S, other=0.0).to(tl.float32)
    active = (tl.where(tl.load(is_finite) != 0, tl.abs(value), 0.0) > 0) & (at < S)
    latent = tl.load(indices + at, mask=at < S, other=0).to(tl.int64)
    now = tl.load(number) if ON_DEVICE else number
    tl.store(last + latent, tl.zeros([BLOCK], tl.int32) + now, mask=active)
    tl.atomic_add(total + latent, tl.full([BLOCK], 1, tl.int64), mask=active, sem="relaxed")


def count_codes(
    values_BK: Tensor,
    indices_BK: Tensor,
    is_finite: Tensor,
    number: int | Tensor,
    last_F: Tensor,
    total_F: Tensor,
) -> None:
    """As torch_codes's."""
    K = values_BK.shape[-1] if values_BK.ndim > 1 else 1
    launch(
        _count_codes_kernel,
        (cdiv(values_BK.numel(), _BLOCK),),
        4,
        values=values_BK.contiguous(),
        indices=indices_BK.contiguous(),
        is_finite=is_finite,
        number=number,
        last=last_F,
        total=total_F,
        B=values_BK.numel() // max(1, K),
        K=K,
        ON_DEVICE=isinstance(number, Tensor),
        BLOCK=_BLOCK,
    )


def count_codes_traffic(B: int, K: int, itemsize: int) -> Traffic:
    """Values and indices read, a number written and a count read and written for each."""
    return Traffic(flops=0, streamed=B * K * (itemsize + 8), gathered=B * K * (4 + 8 + 8), pool=B * K * 12)
