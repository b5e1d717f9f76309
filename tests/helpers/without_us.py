"""Saved SAEs in a process that has SAELens and cannot import this package."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PROGRAM = """
import sys
sys.modules["sae_lens_switch"] = sys.modules["sae_lens_switch_kernels"] = None  # not importable
import torch
from sae_lens import SAE
file, *folders = sys.argv[1:]
x, found = torch.load(file), []
for folder in folders:
    sae = SAE.load_from_disk(folder)
    found.append({"class": type(sae).__name__, "k": getattr(sae.cfg, "k", None), "out": sae(x), "acts": sae.encode(x)})
torch.save(found, file)
"""


def loaded_without_us(folders: Sequence[Path], x: Tensor) -> list[dict[str, Any]]:
    """Of each SAE its ``class``, ``k``, and what it makes of x: ``out`` and ``acts``.

    One process loads all: importing SAELens takes seconds.
    """
    file = folders[0] / "x.pt"
    torch.save(x, file)
    command = [sys.executable, "-c", _PROGRAM, str(file), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(file)
