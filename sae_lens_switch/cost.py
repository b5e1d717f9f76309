"""Predict what an SAE costs to train: parameters, FLOPs, memory, bytes moved, and the time of a training step.

    python -m sae_lens_switch.cost --architecture switch --d-in 768 --d-sae 24576 --n-experts 32 --k 32

A multiply-add counts as two FLOPs. ``paper_flops`` is the count of arXiv 2410.08201: the encoder of one expert, 2MD,
and the router, 2ED. The table has all of it: backward pass, clipping and optimiser too.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

from sae_lens_switch.common.speed import Machine
from sae_lens_switch.saes.expert_layout import ExpertLayout

__all__ = ["Cost", "Machine", "describe", "main"]

Architecture = Literal["switch", "sparse_topk", "topk"]
OptimizerName = Literal["adam", "row_sparse_adam"]

# Passes over a [B, D] tensor in a step: centring, sorting, bias, error, its square, their gradients, and torch's copies
# in between. Measured.
_TOKEN_PASSES = 80
# Passes over both weight matrices: norms; for `switch` also projection and renormalisation. Measured.
_CONSTRAINT_PASSES = {"switch": 7.5, "sparse_topk": 1.2, "topk": 3.0}
# Tensors of B x F that SAELens allocates in a step, and how often each is read.
_DENSE_TENSORS, _DENSE_READS = 14, 2


@dataclass(frozen=True)
class Cost:
    """The cost of an SAE of a given shape, and of one of its training steps, by formula.

    Args:
        architecture: "switch" or "sparse_topk" of this package, or SAELens's dense "topk".
        d_in: Width of the activations.
        d_sae: Number of latents, over all experts.
        k: Active latents per token.
        n_experts: Number of experts; 1 unless the architecture is "switch".
        n_active_experts: Experts per token.
        n_shared_experts: Experts that every token uses beside them.
        shared_width: Latents of these together; None: each is as wide as the others.
        batch: Activations per training step.
        optimizer: "adam" or "row_sparse_adam".
        bytes_per_weight: 4 for float32, 2 for bfloat16.

    Raises:
        ValueError: If there is no SAE of this shape.
    """

    architecture: Architecture
    d_in: int
    d_sae: int
    k: int
    n_experts: int = 1
    batch: int = 4096
    optimizer: OptimizerName = "adam"
    bytes_per_weight: int = 4
    n_active_experts: int = 1
    n_shared_experts: int = 0
    shared_width: int | None = None

    def __post_init__(self) -> None:
        if self.architecture not in ("switch", "sparse_topk", "topk"):
            raise ValueError(f"architecture must be switch, sparse_topk or topk; got {self.architecture!r}")
        for name in ("d_in", "d_sae", "k", "n_experts", "n_active_experts", "batch", "bytes_per_weight"):
            value = vars(self)[name]
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")
        for name, least in (("n_shared_experts", 0), ("shared_width", 1)):
            value = vars(self)[name]
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be a whole number, at least {least}; got {value!r}")
        if self.architecture != "switch" and self.n_experts != 1:
            raise ValueError(f"n_experts must be 1 unless architecture is 'switch'; got {self.n_experts}")
        if self.n_shared_experts and self.architecture != "switch":
            raise ValueError(f"n_shared_experts must be 0 unless architecture is 'switch'; got {self.n_shared_experts}")
        if self.shared_width is not None and not self.n_shared_experts:
            raise ValueError(f"shared_width must be None without shared experts; got {self.shared_width}")
        if not self.layout.is_possible:
            rest = f" less the {self.layout.shared_width} latents of shared experts" if self.n_shared_experts else ""
            raise ValueError(f"n_experts must divide d_sae={self.d_sae}{rest}; got {self.n_experts}")
        if self.n_active_experts > self.n_experts:
            raise ValueError(
                f"n_active_experts must be at most n_experts={self.n_experts}; got {self.n_active_experts}"
            )
        if self.k > self.active_width:
            several = "" if self.n_active_experts == 1 else "n_active_experts * "
            what = "the latents of a token's experts and the shared ones," if self.n_shared_experts else ""
            what = what or f"{several}d_sae / n_experts ="
            raise ValueError(f"k must be at most {what} {self.active_width}; got {self.k}")

    @property
    def layout(self) -> ExpertLayout:
        """Which latents belong to which expert."""
        return ExpertLayout.of(self.d_sae, self.n_experts, self.n_shared_experts, self.shared_width)

    @property
    def expert_width(self) -> int:
        """Latents per expert."""
        return self.layout.expert_width

    @property
    def active_width(self) -> int:
        """Latents of a token's experts together, shared ones included."""
        return self.layout.shared_width + self.n_active_experts * self.expert_width

    @property
    def rows(self) -> int:
        """Latents whose weights an optimiser step updates: all, or at most those that can be active in a batch."""
        return self.d_sae if self.optimizer == "adam" else min(self.d_sae, self.batch * self.k)

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters, by tensor."""
        D, F = self.d_in, self.d_sae
        counts = {"W_enc": D * F, "W_dec": F * D, "b_dec": D}
        if self.architecture == "switch":
            return counts | {"W_router": D * self.n_experts, "b_router": D}
        return counts | {"b_enc": F}

    @property
    def paper_flops(self) -> int:
        """FLOPs per activation as arXiv 2410.08201 counts them: 2MD, and the router's 2ED."""
        router = 2 * self.n_experts * self.d_in if self.architecture == "switch" else 0
        return 2 * self.active_width * self.d_in + router

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs per activation, by part."""
        D, F, K, M, B = self.d_in, self.d_sae, self.k, self.active_width, self.batch
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
        """Peak memory of a training step in bytes, by part."""
        B, D, K, n = self.batch, self.d_in, self.k, sum(self.parameters.values())
        masters = 4 * n if self.bytes_per_weight < 4 else 0
        if self.architecture == "topk":  # from the second step on, SAELens holds seven tensors of B x F
            latents = 7 * 4 * B * self.d_sae
        else:  # codes, their gradients and index, and the tile of pre-activations that top-k searches
            widest = max(self.expert_width, self.layout.shared_width)
            latents = B * K * (4 * 4 + 4 * 8) + 4 * 512 * min(widest, 1 << 15)
        return {
            "weights": self.bytes_per_weight * n,
            "gradients": self.bytes_per_weight * 2 * self.rows * D,
            "optimiser": 2 * 4 * n + masters,
            "activations": (5 + self.n_active_experts + (self.n_shared_experts > 0)) * 4 * B * D,
            "latents": latents,
        }

    @property
    def bytes_moved(self) -> dict[str, float]:
        """Bytes moved between memory and processor in a step, by part."""
        w, B, D, F, K = self.bytes_per_weight, self.batch, self.d_in, self.d_sae, self.k
        # Latents that are shared, or of experts with at least one token.
        reached = self.layout.shared_width + min(self.n_experts, B * self.n_active_experts) * self.expert_width
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
        """Predicted seconds of a training step, by part."""
        B, D, M, K = self.batch, self.d_in, self.active_width, self.k
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
        """Predicted seconds of a training step."""
        return sum(self.seconds(machine).values())


_MATRIX_PRODUCTS = (
    *("encoder", "decoder", "latent gradient"),
    *("decoder gradient", "encoder gradient", "pre-bias gradient"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command: print the table, or exit with an error message."""
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
    parser.add_argument("--n-active-experts", type=int, default=1)
    parser.add_argument("--n-shared-experts", type=int, default=0)
    parser.add_argument("--shared-width", type=int, help="latents of all shared experts together")
    parser.add_argument("--batch", type=int, default=4096, help="activations per training step")
    parser.add_argument("--optimizer", default="adam", choices=["adam", "row_sparse_adam"])
    parser.add_argument("--bytes-per-weight", type=int, default=4)
    machine = parser.add_argument_group("the machine", "all six numbers, or --measure")
    machine.add_argument("--measure", action="store_true", help="measure this machine, in a few seconds")
    for name, unit in (
        ("flops", "FLOPs per second of matrix products"),
        ("gather", "bytes per second, rows read at random from memory"),
        ("regather", "bytes per second, rows read at random from a batch of activations"),
        ("stream", "bytes per second, sequential"),
        ("select", "pre-activations per second that top-k searches"),
        ("fresh", "bytes per second, memory written for the first time"),
    ):
        machine.add_argument(f"--{name}", type=float, help=unit)
    return parser


