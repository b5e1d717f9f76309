"""Milliseconds of a call: of the device where there is one, medians, over inputs that do not stay in its cache."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

PRECISIONS = ("fp32", "tf32", "bf16")


def dtype_of(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def triton_runs(dtype: torch.dtype = torch.float32) -> bool:
    """On a GPU, or, but for bfloat16, in the interpreter; and unless the environment asks for plain torch."""
    if os.environ.get("SAE_LENS_SWITCH_BACKEND") == "torch":
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and dtype != torch.bfloat16
    return interpreted or torch.cuda.is_available()


def use(precision: str) -> None:
    """float32 products as TF32, or not."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def free() -> None:
    """Give back the memory of a GPU; a rehearsal's tensors are too small for the time that a collection takes."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def rotated(make: Callable[[int], Any], n_bytes: int, device: str) -> list[Any]:
    """make(0), make(1), ...: as many as together are three times the cache, at least two and at most eight."""
    cache = 0 if device == "cpu" else getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 1 << 26)
    return [make(i) for i in range(max(2, min(8, -(-3 * cache // max(1, n_bytes)))))]


def median_ms(call: Callable[[Any], Any], inputs: Sequence[Any], device: str, seconds: float = 0.15) -> float:
    """Of ``call(input)``, taken in turn over the inputs, after one round to warm up and compile.

    On a CPU, where this is only rehearsed, of two calls.
    """
    if device == "cpu":
        return statistics.median(_host_ms(call, given) for given in inputs[:2])
    for given in inputs:
        call(given)
    synchronize(device)
    start = time.perf_counter()
    call(inputs[0])
    synchronize(device)
    once = time.perf_counter() - start
    n = int(max(3, min(100, seconds / max(once, 1e-6))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    # The device sleeps while the host queues the calls: what is timed is then the device's work, not the host's.
    torch.cuda._sleep(int(1e9 * min(0.1, 0.5 * once * n)))
    for i, (before, after) in enumerate(events):
        before.record()
        call(inputs[i % len(inputs)])
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def _host_ms(call: Callable[[Any], Any], given: Any) -> float:
    start = time.perf_counter()
    call(given)
    return 1e3 * (time.perf_counter() - start)


def normal(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)
