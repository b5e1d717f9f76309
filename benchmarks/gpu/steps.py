"""Stage `steps`: whole training steps, ours through our trainer, SAELens's TopK through SAELens's, and the rivals'."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gpu import shapes
from gpu.record import Case, Record
from gpu.shapes import Shape
from gpu.timing import free, normal, synchronize, use
from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig

GPT2, GEMMA = Shape(8192, 768, 24576, 32), Shape(8192, 2304, 65536, 64)
WIDE, WIDEST = (Shape(8192, 4096, F, 64, 512) for F in (1 << 18, 1 << 19))
TINY = Shape(64, 16, 256, 4)
FAR = 10**12  # samples: no run gets there


def cases(args: argparse.Namespace) -> Iterator[Case]:
    def step(kind: str, s: Shape, precision: str, **options: Any) -> Case:
        graph = ", graph" if options.get("cuda_graph") else ""
        extra = graph + "".join(f", {options[name]}" for name in ("optimizer", "encoder_precision") if name in options)
        return f"{kind}, {s}, {precision}{extra}", partial(measure, kind, s, precision, args, **options)

    if args.tiny:
        shapes_, experts = [TINY], [4]
    else:
        shapes_, experts = [GPT2, GEMMA], [32, 128]
    for s in shapes_:
        for precision in ("bf16", "fp32") if args.tiny else ("bf16", "fp32", "tf32"):
            yield step("SAELens topk", s, precision)
            for graph in (True, False):
                yield step("sparse_topk", s, precision, cuda_graph=graph)
                for E in experts if s != GEMMA else [64]:
                    yield step("switch", s._replace(E=E), precision, cuda_graph=graph)
        for encoder_precision in ("bfloat16", "float8"):
            yield step("sparse_topk", s, "fp32", cuda_graph=True, encoder_precision=encoder_precision)
        E = experts[0] if s != GEMMA else 64
        yield step("switch", s._replace(E=E), "fp32", cuda_graph=True, encoder_precision="bfloat16")
        if s != GEMMA:
            for precision in ("bf16", "tf32"):
                yield step("sparsify", s, precision)
            yield step("all experts, masked", s._replace(E=experts[0]), "tf32")
            yield step("switch", s._replace(E=experts[0]), "bf16", optimizer="row_sparse_adam")
            for architecture in ("batchtopk", "matryoshka_batchtopk", "abstopk"):
                yield step(f"SAELens {architecture}", s, "bf16")
                for graph in (True, False):
                    yield step(f"sparse_{architecture}", s, "bf16", cuda_graph=graph)
    if args.tiny:
        return
    yield step("switch", WIDE, "bf16", cuda_graph=True)
    for optimizer in ("adam", "row_sparse_adam"):
        yield step("switch", WIDE, "bf16", optimizer=optimizer)
    yield step("SAELens topk", WIDE._replace(E=1), "bf16")
    if args.device == "cuda" and torch.cuda.get_device_properties(0).total_memory > 1.2e11:
        yield step("switch", WIDEST, "bf16", optimizer="row_sparse_adam")


def trainer_of(
    kind: str,
    s: Shape,
    precision: str,
    device: str,
    *,
    optimizer: str = "adam",
    cuda_graph: bool = False,
    aux_loss_coefficient: float = 0.0,
    encoder_precision: str = "full",
    window: int = 10**6,
    lr: float = 1e-4,
) -> tuple[Any, list[Tensor]]:
    """A trainer that does not log, and batches for its ``step``. bf16 is autocast, as SAELens users train."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"d_in": s.D, "d_sae": s.F, "k": s.K, "device": device, "dtype": "float32"}
    options["aux_loss_coefficient"] = aux_loss_coefficient
    run: dict[str, Any] = {"lr": lr, "lr_end": lr, "total_training_samples": FAR, "device": device}
    run |= {"train_batch_size_samples": s.B, "dead_feature_window": window, "logger": LoggingConfig(log_to_wandb=False)}
    run["autocast"] = precision in ("bf16", "autocast")
    batches = [normal(s.B, s.D, seed=30 + i, device=device) for i in range(4)]
    use(precision)
    if "matryoshka" in kind:
        options["matryoshka_widths"] = [s.F >> i for i in (4, 3, 2, 1, 0)]
    if kind.startswith("SAELens "):
        sae = _sae(kind.removeprefix("SAELens "), options)
        return SAETrainer(cfg=SAETrainerConfig(**run), sae=sae, data_provider=iter([])), batches
    options["encoder_precision"] = encoder_precision
    if kind == "switch":
        options["n_experts"] = s.E
    sae = _sae(kind, options)
    cfg = SparseSAETrainerConfig(**run, optimizer=optimizer, cuda_graph=cuda_graph)  # type: ignore[arg-type]
    return SparseSAETrainer(cfg, sae, iter([])), batches


