"""What an SAE costs before it is trained: parameters, FLOPs, memory, bytes moved, and the time of a training step.

    python -m sae_lens_switch.cost --architecture switch --d-in 768 --d-sae 24576 --n-experts 32 --k 32

FLOPs count a multiply and an add as two. ``paper_flops`` is the count of arXiv 2410.08201: the encoder of one expert,
2MD, and the router, 2ED. The rest of the table is the whole truth: backward pass, clipping, optimiser.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from sae_lens_switch_kernels import matmul_at_indices, sparse_decode
from sae_lens_switch_kernels.torch_backend import select_topk

from sae_lens_switch.training.field_rules import OptimizerName

Architecture = Literal["switch", "sparse_topk", "topk"]

# Passes over a [B, D] tensor in a step: centring, sorting, bias, error, its square, their gradients, and what torch
# copies between them. Measured.
_TOKEN_PASSES = 80
# Passes over the weights of both matrices: norms; for `switch` also projection and renormalisation. Measured.
_CONSTRAINT_PASSES = {"switch": 7.5, "sparse_topk": 1.2, "topk": 3.0}
# Tensors of B x F that SAELens makes in a step, each new memory, and how often each is read.
_DENSE_TENSORS, _DENSE_READS = 14, 2


@dataclass(frozen=True)
class Machine:
    """How fast a machine does the six things that a training step is made of.

    flops:   of a float32 (or whatever is trained in) matrix product, per second
    gather:  bytes per second of rows of a matrix that does not fit into cache, read at random
    regather: the same of a batch of activations, which may
    stream:  bytes per second read or written in order
    select:  pre-activations per second that top-k looks through, at the width and k in question
    fresh:   bytes per second of memory that is written for the first time
    """

    flops: float
    gather: float
    regather: float
    stream: float
    select: float
    fresh: float

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} must be positive; got {getattr(self, field.name)!r}")

    @classmethod
    def this_one(cls, d_in: int = 768, k: int = 32, expert_width: int = 24576, device: str = "cpu") -> "Machine":
        """Measured here, in a few seconds, at these sizes."""
        generator = torch.Generator().manual_seed(0)
        B, F, block = 4096, max(4096, (1 << 24) // d_in), 1024
        x = torch.randn(B, d_in, generator=generator).to(device)
        W = torch.randn(F, d_in, generator=generator).to(device)
        out = torch.empty(512, block, device=device)
        indices = torch.randint(0, F, (B, k), generator=generator).to(device)
        tokens = torch.randint(0, B, (B, k), generator=generator).to(device)
        values = torch.randn(B, k, generator=generator).to(device)
        pre = torch.randn(512, max(k, min(expert_width, 1 << 15)), generator=generator).to(device)
        weights = torch.nn.Parameter(W.clone())
        weights.grad = torch.ones_like(W)
        adam = torch.optim.Adam([weights], lr=1e-9, fused=True)
        product = _seconds(lambda: [torch.mm(r, W[:block].T, out=out) for r in x.split(512)], device)
        gather = _seconds(lambda: (sparse_decode(values, indices, W), matmul_at_indices(x, W, indices)), device)
        regather = _seconds(lambda: sparse_decode(values, tokens, x), device)
        stream = _seconds(adam.step, device)
        fresh = _seconds(lambda: torch.empty(1 << 26, device=device).fill_(1), device)
        select = _seconds(lambda: select_topk(pre, k), device)
        bytes_gathered = 4 * B * k * d_in
        return cls(
            flops=2 * B * d_in * block / product,
            gather=2 * bytes_gathered / gather,
            regather=bytes_gathered / regather,
            stream=7 * 4 * W.numel() / stream,
            select=pre.numel() / select,
            fresh=4 * (1 << 26) / fresh,
        )


def _seconds(call: Callable[[], Any], device: str) -> float:
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]


@dataclass(frozen=True)
class Cost:
    """The cost of an SAE of a given shape and of one of its training steps, by formula.

    ``topk`` is SAELens's own, dense; ``sparse_topk`` and ``switch`` are ours.
    """

    architecture: Architecture
    d_in: int
    d_sae: int
    k: int
    n_experts: int = 1
    batch: int = 4096
    optimizer: OptimizerName = "adam"
    bytes_per_weight: int = 4

    def __post_init__(self) -> None:
        if self.architecture not in ("switch", "sparse_topk", "topk"):
            raise ValueError(f"architecture must be switch, sparse_topk or topk; got {self.architecture!r}")
        for name in ("d_in", "d_sae", "k", "n_experts", "batch", "bytes_per_weight"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")
        if self.architecture != "switch" and self.n_experts != 1:
            raise ValueError(f"n_experts must be 1 unless architecture is 'switch'; got {self.n_experts}")
        if self.d_sae % self.n_experts:
            raise ValueError(f"n_experts must divide d_sae={self.d_sae}; got {self.n_experts}")
        if self.k > self.expert_width:
            raise ValueError(f"k must be at most d_sae / n_experts = {self.expert_width}; got {self.k}")

    @property
    def expert_width(self) -> int:
        return self.d_sae // self.n_experts

    @property
    def rows(self) -> int:
        """Latents whose weights an optimiser step touches: all, or at most those that can be active in a batch."""
        return self.d_sae if self.optimizer == "adam" else min(self.d_sae, self.batch * self.k)

    @property
    def parameters(self) -> dict[str, int]:
        D, F = self.d_in, self.d_sae
        counts = {"W_enc": D * F, "W_dec": F * D, "b_dec": D}
        if self.architecture == "switch":
            return counts | {"W_router": D * self.n_experts, "b_router": D}
        return counts | {"b_enc": F}

    @property
    def paper_flops(self) -> int:
        """Per activation, as arXiv 2410.08201 counts them: 2MD, and the router's 2ED."""
        router = 2 * self.n_experts * self.d_in if self.architecture == "switch" else 0
        return 2 * self.expert_width * self.d_in + router

    @property
    def flops(self) -> dict[str, float]:
        """Per activation, by part."""
        D, F, K, M, B = self.d_in, self.d_sae, self.k, self.expert_width, self.batch
        router = 2 * D * self.n_experts if self.architecture == "switch" else 0
        dense = self.architecture == "topk"
        weights = 2 * self.rows * D
        return {
            "router": 3 * router,  # forward, and the gradients of W_router and b_router
            "encoder": 2 * D * M,
            "decoder": 2 * D * (F if dense else K),
            "latent gradient": 2 * D * (F if dense else K),
            "decoder gradient": 2 * D * (F if dense else K),
            "encoder gradient": 2 * D * (F if dense else K),
            "pre-bias gradient": 2 * D * (F if dense else self.rows / B),
            "clipping and constraint": (2 + (4 if self.architecture == "switch" else 0)) * weights / B,
            "optimiser": 12 * weights / B,
        }

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that a training step holds at its fullest."""
        B, D, K, n = self.batch, self.d_in, self.k, sum(self.parameters.values())
        masters = 4 * n if self.bytes_per_weight < 4 else 0
        if self.architecture == "topk":  # from the second step on SAELens holds seven tensors of B x F
            latents = 7 * 4 * B * self.d_sae
        else:  # codes, their gradients and index, and the tile in which pre-activations are searched
            latents = B * K * (4 * 4 + 4 * 8) + 4 * 512 * min(self.expert_width, 1 << 15)
        return {
            "weights": self.bytes_per_weight * n,
            "gradients": self.bytes_per_weight * 2 * self.rows * D,
            "optimiser": 2 * 4 * n + masters,
            "activations": 6 * 4 * B * D,
            "latents": latents,
        }

    @property
    def bytes_moved(self) -> dict[str, float]:
        """Between memory and processor in a step, by part."""
        w, B, D, F, K = self.bytes_per_weight, self.batch, self.d_in, self.d_sae, self.k
        reached = min(self.n_experts, B) * self.expert_width  # latents of experts that have a token
        touched = 2 * w * self.rows * D
        if self.architecture == "topk":
            return {
                "dense latents, written": _DENSE_TENSORS * 4 * B * F,
                "dense latents, read": _DENSE_READS * _DENSE_TENSORS * 4 * B * F,
                "clipping": _CONSTRAINT_PASSES["topk"] * touched,
                "optimiser": 7 * touched,
            }
        return {
            "router": w * D * self.n_experts,
            "encoder": w * D * reached,
            "decoder": w * B * K * D,
            "latent gradient": w * B * K * D,
            "weight gradients": 2 * w * B * K * D + touched,
            "pre-bias gradient": w * self.rows * D,
            "clipping and constraint": _CONSTRAINT_PASSES[self.architecture] * touched,
            "optimiser": 7 * touched,
            "tokens": _TOKEN_PASSES * 4 * B * D,
        }

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Of one training step, by part; their sum is the prediction."""
        B, D, M, K = self.batch, self.d_in, self.expert_width, self.k
        moved, flops = self.bytes_moved, self.flops
        if self.architecture == "topk":
            work = sum(flops[n] for n in flops if n in _MATRIX_PRODUCTS)
            return {
                "matrix products": B * work / machine.flops,
                "top-k": B * M / machine.select,
                "dense latents, written": moved["dense latents, written"] / machine.fresh,
                **{n: moved[n] / machine.stream for n in ("dense latents, read", "clipping", "optimiser")},
            }
        return {
            "router": B * flops["router"] / machine.flops,
            "encoder": B * flops["encoder"] / machine.flops + moved["encoder"] / machine.stream,
            "top-k": B * M / machine.select,
            "decoder": moved["decoder"] / machine.gather,
            "latent gradient": moved["latent gradient"] / machine.gather,
            "weight gradients": 8 * B * K * D / machine.regather + 2 * 4 * self.rows * D / machine.stream,
            **{
                name: moved[name] / machine.stream
                for name in ("pre-bias gradient", "clipping and constraint", "optimiser", "tokens")
            },
        }

    def step_seconds(self, machine: Machine) -> float:
        return sum(self.seconds(machine).values())


