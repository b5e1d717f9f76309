"""Compile one launch ahead of time for one GPU architecture, and count what the compiler made of it.

Counted are registers, spills, shared memory, atomics that are not sums of integers, and the width of every load of a
matrix row; those are found in the assembly by the source file of ``load_row``.
"""

import contextlib
import io
import os
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae_lens_switch_kernels.triton_backend.blocks import Arch
from sae_lens_switch_kernels.triton_backend.launch import Launch

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Arch(lanes=32, shared=166912)),
    "sm_90": (GPUTarget("cuda", 90, 32), Arch(lanes=32, shared=232448)),
    "sm_100": (GPUTarget("cuda", 100, 32), Arch(lanes=32, shared=232448)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Arch(lanes=64, shared=65536)),
}


class Specialisation(NamedTuple):
    """What Triton compiles for a launch: types and alignments of its arguments, as Triton's own launcher sees them."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    attributes: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]
    num_warps: int
    num_stages: int


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32", torch.bool: "i1"}


def specialise(launch: Launch, backend: str) -> Specialisation:
    signature, constants, attributes = [], [], []
    for i, parameter in enumerate(launch.kernel.params):
        argument = launch.arguments[parameter.name]
        kind, aligned = "constexpr", False
        if isinstance(argument, Tensor):
            kind, aligned = f"*{_TYPES[argument.dtype]}", True
        elif isinstance(argument, int) and parameter.do_not_specialize:
            kind = "i32" if argument < 2**31 else "i64"
        elif isinstance(argument, int) and not parameter.is_constexpr and argument != 1:
            kind, aligned = "i32" if argument < 2**31 else "i64", argument % 16 == 0
        elif isinstance(argument, float) and not parameter.is_constexpr:
            kind = "fp32"
        signature.append((parameter.name, kind))
        if kind == "constexpr":
            constants.append((i, argument))
        facts = [("tt.divisibility", 16)] if aligned else []
        if backend == "hip" and isinstance(argument, Tensor) and argument.nbytes < 2**31:
            facts.append(("tt.pointer_range", 32))
        if facts:
            attributes.append((i, tuple(facts)))
    return Specialisation(
        launch.kernel.__module__,
        launch.kernel.__name__,
        tuple(signature),
        tuple(constants),
        tuple(attributes),
        launch.num_warps,
        launch.num_stages,
    )


def compile_and_count(target_name: str, spec: Specialisation) -> dict[str, Any]:
    target, _ = TARGETS[target_name]
    source = ASTSource(
        getattr(import_module(spec.module), spec.kernel),
        dict(spec.signature),
        {(i,): value for i, value in spec.constants},
        {(i,): [list(fact) for fact in facts] for i, facts in spec.attributes},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # for the report of ptxas
        compiled = triton.compile(source, target=target, options=options)
    is_cuda = target.backend == "cuda"
    counts = _count_cuda(compiled.asm["ptx"], log.getvalue()) if is_cuda else _count_amd(compiled.asm["amdgcn"])
    return {
        "kernel": spec.kernel.strip("_").removesuffix("_kernel"),
        "arch": target_name,
        "warps": spec.num_warps,
        "stages": spec.num_stages,
        "shared": compiled.metadata.shared,
        **counts,
    }


def _count_cuda(ptx: str, log: str) -> dict[str, int]:
    def in_log(pattern: str) -> int:
        return sum(int(n) for n in re.findall(pattern, log))

    def bits(line: str) -> int | None:
        if found := re.search(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+) ", line):
            return int(found[1] or 1) * int(found[2])
        found = re.search(r"cp\.async\.c[ag]\.shared\.global.*?\], (0x[0-9a-f]+|\d+)", line)
        return 8 * int(found[1], 0) if found else None

    return {
        "registers": in_log(r"Used (\d+) registers"),
        "spill_bytes": in_log(r"(\d+) bytes spill"),
        "local_bytes": in_log(r"(\d+) bytes stack frame"),
        "wide_products": len(re.findall(r"^\s*(?:@\S+ )?(?:wgmma\.mma_async|tcgen05\.mma)\.", ptx, re.MULTILINE)),
        # Sums of integers are the same in any order.
        "atomics": len(re.findall(r"^\s*(?:@\S+ )?(?:atom|red)\.(?!\S*\.add\.[us](?:32|64)\s)", ptx, re.MULTILINE)),
        **_count_loads(ptx, bits),
    }


def _count_amd(assembly: str) -> dict[str, int]:
    def in_metadata(pattern: str) -> int:
        return sum(int(n) for n in re.findall(rf"\.{pattern}:\s+(\d+)", assembly))

    sizes = {"byte": 8, "short": 16, "dword": 32}

    def bits(line: str) -> int | None:
        found = re.search(r"(?:global|buffer|flat)_load_[us]?(byte|short|dword)(?:x(\d))?", line)
        return sizes[found[1]] * int(found[2] or 1) if found else None

    return {
        "registers": in_metadata("vgpr_count"),
        "spill_bytes": 4 * in_metadata("[sv]gpr_spill_count"),
        "local_bytes": in_metadata("private_segment_fixed_size"),
        "wide_products": 0,  # an instruction of NVIDIA's
        "atomics": len(re.findall(r"(?:global|buffer|flat)_atomic_(?!add(?:_x2|_u32|_u64)?\s)", assembly)),
        **_count_loads(assembly, bits),
    }


def _count_loads(assembly: str, bits: Callable[[str], int | None]) -> dict[str, int]:
    """Wherever load_row was inlined, its load carries a source line of launch.py, which has no other load."""
    counts = {"row_loads_128": 0, "row_loads_narrow": 0, "other_loads": 0}
    in_row_load = False
    for line in assembly.splitlines():
        if ".loc" in line:
            in_row_load = "launch.py:" in line.split("@[")[0]  # AMD's names the caller after the @
        elif (width := bits(line)) is not None:
            kind = "other_loads" if not in_row_load else "row_loads_128" if width >= 128 else "row_loads_narrow"
            counts[kind] += 1
    return counts


def start_worker(cache: str) -> None:
    """Set up a process that compiles."""
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a cached kernel comes without the report of ptxas
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
