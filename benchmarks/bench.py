"""Training steps of sparse autoencoders, side by side: time and memory of ours and of the others.

    make bench        # or: python benchmarks/bench.py --help

One process, one batch, the same weights. First every contestant's loss and gradients are compared with those of the
one that computes the same function the plain way; only then is anything timed. Rounds go through all contestants in
turn, so what disturbs the machine disturbs them all; the table has medians over rounds, and ratios. Peak memory is
that of a process of its own for each, on a GPU that of its allocator. On a machine with a GPU everything runs there,
and the report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "0" if os.path.exists("/dev/nvidia0") else "1")
warnings.filterwarnings("ignore")

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from sae_lens_switch import (
    SparseSAETrainer,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)
from sae_lens_switch.cost import Cost, Machine
from sae_lens_switch.training.optim.constrained_adam import step_in_memory_order

LR = 1e-4
# Of a gradient's norm. Ties within rounding select other latents: a few rows of a few thousand in float32; in bfloat16
# up to 3 % of the selected, a quarter of a gradient's norm, since these are random weights. The loss hardly changes.
_TOLERATED = {"float64": 0.02, "float32": 0.02, "TF32": 0.1, "float16": 0.1, "bfloat16": 0.4}
BASELINE = "SAELens topk"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    if args.memory_of:
        print(json.dumps(peak_memory(args)))
        return
    names = [name for name in contestants(args) if not args.only or name in args.only]
    setting = f"B {args.batch:,}, D {args.d_in:,}, F {args.d_sae:,}, k {args.k}, {precision(args)}, {machine(args)}"
    print(setting)
    check_closeness(args, names)
    runners = {name: contestants(args)[name](args) for name in names}
    rows = {name: Row() for name in names}
    encoder = bare_encoder(args)
    for round_ in range(args.rounds + 1):  # the first warms up
        encoder_ms = timed(encoder, args.device)
        for name, runner in runners.items():
            step_ms = timed(runner.step, args.device)
            if round_:
                rows[name].add(runner.forward_backward_ms, step_ms, encoder_ms)
    del runners
    if not args.no_memory:
        for name in names:
            args.memory_of = name
            rows[name].peak_bytes = json.loads(child(args, name)) if args.device == "cpu" else peak_memory(args)
        args.memory_of = None
    report = {"setting": setting, "arguments": vars(args) | {"output": str(args.output)}, "torch": torch.__version__}
    report["results"] = {name: row.summary(rows.get(BASELINE)) for name, row in rows.items()}
    if not args.no_loop:
        report["loop"] = loop(args, names)
    if not args.no_width:
        report["width"] = width(args)
    print_report(report)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {args.output}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4096, help="tokens in a step")
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=24576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128], help="of the Switch SAEs")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tf32", action="store_true", help="float32 products of a GPU on its tensor cores, as TF32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", help="contestants by name")
    parser.add_argument("--no-memory", action="store_true", help="skip the processes that measure memory")
    parser.add_argument("--no-loop", action="store_true", help="skip whole steps through the trainers")
    parser.add_argument("--no-width", action="store_true", help="skip the comparison at constant expert width")
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def precision(args: argparse.Namespace) -> str:
    return "TF32" if args.tf32 and args.dtype == "float32" else args.dtype


def machine(args: argparse.Namespace) -> str:
    if args.device == "cpu":
        return f"{torch.get_num_threads()} threads of {platform.machine()}, no GPU"
    return torch.cuda.get_device_name()


# What is measured


@dataclass
class Row:
    """Milliseconds of each round, and bytes. What SAELens's trainer spends before its optimiser cannot be seen."""

    forward_backward: list[float | None] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    encoder: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def add(self, forward_backward: float | None, step: float, encoder: float) -> None:
        self.forward_backward.append(forward_backward)
        self.step.append(step)
        self.encoder.append(encoder)

    def summary(self, baseline: Row | None) -> dict[str, Any]:
        """Ratios are medians of the rounds' own ratios."""
        over = [] if baseline is None else [b / s for b, s in zip(baseline.step, self.step, strict=True)]
        both = [ms for ms in self.forward_backward if ms is not None]
        return {
            "forward_backward_ms": statistics.median(both) if both else None,
            "step_ms": statistics.median(self.step),
            "faster_than_SAELens": statistics.median(over) if over else None,
            "times_the_bare_encoder": statistics.median(s / e for s, e in zip(self.step, self.encoder, strict=True)),
            "peak_GB": None if self.peak_bytes is None else self.peak_bytes / 1e9,
        }


