"""``python -m sae_lens_switch_kernels.report``: compile every kernel ahead of time, no GPU needed, and read the code.

Prints registers, spills, shared memory, atomics and the width of every load of a matrix row, per GPU architecture; and
predicts times from bytes and flops. Fails if a kernel spills, uses atomics, or reads a row in less than 128 bits.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

ARCHITECTURES, QUICK_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942"), ("sm_90", "gfx942")
WIDTHS, QUICK_WIDTHS = (576, 768, 2304, 4096, 8192, 16384), (768, 4096)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit status: 1 if compiled code falls short, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m sae_lens_switch_kernels.report", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write both tables to this file")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--quick", action="store_true", help="two widths, two architectures")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")
    # Late, so that --help does not wait for Triton.
    from sae_lens_switch_kernels.triton_backend.compile_report import report, shortcomings, tables

    architectures = options.arch or (QUICK_ARCHITECTURES if options.quick else ARCHITECTURES)
    found = report(architectures, QUICK_WIDTHS if options.quick else WIDTHS)
    sys.stdout.write(tables(found))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
    faults = shortcomings(found["kernels"])
    for fault in faults:
        sys.stderr.write(f"below the bar: {fault}\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
