"""The kernels on a GPU: are they correct, how fast are they, and how much faster is training.

    python benchmarks/gpu_check.py --output runs/gpu                   # everything; make gpu-check
    python benchmarks/gpu_check.py --stage primitives --seconds 60 --output runs/gpu
    python benchmarks/gpu_check.py --device cpu --tiny --output runs/rehearsal

Four stages, each in a separate process: `correctness`, `primitives`, `steps`, `training`. Each writes one JSON file to
--output, atomically after every case, and resumes where an earlier call stopped. A case that fails, crashes or hangs is
recorded, and the others still run; what their processes print is in gpu_check.log. Requires only
Python, torch, Triton and the packages that SAELens imports.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

STAGES = ("correctness", "primitives", "steps", "training")
# A case that takes longer is considered hung. The first call of a kernel compiles it.
CASE_SECONDS = {"correctness": 60.0, "primitives": 60.0, "steps": 90.0, "training": 150.0}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    import torch
    from gpu.record import Record
    from gpu.supervise import environment, finish_tests, kernel_tests, supervise, supervise_shares
    from gpu.table import table

    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check needs a GPU that torch can see; torch.cuda.is_available() says there is none (--device cpu)")
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    if args.deadline is not None:
        run_stage(args)
        return 0
    env = environment(args.device, ROOT)
    tests, tests_until = None, 0.0
    for stage in args.stage:
        file = args.output / f"{stage}.json"
        record = Record(file, about(args))
        record.data.pop("error", None)
        record.write()
        if args.retry:
            record.forget_failures()
        if stage == "correctness" and args.tests:
            tests, tests_until = kernel_tests(ROOT, args.output, env), time.time() + args.test_seconds
        elif tests is not None:  # whose compiling would disturb what is timed
            finish_tests(tests, args.output, tests_until)
            tests = None
        limits = args.seconds, args.case_seconds or CASE_SECONDS[stage]
        if stage == "correctness" and args.jobs > 1:  # the others time what they do
            supervise_shares(command_of(args, stage), file, args.jobs, *limits, env, ROOT)
        else:
            supervise(command_of(args, stage), file, *limits, env, ROOT)
    if tests is not None:
        finish_tests(tests, args.output, tests_until)
    print(table(args.output, args.stage))
    stages = [Record(args.output / f"{stage}.json") for stage in args.stage]
    bad = [r for r in stages if r.data.get("error") or any(c["status"] != "ok" for c in r.cases.values())]
    return 1 if bad else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seconds", type=float, default=180.0, help="time limit per stage; no case starts later")
    parser.add_argument("--minutes", type=float, help="the same in minutes")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, for a rehearsal")
    parser.add_argument(
        "--retry", action="store_true", help="repeat cases that failed, crashed or hung in an earlier call"
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only cases whose names contain one of these")
    parser.add_argument("--case-seconds", type=float, help="a case that takes longer is considered hung")
    parser.add_argument("--train-seconds", type=float, default=30.0, help="training time per SAE")
    parser.add_argument("--model", type=Path, help="packed first layers of a language model (make wheelhouse)")
    parser.add_argument("--tokens", type=Path, help="its tokens, uint16")
    parser.add_argument("--no-graph", action="store_true", help="train without CUDA graphs")
    parser.add_argument(
        "--tests", action="store_true", help="also run the kernels' tests, in parallel with correctness"
    )
    parser.add_argument("--test-seconds", type=float, default=240.0, help="time limit of those tests")
    parser.add_argument("--jobs", type=int, help="processes for correctness; by default six on a GPU, else one")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.jobs is None:
        args.jobs = min(6, os.cpu_count() or 1) if args.device == "cuda" and args.deadline is None else 1
    args.output = args.output.resolve()
    if args.minutes is not None:
        args.seconds = 60 * args.minutes
    for name in ("model", "tokens"):
        file = getattr(args, name)
        if file is not None and not file.exists():
            parser.error(f"--{name} must be an existing file; got {file}")
        setattr(args, name, None if file is None else file.resolve())
    return args


def command_of(args: argparse.Namespace, stage: str) -> list[str]:
    options = {"--stage": stage, "--output": args.output, "--device": args.device, "--seconds": args.seconds}
    options |= {"--train-seconds": args.train_seconds, "--model": args.model, "--tokens": args.tokens}
    given = [str(part) for name, value in options.items() if value is not None for part in (name, value)]
    given += ["--only", *args.only] if args.only else []
    given += ["--no-graph"] if args.no_graph else []
    return [sys.executable, str(Path(__file__).resolve()), *given, *(["--tiny"] if args.tiny else [])]


def run_stage(args: argparse.Namespace) -> None:
    from gpu.record import Record, run_cases

    (stage,) = args.stage
    cases = import_module(f"gpu.{stage}").cases(args)
    if args.only:
        cases = (case for case in cases if any(text in case[0] for text in args.only))
    cases = islice(cases, args.share, None, args.jobs)
    run_cases(Record(args.record or args.output / f"{stage}.json"), cases, args.deadline)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """The circumstances of the measurement."""
    import torch

    on_gpu = args.device == "cuda"
    smi = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv"]
    return {
        "command": " ".join(sys.argv),
        "commit": os.environ.get("GIT_COMMIT") or said(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, no GPU",
        "capability": list(torch.cuda.get_device_capability()) if on_gpu else None,
        "nvidia-smi": said(smi) if on_gpu else None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "backend": os.environ.get("SAE_LENS_SWITCH_BACKEND", ""),
        **{name: version_of(name) for name in ("torch", "triton", "numpy", "transformers", "sae-lens", "eai-sparsify")},
    }


def said(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    raise SystemExit(main())