def timed(call: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def bare_encoder(args: argparse.Namespace) -> Callable[[], Any]:
    x, W = batch(args), weights(args)[0]
    return lambda: x @ W


def child(args: argparse.Namespace, name: str) -> str:
    options = [
        f"--{n}={getattr(args, n.replace('-', '_'))}" for n in ("batch", "d-in", "d-sae", "k", "dtype", "device")
    ]
    command = [sys.executable, __file__, *options, "--memory-of", name, "--experts", *map(str, args.experts)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]


def peak_memory(args: argparse.Namespace) -> int:
    """Of this process on a CPU, of the device's allocator on a GPU, over two steps."""
    if args.device != "cpu":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    runner = contestants(args)[args.memory_of](args)
    for _ in range(2):
        runner.step()
    if args.device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins with that of the parent process
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])  # type: ignore[index]
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check_closeness(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Loss and gradients of each contestant against the plain one of its kind."""
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


def truth_of(name: str) -> str:
    if "experts" not in name:
        return BASELINE
    return "all experts, masked, " + name.split(", ")[-1]


def loop(args: argparse.Namespace, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Whole steps of ``fit``, from one batch drawn to the next, beside forward, backward and fused Adam alone."""
    table = contestants(args)
    ours = {n: table[n](args) for n in names if n.startswith("ours")}
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
    return Cost("switch", n_experts=int(name.split()[2]), **shape)


class Loop:
    """A trainer that goes on for a few steps whenever it is asked to, on an SAE of its own."""

    STEPS = 3

    def __init__(self, trainer_class: type[SAETrainer], contestant: Contestant) -> None:
        args = contestant.args
        self.batch, self.device, self.drawn = contestant.x, args.device, []
        long = 10**9  # so that what is kept of a few steps in all runs is not kept of each
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


# Who is measured: the same batch and weights for all


def batch(args: argparse.Namespace) -> Tensor:
    return normal(args, 1, args.batch, args.d_in).to(getattr(torch, args.dtype))


def normal(args: argparse.Namespace, stream: int, *shape: int) -> Tensor:
    """float32, drawn where it is needed, each time the same."""
    generator = torch.Generator(args.device).manual_seed(args.seed + stream)
    return torch.randn(*shape, generator=generator, device=args.device)


def weights(args: argparse.Namespace, F: int | None = None) -> tuple[Tensor, Tensor]:
    """W_enc [D, F] and W_dec [F, D] of unit rows, each other's transposes."""
    W_dec = normal(args, 0, F or args.d_sae, args.d_in).to(getattr(torch, args.dtype))
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return W_dec.T.contiguous(), W_dec


def contestants(args: argparse.Namespace) -> dict[str, Callable[[argparse.Namespace], Any]]:
    table: dict[str, Callable[[argparse.Namespace], Any]] = {
        BASELINE: lambda a: Stock(a),
        "SAELens topk, no rescaling": lambda a: Stock(a, rescale_acts_by_decoder_norm=False),
        "SAELens topk, sparse mode": lambda a: Stock(
            a, rescale_acts_by_decoder_norm=False, use_sparse_activations=True
        ),
    }
    try:
        import sparsify  # noqa: F401
    except ImportError:
        print("sparsify is not installed: pip install eai-sparsify")
    else:
        table["sparsify"] = Sparsify
    table["ours: sparse_topk"] = lambda a: Ours(a, sparse_topk(a))
    E = 32 if 32 in args.experts else args.experts[0]  # the number makes no difference to its time
    table[f"all experts, masked, {E} experts"] = lambda a, E=E: Masked(a, E)
    for E in args.experts:
        table[f"ours: switch, {E} experts"] = lambda a, E=E: Ours(a, switch_sae(a, E))
    return table


class Contestant:
    """A training step: forward, backward, clipping, Adam. ``forward`` gives the loss."""

    module: nn.Module
    forward_backward_ms: float | None = None  # of the last step

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.x = args, batch(args)

    def ready(self) -> None:
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=LR, fused=True)
        step_in_memory_order(self.optimizer)

    def forward(self) -> Tensor:
        raise NotImplementedError

    def forward_backward(self) -> None:
        self.forward_backward_ms = timed(lambda: self.forward().backward(), self.args.device)

    def step(self) -> None:
        self.forward_backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.module.zero_grad()

    def bare_step(self) -> None:
        """Forward, backward and fused Adam, and nothing else."""
        if not hasattr(self, "optimizer"):
            self.ready()
        self.optimizer.applies_constraint = True  # type: ignore[attr-defined], that is: none is applied
        self.forward().backward()
        self.optimizer.step()
        self.module.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """Of the squared error alone, latent-major."""
        loss = self.forward()
        loss.backward()
        found = {"loss": loss.detach(), **{n: g for n, g in self.named_gradients().items() if g is not None}}
        self.module.zero_grad()
        return found

    def named_gradients(self) -> dict[str, Tensor | None]:
        m: Any = self.module
        return {"W_enc": m.W_enc.grad.T, "W_dec": m.W_dec.grad, "b_dec": m.b_dec.grad}


