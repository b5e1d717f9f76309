"""Tensors of which each process holds a part, in files that any number of processes can read.

torch.distributed.checkpoint writes one safetensors file per process; parts are described by ``DTensor``, which is used
for nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate, Shard

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


def shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """What the files hold: each whole tensor's shape and dtype, by name."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _distributed(part: Part, ranks: Ranks) -> Tensor:
    if part.dim is None:
        return part.tensor
    return DTensor.from_local(part.tensor, ranks.mesh, [Replicate(), Shard(part.dim)], run_check=False)
