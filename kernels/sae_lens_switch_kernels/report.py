"""``python -m sae_lens_switch_kernels.report``: what the compiler makes of every kernel."""

import sys

from sae_lens_switch_kernels.triton_backend.compile_report import main

if __name__ == "__main__":
    sys.exit(main())
