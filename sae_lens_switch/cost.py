"""Predict what an SAE costs to train: parameters, FLOPs, memory, bytes moved, and the time of a training step.

    python -m sae_lens_switch.cost --architecture switch --d-in 768 --d-sae 24576 --n-experts 32 --k 32
    python -m sae_lens_switch.cost --plan --d-in 768 --d-sae 1000000000 --hardware h100

A multiply-add counts as two FLOPs. ``paper_flops`` is the count of arXiv 2410.08201: the encoder of one expert, 2MD,
and the router, 2ED. The table has all of it: backward pass, clipping and optimiser too.

``--plan`` is about a cluster: how many GPUs a Switch SAE of this width needs, how many experts are fastest, and what a
step takes. ``--n-experts`` and ``--n-ranks`` fix what it would choose. With ``--architecture sparse_topk``, a TopK SAE
whose latents are divided.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from sae_lens_switch.common.speed import Machine
from sae_lens_switch.planning.cluster_step import ClusterStep, smallest
from sae_lens_switch.planning.hardware import HARDWARE
from sae_lens_switch.planning.latent_plan import LatentPlan
from sae_lens_switch.planning.plan import Plan
from sae_lens_switch.planning.step_cost import Cost

__all__ = ["Cost", "LatentPlan", "Machine", "Plan", "describe", "describe_plan", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command: print the table, or exit with an error message."""
    args = vars(_parser().parse_args(argv))
    try:
        print(_planned(args) if args["plan"] else _costs(args))
    except ValueError as error:
        sys.exit(f"error: {error}")


def _costs(args: dict[str, Any]) -> str:
    cost = Cost(**{f.name: args[f.name] for f in fields(Cost) if args[f.name] is not None})
    given = {f.name: args[f.name] for f in fields(Machine) if args[f.name] is not None}
    if given and len(given) < len(fields(Machine)):
        missing = ", ".join(f"--{f.name}" for f in fields(Machine) if f.name not in given)
        raise ValueError(f"a machine is described by all six numbers; missing: {missing}")
    machine = Machine(**given) if given else None
    if args["measure"] and machine is None:
        machine = Machine.this_one(cost.d_in, cost.k, cost.expert_width)
    return describe(cost, machine)


def _planned(args: dict[str, Any]) -> str:
    if args["architecture"] == "topk":
        raise ValueError("architecture must be 'switch' or 'sparse_topk' with --plan; got 'topk'")
    if args["n_shared_experts"]:
        raise ValueError(f"n_shared_experts must be 0 with --plan; got {args['n_shared_experts']}")
    given = {"network": args["network"], "gpus_per_node": args["gpus_per_node"]}
    hardware = replace(HARDWARE[args["hardware"]], **{n: v for n, v in given.items() if v is not None})
    E, N, A = args["n_experts"], args["n_ranks"], args["n_active_experts"]
    shape = hardware, args["d_in"], args["d_sae"], args["k"]
    options = {
        "n_ranks": N or 1,
        "optimizer": args["optimizer"] or "row_sparse_adam",
        "reserved": 1e9 * args["reserved_gb"],
        **{name: args[name] for name in ("tokens_per_rank", "precision", "bytes_per_moment")},
    }
    if args["architecture"] == "switch":
        of_experts = {"n_experts": E or A * (N or 1), "n_active_experts": A, "load_spread": args["load_spread"]}
        plan = Plan(*shape, **of_experts, **options)
    else:
        for name, only, given in (("n_experts", (None, 1), E), ("n_active_experts", (1,), A)):
            if given not in only:
                raise ValueError(f"{name} must be 1 unless architecture is 'switch'; got {given}")
        plan = LatentPlan(*shape, **options)
    experts = None if E is None or args["architecture"] != "switch" else [E]
    found = smallest(plan, experts) if N is None else plan.on(N, experts)
    if found is None:
        raise ValueError(f"n_ranks must be larger: {N} of {hardware.name} do not have the memory")
    return describe_plan(found, args["training_tokens"])


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
    parser.add_argument("--n-experts", type=int, help="1 if not given; with --plan, the fastest number")
    parser.add_argument("--n-active-experts", type=int, default=1)
    parser.add_argument("--n-shared-experts", type=int, default=0)
    parser.add_argument("--shared-width", type=int, help="latents of all shared experts together")
    parser.add_argument("--batch", type=int, default=4096, help="activations per training step")
    parser.add_argument(
        "--optimizer", choices=["adam", "row_sparse_adam"], help="adam if not given; with --plan, row_sparse_adam"
    )
    parser.add_argument("--bytes-per-weight", type=int, default=4)
    parser.add_argument("--bytes-per-moment", type=int, default=4, help="of Adam's moments: 4, or 2 for bfloat16")
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
    cluster = parser.add_argument_group("a cluster", "experts or latents divided among GPUs, float32 weights")
    cluster.add_argument("--plan", action="store_true", help="how many GPUs, and what a step takes")
    cluster.add_argument("--hardware", default="h100", choices=list(HARDWARE))
    cluster.add_argument("--n-ranks", type=int, help="GPUs; by default as few as have the memory")
    cluster.add_argument("--gpus-per-node", type=int, help="8 if not given")
    cluster.add_argument("--network", type=float, help="bytes per second from a GPU to other nodes; 50e9 if not given")
    cluster.add_argument("--tokens-per-rank", type=int, default=4096, help="activations per training step and GPU")
    cluster.add_argument("--precision", default="bfloat16", choices=["float32", "tf32", "bfloat16"])
    cluster.add_argument("--reserved-gb", type=float, default=16, help="per GPU, for language model and activations")
    cluster.add_argument("--load-spread", type=float, default=0.3, help="standard deviation of log(expert load)")
    cluster.add_argument("--training-tokens", type=float, default=1e9, help="for the GPU-hours")
    return parser


