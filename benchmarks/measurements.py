"""What the benchmark measures of each contestant: closeness, time, memory, whole steps of a trainer."""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from contestants import (
    BASELINE,
    LOW,
    LR,
    Contestant,
    Ours,
    batch,
    contestants,
    shared_width,
    switch_sae,
    timed,
    weights,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_lens_switch import SparseSAETrainer
from sae_lens_switch.cost import Cost, Machine

# Of a gradient's norm. Near ties select other latents: a few rows in a few thousand in float32; in bfloat16 up to 3 %
# of the selected, a quarter of a gradient's norm, since these weights are random. The loss hardly changes.
_TOLERATED = {"float64": 0.02, "float32": 0.02, "TF32": 0.1, "float16": 0.1, "bfloat16": 0.4}


def precision(args: argparse.Namespace) -> str:
    return "TF32" if args.tf32 and args.dtype == "float32" else args.dtype


def machine(args: argparse.Namespace) -> str:
    if args.device == "cpu":
        return f"{torch.get_num_threads()} threads of {platform.machine()}, no GPU"
    return torch.cuda.get_device_name()


@dataclass
class Row:
    """Milliseconds per round, and peak bytes. SAELens's trainer has no separate time of forward and backward."""

    forward_backward: list[float | None] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    encoder: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def add(self, forward_backward: float | None, step: float, encoder: float) -> None:
        self.forward_backward.append(forward_backward)
        self.step.append(step)
        self.encoder.append(encoder)

    def summary(self, baseline: Row | None) -> dict[str, Any]:
        """Medians over rounds; ratios are medians of per-round ratios."""
        over = [] if baseline is None else [b / s for b, s in zip(baseline.step, self.step, strict=True)]
        both = [ms for ms in self.forward_backward if ms is not None]
        return {
            "forward_backward_ms": statistics.median(both) if both else None,
            "step_ms": statistics.median(self.step),
            "faster_than_SAELens": statistics.median(over) if over else None,
            "times_the_bare_encoder": statistics.median(s / e for s, e in zip(self.step, self.encoder, strict=True)),
            "peak_GB": None if self.peak_bytes is None else self.peak_bytes / 1e9,
        }


def bare_encoder(args: argparse.Namespace) -> Callable[[], Any]:
    x, W = batch(args), weights(args)[0]
    return lambda: x @ W


def child(args: argparse.Namespace, name: str) -> str:
    options = [
        f"--{n}={getattr(args, n.replace('-', '_'))}" for n in ("batch", "d-in", "d-sae", "k", "dtype", "device")
    ]
    command = [
        sys.executable,
        str(Path(__file__).with_name("bench.py")),
        *options,
        "--memory-of",
        name,
        "--experts",
        *map(str, args.experts),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]


def peak_memory(args: argparse.Namespace) -> int:
    """Peak memory of two steps: of this process on a CPU, of the allocator on a GPU."""
    if args.device != "cpu":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    runner = contestants(args)[args.memory_of](args)
    for _ in range(2):
        runner.step()
    if args.device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts from that of the parent process
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])  # type: ignore[index]
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check_closeness(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Compare the loss and gradients of each contestant with those of the plain one of its kind."""
    truths: dict[str, dict[str, Tensor]] = {}
    for name in sorted(names, key=lambda n: n != truth_of(n)):
        kind = truth_of(name)
        if kind == name:
            truths[name] = contestants(args)[name](args).gradients()
        elif kind in truths:
            gradients = contestants(args)[name](args).gradients()
            for key in gradients.keys() & truths[kind].keys():
                a, b = gradients[key], truths[kind][key]
                error = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
                if not error <= (_TOLERATED["float32"] if key == "loss" else _TOLERATED[precision(args)]):
                    raise SystemExit(f"{name}: {key} is off from {kind}'s by a ratio of {error:.3g}")


def rival_of(name: str) -> str:
    """SAELens's own of the kind, which a step is compared with; TopK for those that it does not have."""
    kinds = ("matryoshka_batchtopk", "batchtopk")
    return next((f"SAELens {kind}" for kind in kinds if name.endswith(kind)), BASELINE)


def truth_of(name: str) -> str:
    name = name.removesuffix(LOW)
    if "experts" not in name:
        return rival_of(name)
    return "all experts, masked, " + name.split(", ")[-1]


def loop(args: argparse.Namespace, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Time whole steps of ``fit``, from one batch to the next, beside forward, backward and fused Adam alone."""
    table = contestants(args)
    # Of those that the cost model knows.
    ours = {n: table[n](args) for n in names if n.startswith("ours") and not n.endswith((LOW, "batchtopk"))}
    stock = {n: table[n](args) for n in names if n == BASELINE}
    loops = {n: Loop(SAETrainer, c) for n, c in stock.items()} | {n: Loop(SparseSAETrainer, c) for n, c in ours.items()}
    times: dict[str, list[tuple[float, float]]] = {n: [] for n in loops}
    for round_ in range(args.rounds + 1):
        for name, contestant in (stock | ours).items():
            bare_ms = timed(contestant.bare_step, args.device)
            loop_ms = loops[name].step_ms()
            if round_:
                times[name].append((bare_ms, loop_ms))
    del stock, ours, loops
    costs = {name: cost_of(args, name) for name in times}
    machines = {n: Machine.this_one(args.d_in, args.k, c.expert_width, args.device) for n, c in costs.items()}
    return {
        name: {
            "predicted_ms": 1e3 * costs[name].step_seconds(machines[name]),
            "bare_ms": statistics.median(b for b, _ in pairs),
            "loop_ms": statistics.median(t for _, t in pairs),
            "times_bare": statistics.median(t / b for b, t in pairs),
            "steps_per_s": 1e3 / statistics.median(t for _, t in pairs),
        }
        for name, pairs in times.items()
    }


def cost_of(args: argparse.Namespace, name: str) -> Cost:
    shape = {"d_in": args.d_in, "d_sae": args.d_sae, "k": args.k, "batch": args.batch}
    if name == BASELINE:
        return Cost("topk", **shape)
    if name == "ours: sparse_topk":
        return Cost("sparse_topk", **shape)
    found = re.fullmatch(r"ours: switch, (?:(\d+) of )?(\d+) experts( and 1 shared)?", name)
    n_active, E = int(found[1] or 1), int(found[2])  # type: ignore[index]
    shared = {"n_shared_experts": 1, "shared_width": shared_width(args, E)} if found[3] else {}  # type: ignore[index]
    return Cost("switch", n_experts=E, n_active_experts=n_active, **shape, **shared)


class Loop:
    """A trainer that continues for a few steps per call, with its own SAE."""

    STEPS = 3

    def __init__(self, trainer_class: type[SAETrainer], contestant: Contestant) -> None:
        args = contestant.args
        self.batch, self.device, self.drawn = contestant.x, args.device, []
        long = 10**9  # so that nothing is recorded per step that a real run records rarely
        cfg = SAETrainerConfig(
            lr=LR, lr_end=LR, total_training_samples=long, train_batch_size_samples=args.batch, device=args.device
        )
        sae: Any = copy.deepcopy(contestant.module)
        self.trainer = trainer_class(cfg, sae, self.batches())
        self.trainer.cfg.total_training_samples = 0

    def batches(self) -> Iterator[Tensor]:
        while True:
            if self.device != "cpu":
                torch.cuda.synchronize()
            self.drawn.append(time.perf_counter())
            yield self.batch

    def step_ms(self) -> float:
        self.drawn.clear()
        self.trainer.cfg.total_training_samples += self.STEPS * len(self.batch)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            self.trainer.fit()
        return 1e3 * (self.drawn[-1] - self.drawn[0]) / (self.STEPS - 1)


def width(args: argparse.Namespace) -> dict[str, float]:
    """Forward and backward of a Switch SAE with experts of 768 latents, or a divisor, at F and at 8 F."""
    M = math.gcd(768, args.d_sae)
    saes = {F: Ours(args, switch_sae(args, F // M, F)) for F in (args.d_sae, 8 * args.d_sae)}
    times: dict[int, list[float]] = {F: [] for F in saes}
    for round_ in range(args.rounds + 1):
        for F, runner in saes.items():
            runner.forward_backward()
            runner.module.zero_grad()
            if round_:
                times[F].append(runner.forward_backward_ms)
    small, large = times.values()
    ratio = statistics.median(b / a for a, b in zip(small, large, strict=True))
    return {"ratio": ratio, **{f"F={F}": statistics.median(ms) for F, ms in times.items()}}
