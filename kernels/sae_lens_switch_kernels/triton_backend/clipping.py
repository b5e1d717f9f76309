"""The few numbers between backward pass and step, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.torch_clipping import Clipping
from sae_lens_switch_kernels.triton_backend.launch import launch


@triton.jit
def _clip_kernel(
    norm,
    loss,
    max_norm,
    is_finite,
    found_inf,
    scale,
    CLIPS: tl.constexpr,
):
    size = tl.load(norm)
    # NaN is less than nothing.
    finite = (size < float("inf")) & (tl.abs(tl.load(loss).to(tl.float32)) < float("inf"))
    tl.store(is_finite, finite)
    tl.store(found_inf, 1.0 - finite.to(tl.float32))
    divisor = 1.0
    if CLIPS:
        excess = (size + 1e-6) / max_norm
        divisor = tl.where(excess < 1.0, 1.0, excess)
    tl.store(scale, divisor)


def clip(norm: Tensor, loss: Tensor, max_norm: float | None) -> Clipping:
    """As torch_clipping's; float32."""
    found = Clipping(norm.new_empty((), dtype=torch.bool), torch.empty_like(norm), torch.empty_like(norm))
    launch(
        _clip_kernel,
        (1,),
        1,
        norm=norm,
        loss=loss,
        max_norm=1.0 if max_norm is None else float(max_norm),
        CLIPS=max_norm is not None,
        **found._asdict(),
    )
    return found
