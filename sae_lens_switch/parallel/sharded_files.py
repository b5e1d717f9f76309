"""Tensors of which each process holds a part, in files that any number of processes can read.

torch.distributed.checkpoint writes one safetensors file per process; parts are described by ``DTensor``, which is used
for nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate, Shard

from sae_lens_switch.common.streamed_safetensors import Box
from sae_lens_switch.parallel.ranks import Ranks


@dataclass(frozen=True)
class Part:
    """A tensor, and along which dimension it is this process's part of a larger one; None: it is the whole."""

    tensor: Tensor
    dim: int | None = None


def write_parts(folder: Path, parts: Mapping[str, Part], ranks: Ranks) -> None:
    """Write everybody's parts below ``folder``; every process must take part.

    Raises:
        OSError: On every process, if one could not write.
    """
    tensors = {name: _distributed(part, ranks) for name, part in parts.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with ranks.heard("a checkpoint"):
            save(tensors, storage_writer=writer)
    except CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {reason[0]!r}" for rank, reason in error.failures.items())
        raise OSError(f"{folder} could not be written ({reasons})") from error


def read_parts(folder: Path, parts: Mapping[str, Part], ranks: Ranks) -> None:
    """Read everybody's parts into their tensors, in place; they may have been written by other parts.

    Raises:
        ValueError: On every process, if one could not read.
    """
    tensors = {name: _distributed(part, ranks) for name, part in parts.items()}
    try:
        with ranks.heard("a checkpoint"):
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {reason[0]!r}" for rank, reason in error.failures.items())
        raise ValueError(f"{folder} could not be read ({reasons})") from error


class Whole:
    """The whole tensors in a folder of parts, read a block at a time.

    Attributes:
        shapes: Each tensor's shape and dtype, by name.
    """

    def __init__(self, folder: Path) -> None:
        found = HuggingFaceStorageReader(str(folder)).read_metadata()
        tensors = found.state_dict_metadata.items()
        self._entries = {name: entry for name, entry in tensors if isinstance(entry, TensorStorageMetadata)}
        self._files: dict[MetadataIndex, Any] = found.storage_data
        self.shapes = {name: (entry.size, entry.properties.dtype) for name, entry in self._entries.items()}

    def read(self, name: str, box: Box) -> Tensor:
        """A block of a tensor.

        Args:
            name: Of the tensor.
            box: A slice of each dimension.
        """
        entry = self._entries[name]
        block = torch.empty([b.stop - b.start for b in box], dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            corners = list(zip(box, chunk.offsets, chunk.sizes, strict=True))
            shared = [(max(b.start, first), min(b.stop, first + n)) for b, first, n in corners]
            if all(start < stop for start, stop in shared):
                there = tuple(
                    slice(i - first, j - first) for (i, j), (_, first, _) in zip(shared, corners, strict=True)
                )
                here = tuple(slice(i - b.start, j - b.start) for (i, j), b in zip(shared, box, strict=True))
                file = self._files[MetadataIndex(name, chunk.offsets)].relative_path
                with safe_open(file, "pt") as opened:
                    block[here] = opened.get_slice(name)[there]
        return block


def shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """What the files hold: each whole tensor's shape and dtype, by name."""
    return Whole(folder).shapes


def _distributed(part: Part, ranks: Ranks) -> Tensor:
    if part.dim is None:
        return part.tensor
    return DTensor.from_local(part.tensor, ranks.mesh, [Replicate(), Shard(part.dim)], run_check=False)
