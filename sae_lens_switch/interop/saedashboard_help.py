"""The help of SAEDashboard's command, without the imports that its module begins with."""

import argparse
import ast
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_MODULE = "sae_dashboard.neuronpedia.neuronpedia_runner"
_TYPES = {"int": int, "float": float, "str": str}


def print_help() -> None:
    """Answer ``--help`` and exit; return if the process was started without it, or SAEDashboard is not installed.

    SAEDashboard builds its parser at the beginning of ``main``, from literals: they are read from its source, and
    nothing of it is run.
    """
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return
    with suppress(Exception):  # whatever SAEDashboard may become: its module is then imported as a whole
        spec = find_spec(_MODULE)
        if spec is not None and spec.origin is not None:
            _parser(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))).parse_args(["--help"])


def _parser(module: ast.Module) -> argparse.ArgumentParser:
    (main,) = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    calls: dict[str, list[ast.Call]] = {name: [] for name in ("ArgumentParser", "add_argument")}
    for node in ast.walk(main):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in calls:
            calls[node.func.attr].append(node)
    (made,) = calls["ArgumentParser"]
    parser = argparse.ArgumentParser(**_keywords(made))
    for call in sorted(calls["add_argument"], key=lambda node: node.lineno):
        parser.add_argument(*map(ast.literal_eval, call.args), **_keywords(call))
    return parser


def _keywords(call: ast.Call) -> dict[str, Any]:
    """Literal keyword arguments, and types by name."""
    found: dict[str, Any] = {}
    for keyword in call.keywords:
        assert keyword.arg is not None
        named = isinstance(keyword.value, ast.Name) and keyword.arg == "type"
        found[keyword.arg] = _TYPES[ast.unparse(keyword.value)] if named else ast.literal_eval(keyword.value)
    return found
