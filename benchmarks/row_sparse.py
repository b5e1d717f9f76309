"""Time of a Switch SAE's training step against the width of its dictionary, with fused Adam and with row-sparse Adam.

    python benchmarks/row_sparse.py        # part of `make bench`

Batch, d_in, k and expert width are fixed; the number of experts grows with the dictionary. Whole steps of
SparseSAETrainer: router, forward, backward, clipping, optimiser, decoder constraint, statistics. Each round times all
widths of an optimiser in turn, so that disturbances of the machine affect them all. Medians; ratios to the narrowest.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    import torch

    print(
        f"B {args.batch:,}, D {args.d_in}, k {args.k}, experts of {args.expert_width:,} latents, "
        f"{torch.get_num_threads()} threads, {args.device}"
    )
    arguments = {name: value for name, value in vars(args).items() if name != "output"}
    report: dict[str, Any] = {"arguments": arguments, "results": {}}
    for optimizer in ("adam", "row_sparse_adam"):
        report["results"][optimizer] = measure(args, optimizer)
    print(f"{'latents':>12}{'experts':>9}{'adam':>20}{'row_sparse_adam':>20}{'rows touched':>14}")
    for i, d_sae in enumerate(args.widths):
        dense, sparse = (report["results"][name][i] for name in ("adam", "row_sparse_adam"))
        cells = "".join(f"{r['ms']:9.0f} ms{r['ratio']:6.2f} x" for r in (dense, sparse))
        print(f"{d_sae:12,}{d_sae // args.expert_width:9,}{cells}{sparse['rows']:14,}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {args.output}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[24_576, 98_304, 393_216, 999_424], help="numbers of latents"
    )
    parser.add_argument("--batch", type=int, default=8192, help="tokens per step")
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--expert-width", type=int, default=8192, help="latents per expert")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per width")
    parser.add_argument("--device", default="auto", help="auto: cuda if available, else cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/row_sparse.json"))
    args = parser.parse_args(argv)
    if args.device == "auto":
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def measure(args: argparse.Namespace, optimizer: str) -> list[dict[str, float]]:
    """Per width: median milliseconds, median ratio to the narrowest, rows touched in a step."""
    import torch

    torch.manual_seed(0)
    batches = [torch.randn(args.batch, args.d_in, device=args.device) for _ in range(args.rounds + 2)]
    trainers = [make_trainer(args, optimizer, d_sae) for d_sae in args.widths]
    rounds = []
    for batch in batches:
        times = []
        for trainer in trainers:
            start = time.perf_counter()
            output = trainer.step(batch)
            trainer.n_training_steps += 1
            if args.device != "cpu":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
            trainer.rows = output.codes.indices.unique().numel()
        rounds.append(times)
    rounds = rounds[2:]  # the first allocate the optimiser state and warm up
    return [
        {
            "d_sae": d_sae,
            "ms": statistics.median(r[i] for r in rounds),
            "ratio": statistics.median(r[i] / r[0] for r in rounds),
            "rows": trainers[i].rows,
        }
        for i, d_sae in enumerate(args.widths)
    ]


def make_trainer(args: argparse.Namespace, optimizer: str, d_sae: int) -> Any:
    from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig, SwitchTrainingSAE, SwitchTrainingSAEConfig

    if d_sae % args.expert_width:
        raise SystemExit(f"--widths must be multiples of --expert-width {args.expert_width}; got {d_sae}")
    sae = SwitchTrainingSAE(
        SwitchTrainingSAEConfig(
            d_in=args.d_in, d_sae=d_sae, n_experts=d_sae // args.expert_width, k=args.k, device=args.device
        )
    )
    cfg = SparseSAETrainerConfig(10**9, args.batch, optimizer=optimizer, device=args.device)  # type: ignore[arg-type]
    return SparseSAETrainer(cfg, sae, iter(()))


if __name__ == "__main__":
    main()
