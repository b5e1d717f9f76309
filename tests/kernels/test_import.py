"""What importing the kernels costs: torch, and nothing else that is large."""

import json
import subprocess
import sys

LARGE = ["sae_lens", "sae_lens_switch", "transformer_lens", "transformers", "triton", "pandas", "torch._dynamo"]


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernels_import_torch_and_nothing_else_that_is_large():
    loaded = python(
        "import json, sys, torch; before = set(sys.modules); import sae_lens_switch_kernels\n"
        f"print(json.dumps([[m for m in {LARGE} if m in sys.modules], sorted(set(sys.modules) - before)]))"
    )
    large, ours = json.loads(loaded)
    assert large == []
    foreign = [name for name in ours if not name.startswith(("sae_lens_switch_kernels", "torch", "_"))]
    assert [name for name in foreign if name.partition(".")[0] not in sys.stdlib_module_names] == []


def test_help_of_the_report_needs_no_triton():
    out = python(
        "import sys\nfrom sae_lens_switch_kernels.report import main\ntry: main(['--help'])\n"
        "except SystemExit: print('loaded:', [m for m in ('triton', 'sae_lens') if m in sys.modules])"
    )
    assert "--quick" in out
    assert "loaded: []" in out
