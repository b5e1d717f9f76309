"""The public function of ``torch_clipping``."""

from collections.abc import Sequence

from torch import Tensor

from sae_lens_switch_kernels.backend import primitives
from sae_lens_switch_kernels.torch_clipping import Clipping


def clip(
    grads: Sequence[Tensor],
    loss: Tensor,
    max_norm: float | None,
    skipped: Tensor | None = None,
    steps: Sequence[Tensor] = (),
) -> Clipping:
    """What all gradients and the loss say about a step; nothing waits for the device.

    Args:
        grads: All gradients of the step, at least one.
        loss: What was differentiated; one number.
        max_norm: Gradients are scaled down to this total norm; None: they are not.
        skipped: How many steps in a row, and in all, were not finite, int64 [2]; this one is added, in place.
        steps: float32 numbers that are increased by one, in place, if the step is finite.

    Returns:
        See ``Clipping``.
    """
    return primitives(grads[0]).clip(grads, loss.detach(), max_norm, skipped, steps)
