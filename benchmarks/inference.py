"""Encode and decode of SAELens's SAEs: its own, beside encode_sparse and decode_sparse.

    python benchmarks/inference.py        # part of `make bench`

Random weights whose pre-activations are standard normal; biases and thresholds are such that about ``--active`` latents
per token exceed theirs. First the reconstructions of both are compared, only then is anything timed. Each round times
both in turn; medians, and medians of per-round ratios. Memory is what a call takes beside weights and input, at its
peak, in a process of its own; on a GPU by torch's allocator.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch import Tensor

FORMS = ("SAELens", "sparse")
_PEAK_RESET = Path("/proc/self/clear_refs")  # of Linux
_TOLERATED = {"float64": 1e-3, "float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}  # near ties select other latents


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    import torch

    torch.set_grad_enabled(False)
    if args.memory_of:
        print(json.dumps(peak_bytes(args)))
        return
    setting = (
        f"B {args.batch:,}, D {args.d_in:,}, F {args.d_sae:,}, k {args.k}, {args.active} active above thresholds, "
        f"{args.dtype}, {torch.get_num_threads()} threads, {args.device}"
    )
    print(f"{setting}\n{'':12}{'SAELens':>12}{'sparse':>12}{'ratio':>8}{'SAELens':>12}{'sparse':>12}{'ratio':>8}")
    arguments = {name: value for name, value in vars(args).items() if name != "output"}
    report = {"setting": setting, "arguments": arguments, "torch": torch.__version__}
    report["results"] = {name: measure(args, name) for name in args.architectures}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {args.output}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--architectures", nargs="+", default=["topk", "jumprelu", "gated"], choices=CHANGES)
    parser.add_argument("--batch", type=int, default=4096, help="tokens per call")
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=65536)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--active", type=int, default=64, help="active latents per token, on average, without a k")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto", help="auto: cuda if available, else cpu")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurements")
    parser.add_argument("--output", type=Path, default=Path("runs/inference.json"))
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "auto":
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def measure(args: argparse.Namespace, name: str) -> dict[str, float | None]:
    sae, x = sae_of(args, name), batch(args)
    calls = calls_of(sae, x)
    check(args, name, sae, x)
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for round_ in range(args.rounds + 1):  # the first warms up
        for form, call in calls.items():
            seconds = timed(call, args.device)
            if round_:
                times[form].append(1e3 * seconds)
    row: dict[str, float | None] = {f"{form}_ms": statistics.median(ms) for form, ms in times.items()}
    pairs = zip(times["SAELens"], times["sparse"], strict=True)
    row["time_ratio"] = statistics.median(ours / theirs for theirs, ours in pairs)
    row["memory_ratio"] = None
    del sae, calls
    if not args.no_memory and (args.device != "cpu" or _PEAK_RESET.exists()):
        peaks = {form: json.loads(child(args, name, form)) for form in FORMS}
        row |= {f"{form}_GB": n / 1e9 for form, n in peaks.items()}
        row["memory_ratio"] = peaks["sparse"] / peaks["SAELens"]
    print_row(name, row)
    return row


def print_row(name: str, row: dict[str, float | None]) -> None:
    cells = f"{row['SAELens_ms']:9.0f} ms{row['sparse_ms']:9.0f} ms{row['time_ratio']:8.2f}"
    if row["memory_ratio"] is not None:
        cells += f"{row['SAELens_GB']:9.2f} GB{row['sparse_GB']:9.2f} GB{row['memory_ratio']:8.2f}"
    print(f"{name:12}{cells}", flush=True)


def calls_of(sae: SAE[Any], x: Tensor) -> dict[str, Callable[[], Tensor]]:
    from sae_lens_switch import decode_sparse, encode_sparse

    return {"SAELens": lambda: sae.decode(sae.encode(x)), "sparse": lambda: decode_sparse(sae, encode_sparse(sae, x))}


def check(args: argparse.Namespace, name: str, sae: SAE[Any], x: Tensor) -> None:
    """Of some tokens; an error of the reconstruction ends the run."""
    theirs, ours = (call().double() for call in calls_of(sae, x[:256]).values())
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error <= _TOLERATED[args.dtype]:
        raise SystemExit(f"{name}: the sparse reconstruction is off by a ratio of {error:.3g}")


def timed(call: Callable[[], Tensor], device: str) -> float:
    import torch

    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def batch(args: argparse.Namespace) -> Tensor:
    import torch

    generator = torch.Generator(args.device).manual_seed(1)
    x = torch.randn(args.batch, args.d_in, generator=generator, device=args.device)
    return x.to(getattr(torch, args.dtype))


def sae_of(args: argparse.Namespace, name: str) -> SAE[Any]:
    import torch
    from sae_lens.registry import get_sae_class

    torch.manual_seed(0)
    sae_class, config_class = get_sae_class(name)
    k = {"k": args.k} if "topk" in name else {}
    shape = {"d_in": args.d_in, "d_sae": args.d_sae}
    sae = sae_class(config_class(**shape, **k, dtype=args.dtype, device=args.device))
    W_dec = torch.nn.functional.normalize(torch.randn_like(sae.W_dec), dim=1)
    sae.W_dec.copy_(W_dec)
    sae.W_enc.copy_(W_dec.T)
    border = torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - args.active / args.d_sae)).item()
    CHANGES[name](sae, border)
    return sae


CHANGES: dict[str, Callable[[Any, float], object]] = {
    "topk": lambda sae, border: None,  # noqa: ARG005
    "abstopk": lambda sae, border: None,  # noqa: ARG005
    "jumprelu": lambda sae, border: sae.threshold.fill_(border),
    "gated": lambda sae, border: (sae.b_gate.fill_(-border), sae.r_mag.fill_(0.1)),
    "standard": lambda sae, border: sae.b_enc.fill_(-border),
}


def child(args: argparse.Namespace, name: str, form: str) -> str:
    names = ("batch", "d_in", "d_sae", "k", "active", "dtype", "device")
    options = [f"--{n.replace('_', '-')}={getattr(args, n)}" for n in names]
    command = [sys.executable, __file__, *options, "--memory-of", name, form]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]


def peak_bytes(args: argparse.Namespace) -> int:
    """What the second call takes at its peak: of this process on a CPU, of the allocator on a GPU."""
    import torch

    name, form = args.memory_of
    sae, x = sae_of(args, name), batch(args)
    call = calls_of(sae, x)[form]
    if args.device != "cpu":
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    calls_of(sae, x[:1])[form]()  # loads what a call needs
    _PEAK_RESET.write_text("5")  # the peak starts from what is held now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