_MATRIX_PRODUCTS = (
    *("encoder", "decoder", "latent gradient"),
    *("decoder gradient", "encoder gradient", "pre-bias gradient"),
)


def main(argv: Sequence[str] | None = None) -> None:
    args = vars(_parser().parse_args(argv))
    described = {f.name: args.pop(f.name) for f in fields(Machine)}
    measure = args.pop("measure")
    try:
        cost = Cost(**args)
        given = {name: value for name, value in described.items() if value is not None}
        if given and len(given) < len(described):
            missing = ", ".join("--" + name for name in described if name not in given)
            raise ValueError(f"a machine is described by all six numbers; missing: {missing}")
        machine = Machine(**given) if given else None
        if measure and machine is None:
            machine = Machine.this_one(cost.d_in, cost.k, cost.expert_width)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(describe(cost, machine))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sae_lens_switch.cost",
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--architecture", default="switch", choices=["switch", "sparse_topk", "topk"])
    parser.add_argument("--d-in", type=int, required=True)
    parser.add_argument("--d-sae", type=int, required=True)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--n-experts", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4096, help="activations in a training step")
    parser.add_argument("--optimizer", default="adam", choices=["adam", "row_sparse_adam"])
    parser.add_argument("--bytes-per-weight", type=int, default=4)
    machine = parser.add_argument_group("the machine", "all six numbers, or --measure")
    machine.add_argument("--measure", action="store_true", help="predict for this machine, measured for a few seconds")
    for name, unit in (
        ("flops", "of matrix products, per second"),
        ("gather", "bytes per second of rows read at random from memory"),
        ("regather", "bytes per second of rows read at random from a batch of activations"),
        ("stream", "bytes per second in order"),
        ("select", "numbers per second that top-k looks through"),
        ("fresh", "bytes per second of memory written for the first time"),
    ):
        machine.add_argument(f"--{name}", type=float, help=unit)
    return parser