def describe(cost: Cost, machine: Machine | None = None) -> str:
    """The table that the command prints."""
    lines = [", ".join(f"{name} {value}" for name, value in asdict(cost).items())]
    lines += ["", f"parameters {sum(cost.parameters.values()):,}"]
    lines += [f"  {name:26}{value:18,}" for name, value in cost.parameters.items()]
    lines += ["", f"FLOPs per activation: {sum(cost.flops.values()):,.0f}; {cost.paper_flops:,} as the paper counts"]
    lines += [f"  {name:26}{value:18,.0f}" for name, value in cost.flops.items()]
    lines += ["", f"peak memory of a training step: {sum(cost.memory.values()) / 1e9:.3f} GB"]
    lines += [f"  {name:26}{value / 1e9:15.3f} GB" for name, value in cost.memory.items()]
    lines += ["", f"bytes moved per step: {sum(cost.bytes_moved.values()) / 1e9:.3f} GB"]
    lines += [f"  {name:26}{value / 1e9:15.3f} GB" for name, value in cost.bytes_moved.items()]
    if machine is not None:
        lines += ["", f"predicted time of a step on this machine: {1e3 * cost.step_seconds(machine):.1f} ms"]
        lines += [f"  {name:26}{value:18.4g}" for name, value in asdict(machine).items()]
        lines += ["  by part:", *(f"  {n:26}{1e3 * s:15.2f} ms" for n, s in cost.seconds(machine).items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
