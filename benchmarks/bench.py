"""Training steps of sparse autoencoders side by side: time and memory of this package's and of the others'.

    make bench        # or: python benchmarks/bench.py --help

One process, one batch, the same weights. First, the loss and gradients of every contestant are compared with those of
the plain implementation of the same function; only then is anything timed. Each round times all contestants in turn, so
that disturbances of the machine affect them all; the table shows medians over rounds, and ratios. Peak memory is
measured in a separate process per contestant, on a GPU by its allocator. On a machine with a GPU everything runs there,
and the report says so.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    warnings.filterwarnings("ignore")
    import torch
    from contestants import contestants, timed
    from measurements import (
        Row,
        bare_encoder,
        check_closeness,
        child,
        loop,
        machine,
        peak_memory,
        precision,
        rival_of,
        width,
    )

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
    arguments = {name: value for name, value in vars(args).items() if name != "output"}
    report = {"setting": setting, "arguments": arguments, "torch": torch.__version__}
    report["results"] = {name: row.summary(rows.get(rival_of(name))) for name, row in rows.items()}
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
    parser.add_argument("--batch", type=int, default=4096, help="tokens per step")
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=24576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument(
        "--experts", type=int, nargs="+", default=[8, 32, 128], help="numbers of experts of the Switch SAEs"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed steps per contestant")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tf32", action="store_true", help="float32 products on a GPU's tensor cores, as TF32")
    parser.add_argument("--device", default="auto", help="auto: cuda if available, else cpu")
    parser.add_argument("--only", nargs="*", help="names of contestants")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurements")
    parser.add_argument("--no-loop", action="store_true", help="skip whole steps of the trainers")
    parser.add_argument("--no-width", action="store_true", help="skip the comparison at constant expert width")
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "auto":
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


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
