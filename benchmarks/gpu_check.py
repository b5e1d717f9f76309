"""The kernels on a GPU, for the first time perhaps: tests, self-checks and the benchmark, in one JSON report.

make gpu-check    # runs/gpu-check.json is worth attaching to an issue
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from sae_lens_switch_kernels import backend

ROOT = Path(__file__).parents[1]
TESTS = ("tests/test_triton.py", "tests/test_backend.py", "tests/test_kernels.py")


def main(output: Path = ROOT / "runs" / "gpu-check.json") -> int:
    if not torch.cuda.is_available():
        print("make gpu-check needs a GPU that torch can see; torch.cuda.is_available() says there is none")
        return 2
    output.parent.mkdir(parents=True, exist_ok=True)
    bench = output.with_name("gpu-bench.json")
    bench.unlink(missing_ok=True)
    report = {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "versions": versions(),
        "self_checks": self_checks(),
        "tests": run("-m", "pytest", "-q", "--no-header", *TESTS),
        "benchmark": run("benchmarks/bench.py", "--device", "cuda", "--output", str(bench)),
        "results": json.loads(bench.read_text()) if bench.exists() else None,
    }
    output.write_text(json.dumps(report, indent=2) + "\n")
    failed = [name for name in ("tests", "benchmark") if report[name]["returncode"]]
    failed += [name for name, verdict in report["self_checks"].items() if verdict != "agrees"]
    print(f"written to {output}; " + (f"failed: {', '.join(failed)}" if failed else "all agrees"))
    return 1 if failed else 0


def versions() -> dict[str, str | None]:
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    return {"python": sys.version, "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton}


def self_checks() -> dict[str, str]:
    """What the check before a kernel's first use says of each, in each dtype."""
    verdicts = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name in backend.PRIMITIVES:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                proven = backend._proven(name, torch.device("cuda", torch.cuda.current_device()), dtype)
            verdicts[f"{name}, {dtype}"] = "agrees" if proven else str(caught[-1].message)
    return verdicts


def run(*arguments: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    return {"returncode": done.returncode, "output": done.stdout[-20_000:], "errors": done.stderr[-5_000:]}


if __name__ == "__main__":
    raise SystemExit(main())