def _sae(architecture: str, options: dict[str, Any]) -> Any:
    sae_class, config_class = get_sae_training_class(architecture)
    return sae_class(config_class(**options))


def stepper_of(kind: str, s: Shape, precision: str, device: str, **options: Any) -> Callable[[int], Any]:
    """The i-th step."""
    if kind in ("sparsify", "all experts, masked"):
        return rival(kind, s, precision, device)
    trainer, batches = trainer_of(kind, s, precision, device, **options)

    def step(i: int) -> None:
        trainer.step(batches[i % len(batches)])
        trainer.n_training_steps += 1

    return step


def rival(kind: str, s: Shape, precision: str, device: str) -> Callable[[int], Any]:
    """As `make bench` has it: forward, backward, clipping, fused Adam, one batch."""
    import bench
    import contestants

    use(precision)
    shape = {"--batch": s.B, "--d-in": s.D, "--d-sae": s.F, "--k": s.K, "--device": device}
    given = bench.parse_args([str(part) for pair in shape.items() for part in pair])
    contestant = contestants.Sparsify(given) if kind == "sparsify" else contestants.Masked(given, s.E)

    def step(_: int) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            contestant.step()

    return step


def measure(kind: str, s: Shape, precision: str, args: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """Milliseconds of a step, of the host until it has queued one, of the device's kernels; how many; peak memory."""
    device = args.device
    if kind == "sparsify":
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1" if device == "cpu" else "0")
        try:
            import sparsify  # noqa: F401
        except ImportError:
            return {"skipped": "eai-sparsify is not installed"}
    free()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    step = stepper_of(kind, s, precision, device, **options)
    try:
        for i in range(6):  # a graph is captured at the fifth
            step(i)
        synchronize(device)
        found = timed(step, device, n=2 if args.tiny else 10)
        if device != "cpu":
            found["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
        found |= launches(step, device)
    finally:
        del step
        free()
    return found | compared(kind, s, precision, args, found["ms"])


def timed(step: Callable[[int], Any], device: str, n: int) -> dict[str, float]:
    """Of n steps one after the other, as in training: from the first one's begin to the last one's end."""
    start = time.perf_counter()
    for i in range(n):
        step(i)
    host_ms = 1e3 * (time.perf_counter() - start) / n
    synchronize(device)
    ms = 1e3 * (time.perf_counter() - start) / n
    return {"ms": ms, "host_ms": host_ms}


def launches(step: Callable[[int], Any], device: str) -> dict[str, Any]:
    """Kernels of one step, the five that take longest, and the milliseconds of all."""
    if device == "cpu":
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step(0)
        return {"operators": sum(1 for e in profiler.events() if e.name.startswith("aten::"))}  # type: ignore[union-attr]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step(0)
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in profiler.events():  # type: ignore[union-attr]
        # Ranges such as an optimiser's step are drawn on the device's line too, over the kernels that they hold.
        is_range = getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer.")
        if event.device_type == torch.autograd.DeviceType.CUDA and not is_range:
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    longest = sorted(kernels, key=lambda name: -sum(kernels[name]))[:5]
    return {
        "launches": sum(map(len, kernels.values())),
        "device_ms": sum(map(sum, kernels.values())),
        "longest": {name[:80]: [len(kernels[name]), round(sum(kernels[name]), 4)] for name in longest},
        "waits": sum(1 for e in profiler.events() if "StreamSynchronize" in e.name),  # type: ignore[union-attr]
    }


def compared(kind: str, s: Shape, precision: str, args: argparse.Namespace, ms: float) -> dict[str, Any]:
    """Against the floor at the ceilings that were measured; the table adds SAELens's TopK of the same shape."""
    primitives = args.output / "primitives.json"
    ceilings = shapes.ceilings_of(Record(primitives).cases if primitives.exists() else {})
    floor = shapes.step_ms(s if kind == "switch" else s._replace(E=1), precision, ceilings)
    return {"kind": kind, "shape": s._asdict(), "precision": precision, "floor_ms": floor, "times_floor": ms / floor}
