"""The public function of ``torch_codes.count_codes``."""

from torch import Tensor

from sae_lens_switch_kernels.backend import primitives


def count_codes(
    values_BK: Tensor, indices_BK: Tensor, is_finite: Tensor, number: int | Tensor, last_F: Tensor, total_F: Tensor
) -> None:
    """Note which latents are active, in place, waiting for nothing.

    Args:
        values_BK: Latents are active where these are neither 0 nor NaN.
        indices_BK: Which latents.
        is_finite: Whether there is anything to note; one bool on the device.
        number: What ``last_F`` becomes where a latent is active: larger than all that it holds. A step that is captured
            reads it from the device, int32.
        last_F: int32.
        total_F: int64; to it are added the tokens that each latent is active on.
    """
    primitives(values_BK).count_codes(values_BK, indices_BK, is_finite, number, last_F, total_F)
