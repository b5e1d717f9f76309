"""`python -m sae_lens_switch_kernels.report`: compile every kernel ahead of time, no GPU needed, and read the code.

The launchers run on meta tensors and record what they would launch; each different specialisation is compiled once
an architecture. Counted are registers, spills, shared memory and the width of every load of a matrix row, found in
the assembly by the source file of `load_row`. Times are predictions from bytes and flops, not measurements.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae_lens_switch_kernels.indexing import LatentIndex
from sae_lens_switch_kernels.triton_backend import gather, grouped_matmul, latent_weight_grads, select_topk
from sae_lens_switch_kernels.triton_backend.blocks import Arch
from sae_lens_switch_kernels.triton_backend.launch import Launch, Traffic, recording

B, K, F, E = 4096, 32, 32768, 32
WIDTHS, QUICK_WIDTHS = (576, 768, 2304, 4096, 8192, 16384), (768, 4096)
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Arch(lanes=32, shared=166912)),
    "sm_90": (GPUTarget("cuda", 90, 32), Arch(lanes=32, shared=232448)),
    "sm_100": (GPUTarget("cuda", 100, 32), Arch(lanes=32, shared=232448)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Arch(lanes=64, shared=65536)),
}
QUICK_TARGETS = ("sm_90", "gfx942")


class Gpu(NamedTuple):
    """Bytes and flops a second that well-written code reaches, and bytes of L2."""

    memory: float
    l2: float
    l2_bytes: int
    flops: dict[str, float]


GPUS = {
    "H100 SXM": Gpu(3.35e12, 5.5e12, 50 << 20, {"fp32": 50e12, "tf32": 300e12, "bf16": 600e12}),
    "A100 SXM": Gpu(2.0e12, 3.5e12, 40 << 20, {"fp32": 16e12, "tf32": 110e12, "bf16": 220e12}),
}


class Operation(NamedTuple):
    name: str
    run: Callable[[], Any]
    traffic: Traffic
    tensor_cores: bool = False


def operations(D: int, dtype: str) -> Iterator[Operation]:
    """Every launcher at the width D, on tensors without storage."""

    def empty(*shape: int, dtype: torch.dtype = DTYPES[dtype]) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    M, size = F // E, DTYPES[dtype].itemsize
    values, indices = empty(B, K), empty(B, K, dtype=torch.int64)
    x, W, a = empty(B, D), empty(F, D), empty(B, M)
    offsets = empty(E + 1, dtype=torch.int64)
    index = LatentIndex(empty(B * K, dtype=torch.int64), empty(F + 1, dtype=torch.int64))
    grouped_traffic = grouped_matmul.grouped_traffic(B, D, M, E, size)
    yield Operation("grouped_encode", lambda: grouped_matmul.grouped_encode(x, W, offsets), grouped_traffic, True)
    yield Operation("grouped_decode", lambda: grouped_matmul.grouped_decode(a, W, offsets), grouped_traffic, True)
    yield Operation(
        "grouped_weight_grad", lambda: grouped_matmul.grouped_weight_grad(a, x, offsets), grouped_traffic, True
    )
    if dtype == "tf32":  # says how tensor cores treat fp32; the others do not use them
        return
    yield Operation(
        "sparse_decode",
        lambda: gather.sparse_decode(values, indices, W),
        gather.sparse_decode_traffic(B, K, F, D, size),
    )
    yield Operation(
        "matmul_at_indices",
        lambda: gather.matmul_at_indices(x, W, indices),
        gather.matmul_at_indices_traffic(B, K, F, D, size),
    )
    yield Operation(
        "latent_weight_grads",
        lambda: latent_weight_grads.latent_weight_grads(index, values, x, values, x),
        latent_weight_grads.latent_weight_grads_traffic(B, K, F, D, size),
    )
    yield Operation(
        "latent_weight_grads, decoder only",
        lambda: latent_weight_grads.latent_weight_grads(index, values, x),
        latent_weight_grads.latent_weight_grads_traffic(B, K, F, D, size, encoder=False),
    )
    pre, vector = empty(B, F), empty(F)
    yield Operation(
        "select_topk", lambda: select_topk.select_topk(pre, K), select_topk.select_topk_traffic(B, F, K, size)
    )
    yield Operation(
        "select_topk, bias and scale",
        lambda: select_topk.select_topk(pre, K, vector, vector),
        select_topk.select_topk_traffic(B, F, K, size, vectors=2, vector_itemsize=size),
    )


def predicted_seconds(traffic: Traffic, gpu: Gpu, unit: str) -> float:
    """The slowest of arithmetic, memory and L2. Gathered rows come from L2 if it holds those of one pass."""
    held = traffic.pool <= gpu.l2_bytes * traffic.passes
    memory = traffic.streamed + (traffic.pool if held else max(traffic.gathered, traffic.pool))
    return max(
        traffic.flops / gpu.flops[unit],
        memory / gpu.memory,
        (traffic.streamed + traffic.gathered) / gpu.l2,
    )


class Specialisation(NamedTuple):
    """What Triton compiles for a launch: its arguments' types and alignments, as Triton's own launcher sees them."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    attributes: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]
    num_warps: int
    num_stages: int


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32"}


