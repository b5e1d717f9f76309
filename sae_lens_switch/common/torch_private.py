"""Every private name of torch that this package uses, with its reason; checked on torch 2.13.

A test says which one a new version has broken. Two more are overridden where needed, since only a subclass can:
``nn.Module._apply`` and ``nn.Module._load_from_state_dict`` (in saes/).
"""

# pyright: reportPrivateUsage=false

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def fused_adam(tensor_lr: bool) -> Callable[..., None]:
    """The fused Adam step of one list of tensors.

    ``torch.optim.Adam(fused=True)`` steps whole parameters; called by block of rows, it leaves a block in cache for the
    decoder's constraint. The overload is named, since torch would otherwise read ``lr`` from the device to find out
    whether it can be a float.
    """
    return torch.ops.aten._fused_adam_.tensor_lr if tensor_lr else torch.ops.aten._fused_adam_.default


def add_to_all(tensors: list[Tensor], number: Tensor | float) -> None:
    """Add a number to all tensors in place, on a GPU in one launch, which torch offers its own optimisers only.

    The overload is named, since torch would otherwise read a tensor from the device to make it a float.
    """
    if isinstance(number, Tensor):
        torch.ops.aten._foreach_add_.Tensor(tensors, number)
    else:
        torch.ops.aten._foreach_add_.Scalar(tensors, number)


class OpenAdam(torch.optim.Adam):
    """torch's Adam with the method that collects a step's tensors made public."""

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.collect(group, *lists)

    def collect(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        """Append a group's parameters, gradients, moments, maximal moments and steps to ``lists``, creating state."""
        return super()._init_group(group, *lists)  # type: ignore[arg-type]


def has_hooks(module: nn.Module) -> bool:
    """Whether any hook is registered: dense latents are only materialised for hooks."""
    return bool(
        module._forward_hooks or module._backward_hooks or module._backward_pre_hooks or module._forward_pre_hooks
    )
