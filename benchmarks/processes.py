"""What the cluster plan predicts for 1, 2 and 4 processes of this machine, beside what their steps take.

    python benchmarks/processes.py        # some minutes on two CPU cores

Each process computes with one thread and owns an equal part of the experts of a Switch SAE, or of the latents of a TopK
SAE. The plan is given the speeds that a process measures while all others measure too, of its processor and of messages
between them, and how uneven the load was. Where processes outnumber cores, these speeds say so.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lens_switch.parallel.ranks import Ranks

_WARM_UP = 3
_ARCHITECTURES = ["switch", "sparse_topk"]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    import torch.multiprocessing as mp

    import sae_lens_switch.parallel  # noqa: F401, once for all processes

    rows = []
    print(f"{'SAE':12}{'processes':>10}{'predicted':>13}{'measured':>12}{'difference':>12}{'memory of each':>16}")
    for architecture, n in ((a, n) for a in args.architectures for n in args.processes):
        args.architecture = architecture
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(run, args=(n, folder, args), nprocs=n, start_method="fork")
            found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(n)]
        rows.append(compared(args, n, found))
        row = rows[-1]
        difference = row["predicted_ms"] / row["measured_ms"] - 1
        times = f"{row['predicted_ms']:10.0f} ms{row['measured_ms']:9.0f} ms"
        print(f"{architecture:12}{n:10}{times}{difference:+12.0%}{row['memory_GB']:13.2f} GB", flush=True)
    arguments = {name: value for name, value in vars(args).items() if name not in ("output", "architecture")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"arguments": arguments, "results": rows}, indent=2) + "\n")
    print(f"written to {args.output}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--architectures", nargs="+", choices=_ARCHITECTURES, default=_ARCHITECTURES)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=2048, help="per process and step")
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=24_576)
    parser.add_argument("--n-experts", type=int, default=8)
    parser.add_argument("--n-active-experts", type=int, default=1)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps")
    parser.add_argument("--output", type=Path, default=Path("runs/processes.json"))
    return parser.parse_args(argv)


def compared(args: argparse.Namespace, n: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Predicted and measured milliseconds of a step of ``n`` processes, by what each of them has measured."""
    from sae_lens_switch.common.speed import Machine
    from sae_lens_switch.planning.hardware import Hardware
    from sae_lens_switch.planning.latent_plan import LatentPlan
    from sae_lens_switch.planning.plan import Plan

    speeds = {name: statistics.median(f["machine"][name] for f in found) for name in found[0]["machine"]}
    link, latency, spread = (statistics.median(f[name] for f in found) for name in ("link", "latency", "load_spread"))
    machine = Machine(**speeds)
    hardware = Hardware(
        "this machine", 1e12, {"float32": machine.flops}, machine, gpus_per_node=n, link=link, latency=latency
    )
    shape = hardware, args.d_in, args.d_sae, args.k
    options = {
        "n_ranks": n,
        "tokens_per_rank": args.tokens,
        "optimizer": "adam",
        "precision": "float32",
        "reserved": 0.0,
    }
    if args.architecture == "switch":
        of_experts = {"n_active_experts": args.n_active_experts, "load_spread": spread}
        plan = Plan(*shape, args.n_experts, **of_experts, **options)
    else:
        plan = LatentPlan(*shape, **options)
    return {
        "architecture": args.architecture,
        "processes": n,
        "predicted_ms": 1e3 * plan.step_seconds,
        "measured_ms": 1e3 * statistics.median(f["seconds"] for f in found),
        "memory_GB": max(f["memory"] for f in found) / 1e9,
        "sent_MB": sum(plan.traffic.values()) / 1e6,
        "parts_ms": {name: 1e3 * seconds for name, seconds in plan.seconds().items()},
        "link": link,
        "latency": latency,
        "load_spread": spread,
        "machine": speeds,
    }


