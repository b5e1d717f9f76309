"""The help of SAEDashboard's command, without the imports that its module begins with."""

import argparse
import ast
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_MODULE = "sae_dashboard.neuronpedia.neuronpedia_runner"


def print_help() -> None:
    """Answer ``--help`` and exit; return if the process was started without it, or SAEDashboard is not installed.

    SAEDashboard builds its parser at the beginning of ``main``. That function is compiled by itself, and called:
    argparse answers and exits before anything else in it is reached.
    """
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return
    with suppress(Exception):  # whatever SAEDashboard may become: its module is then imported as a whole
        spec = find_spec(_MODULE)
        if spec is None or spec.origin is None:
            return
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        namespace: dict[str, Any] = {"argparse": argparse}
        exec(compile(tree, spec.origin, "exec"), namespace)
        namespace["main"]()
