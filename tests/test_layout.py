"""What keeps the house in order: the size of files, the direction of imports, and how much is left untyped."""

import ast
import io
import tokenize
from functools import cache
from pathlib import Path

from helpers import ROOT

MOST_LINES = 350
PACKAGE = ROOT / "sae_lens_switch"
# Lower floors know nothing of the higher ones; rooms of one floor may know each other only in the order given.
FLOORS = [
    "common",
    "saes",
    "planning",
    "training",
    "parallel",
    "analysis",
    "upgrade",
    "hub",
    "interop",
    "report",
    "cli",
]
# Modules that say nothing of their own: the public names, and those that hand on a room's names.
COMMANDS = {"__init__", "_public", "train", "cost", "converters", "dashboard", "history", "plots", "synthetic"}


@cache
def sources(*folders: str) -> dict[Path, ast.Module]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def imported(tree: ast.Module) -> set[str]:
    """Modules named by imports that run when the module is imported."""
    found: set[str] = set()
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue  # imported when called
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not node.orelse:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        todo += ast.iter_child_nodes(node)
    return found


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_file_is_longer_than_one_idea():
    long = {
        str(file.relative_to(ROOT)): n
        for file in sources("sae_lens_switch", "kernels", "tests", "benchmarks", "examples")
        if (n := len(file.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert long == {}


def test_no_two_test_files_have_one_name():
    """Test folders are no packages, so that pytest imports each file by its bare name."""
    names = [file.name for file in sources("tests") if file.name.startswith("test_")]
    assert {name for name in names if names.count(name) > 1} == set()


def test_imports_point_downwards():
    upwards = []
    for file, tree in sources("sae_lens_switch").items():
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert room in FLOORS or room in COMMANDS, f"{file}: which room is it in?"
        for name in imported(tree):
            target = name.split(".")[1:2] if name.startswith("sae_lens_switch.") else []
            if not target or room in COMMANDS:
                continue
            above = target[0] in COMMANDS or FLOORS.index(target[0]) > FLOORS.index(room)
            if above:
                upwards.append(f"{file.relative_to(ROOT)} imports {name}")
    assert upwards == []


def test_no_import_comes_back_to_where_it_began():
    trees = {module_name(file): tree for file, tree in sources("sae_lens_switch").items()}
    graph = {name: {m for m in imported(tree) if m in trees and m != name} for name, tree in trees.items()}
    # A package's __init__ that hands on its modules' names is imported before them, and names them: no circle.
    graph = {name: {m for m in targets if not name.startswith(f"{m}.")} for name, targets in graph.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_little_is_untyped_and_attributes_are_not_sniffed_for():
    n_lines = n_any = n_sniffed = 0
    for file, tree in sources("sae_lens_switch").items():
        text = file.read_text(encoding="utf-8")
        n_lines += len(text.splitlines())
        imports = {
            line
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        n_any += sum(t.type == tokenize.NAME and t.string == "Any" and t.start[0] not in imports for t in tokens)
        n_sniffed += sum(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr")
            for node in ast.walk(tree)
        )
    assert 1000 * n_any / n_lines <= 12, n_any
    assert 1000 * n_sniffed / n_lines <= 2, n_sniffed