def run(rank: int, n: int, folder: str, args: argparse.Namespace) -> None:
    """One process: measures its speeds, then the steps of a training run that it takes part in."""
    import torch
    import torch.distributed as dist

    from sae_lens_switch.common.speed import Machine
    from sae_lens_switch.parallel.ranks import Ranks

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
    ranks = Ranks(n, "cpu", 600)
    ranks.gather_objects(None)
    width = args.d_sae // (args.n_experts if args.architecture == "switch" else n)
    machine = Machine.this_one(args.d_in, args.k, width)
    found: dict[str, Any] = {"machine": vars(machine)} | messages(ranks) | steps(ranks, args)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def messages(ranks: Ranks) -> dict[str, float]:
    """Bytes per second that a process sends in a large all-to-all, and seconds of a small sum."""
    import torch

    if ranks.size == 1:
        return {"link": 1e12, "latency": 1e-9}
    numbers, to = torch.zeros(ranks.size * (1 << 20), 4), [1 << 20] * ranks.size
    small = torch.zeros(1)
    large_seconds = median_seconds(lambda: ranks.exchange(numbers, to, to, "numbers"), 5)
    small_seconds = median_seconds(lambda: ranks.sum_(small, "a number"), 100)
    sent = numbers.nbytes * (ranks.size - 1) / ranks.size
    return {"link": sent / large_seconds, "latency": small_seconds}


def steps(ranks: Ranks, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a training step, the spread of the logarithm of the experts' loads, and the memory it all took."""
    import torch

    from sae_lens_switch import SparseSAETrainerConfig

    torch.manual_seed(1 + ranks.rank)
    batches = [torch.randn(args.tokens, args.d_in) for _ in range(4)]
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is now that of now
    before = memory("VmRSS")
    n_steps, batch = args.rounds + _WARM_UP, args.tokens * ranks.size
    cfg = SparseSAETrainerConfig(
        n_steps * batch, batch, device="cpu", lr=1e-4, dead_feature_window=1000, **divided(args, ranks.size)
    )
    trainer = trainer_of(args, ranks, cfg, iter(batches))
    seconds = []
    for i in range(n_steps):
        ranks.gather_objects(None)
        started = time.perf_counter()
        trainer.step(batches[i % len(batches)])
        seconds.append(time.perf_counter() - started)
        trainer.n_training_steps += 1
    spread = 0.0
    if args.architecture == "switch" and args.n_experts > 1:
        spread = float(trainer.sae.batch.load_E.clamp_min(1e-6).log().std())
    taken = memory("VmHWM") - before
    return {"seconds": statistics.median(seconds[_WARM_UP:]), "load_spread": spread, "memory": taken}


def divided(args: argparse.Namespace, n: int) -> dict[str, int]:
    return {"expert_parallel" if args.architecture == "switch" else "latent_parallel": n}


def trainer_of(args: argparse.Namespace, ranks: Ranks, cfg: Any, batches: Iterator[Any]) -> Any:
    from sae_lens_switch import SparseTopKTrainingSAEConfig, SwitchTrainingSAEConfig
    from sae_lens_switch.parallel import LatentParallelSAETrainer, ParallelSparseSAETrainer
    from sae_lens_switch.parallel.shard_classes import LATENT_SHARDS, expert_shard_class

    shape = {"d_in": args.d_in, "d_sae": args.d_sae, "k": args.k}
    if args.architecture == "switch":
        sae = SwitchTrainingSAEConfig(n_experts=args.n_experts, n_active_experts=args.n_active_experts, **shape)
        return ParallelSparseSAETrainer(cfg, expert_shard_class(sae).fresh(sae, ranks), batches)
    sae = SparseTopKTrainingSAEConfig(aux_loss_coefficient=0.0, **shape)
    return LatentParallelSAETrainer(cfg, LATENT_SHARDS["sparse_topk"].fresh(sae, ranks), batches)


def memory(what: str) -> int:
    """Bytes of this process: now (VmRSS) or at most so far (VmHWM)."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def median_seconds(call: Callable[[], Any], times: int) -> float:
    call()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


if __name__ == "__main__":
    main()