def describe(cost: Cost, machine: Machine | None = None) -> str:
    """The table that the command prints."""
    lines = [", ".join(f"{name} {value}" for name, value in asdict(cost).items())]
    lines += ["", f"parameters {sum(cost.parameters.values()):,}"]
    lines += [f"  {name:26}{value:18,}" for name, value in cost.parameters.items()]
    lines += ["", f"FLOPs an activation: {sum(cost.flops.values()):,.0f}; {cost.paper_flops:,} as the paper counts"]
    lines += [f"  {name:26}{value:18,.0f}" for name, value in cost.flops.items()]
    lines += ["", f"memory of a training step: {sum(cost.memory.values()) / 1e9:.3f} GB"]
    lines += [f"  {name:26}{value / 1e9:15.3f} GB" for name, value in cost.memory.items()]
    lines += ["", f"bytes moved in a step: {sum(cost.bytes_moved.values()) / 1e9:.3f} GB"]
    lines += [f"  {name:26}{value / 1e9:15.3f} GB" for name, value in cost.bytes_moved.items()]
    if machine is not None:
        lines += ["", f"a step takes {1e3 * cost.step_seconds(machine):.1f} ms, as predicted for this machine:"]
        lines += [f"  {name:26}{value:18.4g}" for name, value in asdict(machine).items()]
        lines += ["  by part:", *(f"  {n:26}{1e3 * s:15.2f} ms" for n, s in cost.seconds(machine).items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
