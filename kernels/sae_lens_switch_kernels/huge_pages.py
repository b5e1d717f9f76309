"""Large CPU tensors in huge pages, reused between steps.

A weight gradient is new memory every step. The operating system hands that out one small page at a time, which takes
longer than the sums that fill it.
"""

import mmap
import weakref

import torch
from torch import Tensor

_SMALLEST = 1 << 22
_SIZES_KEPT, _BLOCKS_KEPT = 4, 3
_free: dict[int, list[mmap.mmap]] = {}


def empty_huge(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``; on a CPU in a block that an earlier such tensor has freed, in huge pages where available."""
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    if not _is_large(n_bytes, device):
        return torch.empty(shape, dtype=dtype, device=device)
    size = _size_class(n_bytes)
    try:
        block = _free[size].pop()
    except (KeyError, IndexError):
        block = _new_block(size)
    # torch holds the view as long as any tensor on this memory lives.
    view = memoryview(block)
    weakref.finalize(view, _give_back, block).atexit = False
    return _tensor_on(view, shape, dtype)


def zeros_huge(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.zeros``; on a CPU in new huge pages, which take memory only once they are written."""
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    if not _is_large(n_bytes, device):
        return torch.zeros(shape, dtype=dtype, device=device)
    return _tensor_on(memoryview(_new_block(n_bytes)), shape, dtype)


def to_huge_pages(t: Tensor) -> Tensor:
    """Copy ``t`` into huge pages, preserving its layout; returns ``t`` itself if it is too small."""
    if t.is_contiguous() and _is_large(t.nbytes, t.device):
        return zeros_huge(*t.shape, dtype=t.dtype, device=t.device).copy_(t)
    return to_huge_pages(t.T).T if t.ndim == 2 and t.T.is_contiguous() and not t.is_contiguous() else t


def _is_large(n_bytes: int, device: torch.device) -> bool:
    return device.type == "cpu" and n_bytes >= _SMALLEST and hasattr(mmap, "MAP_ANONYMOUS")


def _new_block(n_bytes: int) -> mmap.mmap:
    block = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _tensor_on(view: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(view, dtype=dtype, count=torch.Size(shape).numel()).view(shape)


def _size_class(n_bytes: int) -> int:
    """The next multiple of an eighth of the power of two below: sizes that vary from step to step share blocks."""
    grain = 1 << (n_bytes.bit_length() - 4)
    return -(-n_bytes // grain) * grain


def _give_back(block: mmap.mmap) -> None:
    blocks = _free.setdefault(len(block), [])
    if len(blocks) < _BLOCKS_KEPT:
        blocks.append(block)
    while len(_free) > _SIZES_KEPT:  # the oldest sizes most likely belong to SAEs that are gone
        del _free[next(iter(_free))]
