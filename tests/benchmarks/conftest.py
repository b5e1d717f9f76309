"""What these tests import lies in folders of scripts."""

import sys

from helpers import ROOT

sys.path[:0] = [str(ROOT / "examples" / "experiments"), str(ROOT / "benchmarks"), str(ROOT / "examples")]
