"""Every private name of torch that this package uses, with its reason; checked on torch 2.13.

A test says which one a new version has broken. Two more are overridden where needed, since only a subclass can:
``nn.Module._apply`` and ``nn.Module._load_from_state_dict`` (in saes/).
"""

# pyright: reportPrivateUsage=false

import json
from collections.abc import Callable, Mapping
from pathlib import Path
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


def part_offsets(metadata: Mapping[str, str]) -> dict[str, list[int]]:
    """Where the tensors of a safetensors file by torch.distributed.checkpoint begin in the whole ones, by name.

    Args:
        metadata: The file's.
    """
    from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

    of_tensors = json.loads(metadata[CUSTOM_METADATA_KEY])
    return {name: entry[SAVED_OFFSETS_KEY] for name, entry in of_tensors.items()}


def part_metadata(offsets: Mapping[str, list[int]]) -> dict[str, str]:
    """The metadata of which ``part_offsets`` makes these."""
    from torch.distributed.checkpoint._hf_utils import (
        CUSTOM_METADATA_KEY,
        DCP_VERSION_KEY,
        FORMAT_KEY,
        FORMAT_VALUE,
        HF_DCP_VERSION,
        SAVED_OFFSETS_KEY,
    )

    of_tensors = {name: {SAVED_OFFSETS_KEY: offset} for name, offset in offsets.items()}
    return {
        CUSTOM_METADATA_KEY: json.dumps(of_tensors),
        DCP_VERSION_KEY: str(HF_DCP_VERSION),
        FORMAT_KEY: FORMAT_VALUE,
    }


def consolidate_safetensors(folder: Path, output: Path, number_of: Mapping[str, int]) -> list[Path]:
    """Safetensors files with whole tensors, from the parts that torch.distributed.checkpoint has written.

    torch does this in public only while it writes the parts. Memory: one whole tensor, and one part of it.

    Args:
        folder: Of the parts.
        output: Of the files, created if necessary.
        number_of: In which file, counted from 1, each tensor goes.

    Returns:
        The files, by number.
    """
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    output.mkdir(exist_ok=True)
    consolidate_safetensors_files(str(folder), str(output), dict(number_of))
    return sorted(output.glob("*.safetensors"))
