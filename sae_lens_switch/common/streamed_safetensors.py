"""A safetensors file written a block at a time, of tensors that need not fit into memory.

The library itself writes whole tensors only. The format: an 8-byte length, that many bytes of JSON, then the tensors.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[torch.Size, torch.dtype]]
Box = tuple[slice, ...]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


BLOCK_BYTES = 2**26
"""Read and written at a time."""


def write_streamed(file: Path, shapes: Shapes, read: Callable[[str, Box], Tensor]) -> None:
    """Write the file that ``safetensors.torch.save_file`` would write of the whole tensors.

    Args:
        file: To be written.
        shapes: Shape and dtype of each tensor, by name.
        read: Given a name and a slice of each dimension, returns that block of the tensor.
    """
    names = sorted(shapes, key=lambda name: (-shapes[name][1].itemsize, name))  # so that all are aligned
    header, end = {}, 0
    for name in names:
        shape, dtype = shapes[name]
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            shape, dtype = shapes[name]
            for box in blocks(shape, dtype.itemsize):
                block = read(name, box).clone(memory_format=torch.contiguous_format)
                out.write(block.view(-1).view(torch.uint8).numpy().data)


def blocks(shape: torch.Size, element_bytes: int) -> Iterator[Box]:
    """A tensor in contiguous blocks of at most ``BLOCK_BYTES``, or one element, in their order in memory."""
    most = max(1, BLOCK_BYTES // element_bytes)
    if not shape:
        yield ()
    elif (of_one := shape[1:].numel()) <= most:
        step = most // max(1, of_one)
        for i in range(0, shape[0], step):
            yield (slice(i, min(i + step, shape[0])), *(slice(0, n) for n in shape[1:]))
    else:
        for i in range(shape[0]):
            yield from ((slice(i, i + 1), *rest) for rest in blocks(shape[1:], element_bytes))