def specialise(launch: Launch, backend: str) -> Specialisation:
    signature, constants, attributes = [], [], []
    for i, parameter in enumerate(launch.kernel.params):
        argument = launch.arguments[parameter.name]
        kind, aligned = "constexpr", False
        if isinstance(argument, Tensor):
            kind, aligned = f"*{_TYPES[argument.dtype]}", True
        elif isinstance(argument, int) and not parameter.is_constexpr and argument != 1:
            kind, aligned = "i32" if argument < 2**31 else "i64", argument % 16 == 0
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
    with contextlib.redirect_stdout(log):  # ptxas' report
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
        "atomics": len(re.findall(r"^\s*(?:@\S+ )?(?:atom|red)\.", ptx, re.MULTILINE)),
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
        "atomics": len(re.findall(r"(?:global|buffer|flat)_atomic_", assembly)),
        **_count_loads(assembly, bits),
    }


def _count_loads(assembly: str, bits: Callable[[str], int | None]) -> dict[str, int]:
    """Wherever load_row was inlined, its load carries a source line of launch.py, where there is no other load."""
    counts = {"row_loads_128": 0, "row_loads_narrow": 0, "other_loads": 0}
    in_row_load = False
    for line in assembly.splitlines():
        if ".loc" in line:
            in_row_load = "launch.py:" in line.split("@[")[0]  # AMD's says behind the @ from where it was inlined
        elif (width := bits(line)) is not None:
            kind = "other_loads" if not in_row_load else "row_loads_128" if width >= 128 else "row_loads_narrow"
            counts[kind] += 1
    return counts


def _start_worker(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a cached kernel comes without ptxas' report
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"


def report(target_names: Sequence[str], widths: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the two tables: what was compiled, and what is predicted."""
    uses: dict[tuple[str, Specialisation], set[tuple[str, int]]] = defaultdict(set)
    predictions = []
    for dtype in DTYPES:
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        for D in widths:
            for operation in operations(D, dtype):
                for target_name in target_names:
                    target, arch = TARGETS[target_name]
                    with recording(arch) as launches:
                        operation.run()
                    for launch in launches:
                        uses[target_name, specialise(launch, target.backend)].add((dtype, D))
                unit = dtype if operation.tensor_cores else "fp32"
                times = {name: 1e6 * predicted_seconds(operation.traffic, gpu, unit) for name, gpu in GPUS.items()}
                predictions.append({"operation": operation.name, "dtype": dtype, "D": D, **times})

    workers = min(2, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor(workers, spawn, _start_worker, (cache,)) as pool:
        rows = list(pool.map(compile_and_count, *zip(*uses, strict=True), chunksize=4))
    for row, where in zip(rows, uses.values(), strict=True):
        row["dtypes"] = sorted({dtype for dtype, _ in where})
        row["widths"] = sorted({D for _, D in where})
    rows.sort(key=lambda row: (row["kernel"], row["dtypes"], row["arch"], row["widths"]))
    return {"kernels": rows, "predictions": predictions}


def shortcomings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where compiled code misses the bar: no spills, no atomics, 128-bit loads on every row read."""
    return [
        f"{row['kernel']} {row['arch']} {row['dtypes']} {row['widths']}: {fault} = {row[fault]}"
        for row in rows
        for fault in ("spill_bytes", "local_bytes", "atomics", "row_loads_narrow")
        if row[fault]
    ]


_COLUMNS = {
    "registers": "regs",
    "spill_bytes": "spill B",
    "local_bytes": "local B",
    "shared": "shared B",
    "row_loads_128": "row 128b",
    "row_loads_narrow": "row narrow",
    "other_loads": "other ld",
    "atomics": "atomics",
    "warps": "warps",
    "stages": "stages",
}


def _print_tables(found: dict[str, list[dict[str, Any]]]) -> None:
    write = sys.stdout.write
    write(f"Compiled ahead of time with Triton {triton.__version__}; B={B} K={K} F={F} E={E}\n\n")
    write(f"{'kernel':24}{'arch':8}{'dtype':10}" + "".join(f"{c:>11}" for c in _COLUMNS.values()) + "  D\n")
    for row in found["kernels"]:
        numbers = "".join(f"{row[c]:11}" for c in _COLUMNS)
        widths = ",".join(map(str, row["widths"]))
        write(f"{row['kernel']:24}{row['arch']:8}{'/'.join(row['dtypes']):10}{numbers}  {widths}\n")
    write("\nPREDICTED microseconds (bytes and flops over the rates in report.py; nothing was run). select_topk\n")
    write("without torch.topk's passes over the candidates.\n\n")
    write(f"{'operation':36}{'dtype':7}{'D':>6}" + "".join(f"{name:>12}" for name in GPUS) + "\n")
    for row in found["predictions"]:
        times = "".join(f"{row[name]:12.1f}" for name in GPUS)
        write(f"{row['operation']:36}{row['dtype']:7}{row['D']:6}{times}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sae_lens_switch_kernels.report", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write both tables there")
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="two widths, two architectures")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")
    targets = options.arch or (QUICK_TARGETS if options.quick else list(TARGETS))
    found = report(targets, QUICK_WIDTHS if options.quick else WIDTHS)
    _print_tables(found)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
    faults = shortcomings(found["kernels"])
    for fault in faults:
        sys.stderr.write(f"below the bar: {fault}\n")
    return 1 if faults else 0