class Ours(Contestant):
    """Our SAEs in a plain loop with torch's fused Adam, dead latents counted; the decoder's constraint included."""

    def __init__(self, args: argparse.Namespace, sae: Any) -> None:
        super().__init__(args)
        self.module = sae
        self.coefficients = {name: float(getattr(c, "value", c)) for name, c in sae.get_coefficients().items()}
        self.since_fired = torch.zeros(sae.cfg.d_sae, device=args.device)
        sae.refuses_not_finite = args.device == "cpu"  # which waits for a GPU; our trainer turns it off as well
        self.ready()

    def forward(self) -> Tensor:
        output = self.module.training_forward_pass(
            TrainStepInput(
                sae_in=self.x,
                coefficients=self.coefficients,
                dead_neuron_mask=None,
                n_training_steps=1,
                is_logging_step=False,
            )
        )
        self.codes = output.codes
        return output.loss

    def step(self) -> None:
        super().step()
        values, indices = self.codes.values.flatten(), self.codes.indices.flatten()
        self.since_fired.add_(1)
        since = self.since_fired[indices].masked_fill_(values > 0, 0)  # without a wait for how many there are
        self.since_fired.scatter_reduce_(0, indices, since, "amin")


def sparse_topk(args: argparse.Namespace) -> SparseTopKTrainingSAE:
    return with_weights(SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**fields(args))), args)


def switch_sae(args: argparse.Namespace, n_experts: int, d_sae: int | None = None) -> SwitchTrainingSAE:
    options = fields(args) | {"n_experts": n_experts, "d_sae": d_sae or args.d_sae}
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(**options, load_balance_coefficient=0.0))
    sae.is_fresh = False  # no start from the first batch: the same weights for all
    with_weights(sae, args, d_sae)
    with torch.no_grad():
        sae.W_router.copy_(router(args, n_experts))
    return sae


def router(args: argparse.Namespace, n_experts: int) -> Tensor:
    return normal(args, 2, args.d_in, n_experts) / args.d_in**0.5


def fields(args: argparse.Namespace) -> dict[str, Any]:
    return {"d_in": args.d_in, "d_sae": args.d_sae, "k": args.k, "device": args.device, "dtype": args.dtype}


def with_weights(sae: Any, args: argparse.Namespace, F: int | None = None) -> Any:
    W_enc, W_dec = weights(args, F)
    with torch.no_grad():
        sae.W_enc.copy_(W_enc)
        sae.W_dec.copy_(W_dec)
    return sae


class Stock(Contestant):
    """SAELens as it is: its TopK SAE, its trainer's step."""

    def __init__(self, args: argparse.Namespace, **options: Any) -> None:
        super().__init__(args)
        self.module = with_weights(TopKTrainingSAE(TopKTrainingSAEConfig(**fields(args), **options)), args)
        cfg = SAETrainerConfig(
            lr=LR,
            lr_end=LR,
            total_training_samples=10**9,
            train_batch_size_samples=args.batch,
            device=args.device,
            autocast=False,
            n_checkpoints=0,
            checkpoint_path=None,
        )
        self.trainer = SAETrainer(cfg=cfg, sae=self.module, data_provider=iter([]))

    def forward(self) -> Tensor:
        return self.module.training_forward_pass(
            TrainStepInput(
                sae_in=self.x, coefficients={}, dead_neuron_mask=None, n_training_steps=1, is_logging_step=False
            )
        ).loss

    def step(self) -> None:
        self.kept = self.trainer.step(self.x)  # as its fit() keeps the last output
        self.trainer.n_training_steps += 1


