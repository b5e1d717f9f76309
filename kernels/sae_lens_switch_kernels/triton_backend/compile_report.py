"""The report on compiled kernels: what each launch compiles to, beside its predicted time.

The launchers run on meta tensors and record what they would launch; each different specialisation is compiled once per
architecture. ``python -m sae_lens_switch_kernels.report`` is the command.
"""

import io
import multiprocessing
import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import triton

from sae_lens_switch_kernels.triton_backend.compiled_code import (
    TARGETS,
    Specialisation,
    compile_and_count,
    specialise,
    start_worker,
)
from sae_lens_switch_kernels.triton_backend.launch import recording
from sae_lens_switch_kernels.triton_backend.predict import DTYPES, GPUS, B, E, F, K, operations, predicted_seconds


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
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor(workers, spawn, start_worker, (cache,)) as pool:
        rows = list(pool.map(compile_and_count, *zip(*uses, strict=True), chunksize=4))
    for row, where in zip(rows, uses.values(), strict=True):
        row["dtypes"] = sorted({dtype for dtype, _ in where})
        row["widths"] = sorted({D for _, D in where})
    rows.sort(key=lambda row: (row["kernel"], row["dtypes"], row["arch"], row["widths"]))
    return {"kernels": rows, "predictions": predictions}


def shortcomings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where compiled code falls short of no spills, no atomics and 128-bit loads for every row read."""
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
    "wide_products": "wide mma",
    "warps": "warps",
    "stages": "stages",
}


def tables(found: dict[str, list[dict[str, Any]]]) -> str:
    """Both tables as text."""
    text = io.StringIO()
    write = text.write
    write(f"Compiled ahead of time with Triton {triton.__version__}; B={B} K={K} F={F} E={E}\n\n")
    write(f"{'kernel':28}{'arch':8}{'dtype':10}" + "".join(f"{c:>11}" for c in _COLUMNS.values()) + "  D\n")
    for row in found["kernels"]:
        numbers = "".join(f"{row[c]:11}" for c in _COLUMNS)
        widths = ",".join(map(str, row["widths"]))
        write(f"{row['kernel']:28}{row['arch']:8}{'/'.join(row['dtypes']):10}{numbers}  {widths}\n")
    write("\nPREDICTED microseconds (bytes and flops over the rates in predict.py; nothing was run). select_topk\n")
    write("without the integer steps of its search.\n\n")
    write(f"{'operation':36}{'dtype':7}{'D':>6}" + "".join(f"{name:>12}" for name in GPUS) + "\n")
    for row in found["predictions"]:
        times = "".join(f"{row[name]:12.1f}" for name in GPUS)
        write(f"{row['operation']:36}{row['dtype']:7}{row['D']:6}{times}\n")
    return text.getvalue()
