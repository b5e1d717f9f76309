"""The one place where kernels are launched, for execution or for the compile report.

Every launcher ends in ``launch``. Inside ``recording`` nothing runs: the same launchers, given tensors on the meta
device, record their launches instead, so the report compiles exactly what would be launched.

Triton compiles a kernel anew for an integer that is 1, and for one that is a multiple of 16. Widths gain wide loads by
that. Numbers of tokens, codes or active latents, which may differ from step to step, are in ``do_not_specialize``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.triton_backend.blocks import Arch


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


class Traffic(NamedTuple):
    """The work of one launcher, counted from shapes.

    Attributes:
        flops: 2 per multiply-add.
        streamed: Bytes read or written once.
        gathered: Bytes read repeatedly from ``pool`` distinct bytes; cheap if the cache holds those of one pass.
        pool: Distinct bytes behind ``gathered``.
        passes: Equal parts of the pool that are used one after the other.
    """

    flops: int
    streamed: int
    gathered: int = 0
    pool: int = 0
    passes: int = 1


_recorder: ContextVar[tuple[Arch, list[Launch]] | None] = ContextVar("recorder", default=None)


@contextmanager
def recording(arch: Arch) -> Iterator[list[Launch]]:
    """Collect launches for `arch` instead of running them."""
    launches: list[Launch] = []
    token = _recorder.set((arch, launches))
    try:
        yield launches
    finally:
        _recorder.reset(token)


def arch_of(device: torch.device) -> Arch:
    recorder = _recorder.get()
    return _arch_of(device) if recorder is None else recorder[0]


@cache
def _arch_of(device: torch.device) -> Arch:
    if device.type != "cuda":  # the interpreter
        return Arch(lanes=32, shared=1 << 16)
    properties = torch.cuda.get_device_properties(device)
    # Older versions of torch lack these attributes; the defaults hold for every GPU.
    lanes = getattr(properties, "warp_size", 32)
    return Arch(lanes, getattr(properties, "shared_memory_per_block_optin", 0) or 1 << 16)


def launch(kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int = 1, **arguments: Any) -> None:
    recorder = _recorder.get()
    if 0 in grid:
        return
    if recorder is not None:
        recorder[1].append(Launch(kernel, grid, arguments, num_warps, num_stages))
        return
    tensor = next(a for a in arguments.values() if isinstance(a, Tensor))
    with torch.cuda.device_of(tensor):  # Triton launches on the current device, whatever its arguments
        # Explicit, since the default for fused multiply-adds differs between Triton versions.
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


@triton.jit
def load_row(pointers, mask):
    """Every read of a matrix row goes through here: the report requires 128-bit loads of this one line."""
    return tl.load(pointers, mask=mask, other=0.0)