class Masked(Contestant):
    """The Switch formula as the authors' code goes about it: all experts, then a mask, then a top-k over all."""

    def __init__(self, args: argparse.Namespace, n_experts: int) -> None:
        super().__init__(args)
        W_enc, W_dec = weights(args)
        parameters = {
            "W_enc": W_enc,
            "W_dec": W_dec,
            "b_dec": torch.zeros(args.d_in),
            "W_router": router(args, n_experts).to(W_enc.dtype),
        }
        self.module = nn.Module()
        for name, data in parameters.items():
            self.module.register_parameter(name, nn.Parameter(data.to(args.device, W_enc.dtype)))
        self.width = args.d_sae // n_experts
        self.ready()

    def forward(self) -> Tensor:
        m: Any = self.module
        gate, expert = (self.x @ m.W_router).softmax(-1).max(-1)
        pre = (self.x - m.b_dec) @ m.W_enc
        owner = torch.arange(pre.shape[1], device=pre.device) // self.width
        acts = pre.relu() * gate.unsqueeze(1) * (owner == expert.unsqueeze(1))
        top = acts.topk(self.args.k, dim=-1, sorted=False)
        sparse = torch.zeros_like(acts).scatter(-1, top.indices, top.values)
        return (sparse @ m.W_dec + m.b_dec - self.x).square().sum(-1).mean()


class Sparsify(Contestant):
    """EleutherAI's SparseCoder, with its own projection and normalisation of the decoder, and torch's fused Adam."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        from sparsify import SparseCoder
        from sparsify.config import SparseCoderConfig

        cfg = SparseCoderConfig(num_latents=args.d_sae, k=args.k)
        self.module = SparseCoder(args.d_in, cfg, device=args.device, dtype=getattr(torch, args.dtype))
        W_dec = weights(args)[1]
        with torch.no_grad():
            self.module.encoder.weight.copy_(W_dec)
            self.module.W_dec.copy_(W_dec)
        # Its loss is a share of the variance; in the units of the others:
        self.scale = (self.x - self.x.mean(0)).square().sum() / args.batch
        self.ready()

    def forward(self) -> Tensor:
        return self.scale * self.module(self.x).fvu

    def named_gradients(self) -> dict[str, Tensor | None]:
        m: Any = self.module
        return {"W_enc": m.encoder.weight.grad, "W_dec": m.W_dec.grad, "b_dec": m.b_dec.grad}

    def step(self) -> None:
        m: Any = self.module
        m.set_decoder_norm_to_unit_norm()
        self.forward_backward()
        m.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        self.optimizer.step()
        m.zero_grad()


def print_report(report: dict[str, Any]) -> None:
    print(f"{'':34}{'fwd+bwd':>10}{'step':>10}{'vs SAELens':>12}{'x @ W_enc':>11}{'peak':>9}")
    for name, r in report["results"].items():
        over = "" if r["faster_than_SAELens"] is None else f"{r['faster_than_SAELens']:.1f} x"
        peak = "" if r["peak_GB"] is None else f"{r['peak_GB']:.2f} GB"
        both = "" if r["forward_backward_ms"] is None else f"{r['forward_backward_ms']:.0f} ms"
        print(f"{name:34}{both:>10}{r['step_ms']:7.0f} ms{over:>12}{r['times_the_bare_encoder']:>9.2f} x{peak:>9}")
    if "loop" in report:
        print("\nwhole steps of the trainer's fit(), beside forward + backward + fused Adam, and as predicted")
        for name, r in report["loop"].items():
            print(
                f"{name:34}{r['bare_ms']:7.0f} ms{r['loop_ms']:7.0f} ms{r['times_bare']:9.2f} x"
                f"{r['steps_per_s']:9.2f} steps/s{r['predicted_ms']:9.0f} ms"
            )
        print()
    if "width" in report:
        (small, a), (large, b) = list(report["width"].items())[1:]
        print(
            f"switch, experts of constant width, fwd+bwd: {small} {a:.0f} ms, {large} {b:.0f} ms, "
            f"ratio {report['width']['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
