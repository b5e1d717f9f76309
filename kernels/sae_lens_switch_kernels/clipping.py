"""The public function of ``torch_clipping``."""

from torch import Tensor

from sae_lens_switch_kernels.backend import primitives
from sae_lens_switch_kernels.torch_clipping import Clipping


def clip(norm: Tensor, loss: Tensor, max_norm: float | None) -> Clipping:
    """What the norm of all gradients and the loss say about a step; nothing waits for the device.

    Args:
        norm: Of all gradients together; one number.
        loss: What was differentiated; one number.
        max_norm: Gradients are scaled down to this total norm; None: they are not.

    Returns:
        See ``Clipping``.
    """
    return primitives(norm).clip(norm, loss.detach(), max_norm)