def describe(cost: Cost, machine: Machine | None = None) -> str:
    """The table that the command prints."""
    lines = [", ".join(f"{name} {value}" for name, value in asdict(cost).items())]
    lines += ["", f"parameters {sum(cost.parameters.values()):,}"]
    lines += [f"  {name:35}{value:18,}" for name, value in cost.parameters.items()]
    lines += ["", f"FLOPs per activation: {sum(cost.flops.values()):,.0f}; {cost.paper_flops:,} as the paper counts"]
    lines += [f"  {name:35}{value:18,.0f}" for name, value in cost.flops.items()]
    lines += ["", f"peak memory of a training step: {sum(cost.memory.values()) / 1e9:.3f} GB", *_gb(cost.memory)]
    lines += ["", f"bytes moved per step: {sum(cost.bytes_moved.values()) / 1e9:.3f} GB", *_gb(cost.bytes_moved)]
    if machine is not None:
        lines += ["", f"predicted time of a step on this machine: {1e3 * cost.step_seconds(machine):.1f} ms"]
        lines += [f"  {name:35}{value:18.4g}" for name, value in asdict(machine).items()]
        lines += ["  by part:", *_ms(cost.seconds(machine))]
    return "\n".join(lines)


def describe_plan(plan: ClusterStep, tokens: float = 1e9) -> str:
    """The table that the command prints with ``--plan``; GPU-hours for so many training tokens."""
    lines = [
        *plan.heading,
        "",
        f"memory per GPU: {sum(plan.memory.values()) / 1e9:.1f} of {plan.hardware.memory / 1e9:.0f} GB",
        *_gb(plan.memory),
        *("", f"sent per GPU and step: {sum(plan.traffic.values()) / 1e9:.3f} GB", *_gb(plan.traffic)),
        *("", f"predicted time of a step: {1e3 * plan.step_seconds:.1f} ms", *_ms(plan.seconds())),
        "",
        f"{plan.tokens_per_second:,.0f} tokens per second, {plan.gpu_hours(tokens):,.1f} GPU-hours for {tokens:,.0f}"
        " tokens; the language model's time comes on top",
    ]
    return "\n".join(lines)


def _gb(parts: dict[str, Any]) -> list[str]:
    return [f"  {name:35}{value / 1e9:15.3f} GB" for name, value in parts.items()]


def _ms(parts: dict[str, float]) -> list[str]:
    return [f"  {name:35}{1e3 * value:15.2f} ms" for name, value in parts.items()]


if __name__ == "__main__":
    main()
