"""Notebooks run as a reader runs them, in one kernel, and what they print and draw."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from helpers import ROOT
from helpers.hub_server import HubServer

TRAIN = "train_switch"
# One kernel runs them all: SAELens is imported, and the text read, once. Their names are their own.
BEFORE = """%reset -f
import functools, sys
import torch
torch.set_grad_enabled(True)  # whatever the notebook before has set
sys.path.insert(0, "..")
import offline
if not hasattr(offline.text_datasets, "cache_info"):
    offline.text_datasets = functools.cache(offline.text_datasets)"""


def read(name: str) -> Any:
    return nbformat.read(ROOT / "examples" / "notebooks" / f"{name}.ipynb", as_version=4)


class Reader:
    """Runs notebooks in a folder laid out as the project is."""

    def __init__(self, folder: Path, hub: HubServer, small: bool) -> None:
        self.hub, self.runs = hub, folder / "runs"
        self.here = folder / "examples" / "notebooks"
        shutil.copytree(ROOT / "examples" / "notebooks", self.here)
        (folder / "examples" / "offline.py").symlink_to(ROOT / "examples" / "offline.py")
        (ROOT / "runs" / "models").mkdir(parents=True, exist_ok=True)
        self.runs.mkdir()
        (self.runs / "models").symlink_to(ROOT / "runs" / "models")  # converted once, for the quickstart as well
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST"))}
        env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.writer, "HF_HUB_DISABLE_XET": "1"}
        self.home = folder / "home"
        env |= {"HF_HOME": str(self.home), "IPYTHONDIR": str(folder / "ipython")}
        if small:
            env["SAE_LENS_SWITCH_NOTEBOOK_SMALL"] = "1"
        self.kernel = KernelManager()
        self.kernel.start_kernel(cwd=str(self.here), env=env)
        self._done: dict[str, Any] = {}

    def run(
        self,
        name: str,
        show: dict[str, str] | None = None,
        settings: dict[str, str] | None = None,
        cells: int | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """The executed notebook, and what its names held at the end.

        show:     expressions in them, by the name that their values are to have here
        settings: lines of the notebook to replace
        cells:    run only so many of them
        """
        notebook = read(name)
        for old, new in (settings or {}).items():
            assert sum(old in cell.source for cell in notebook.cells) == 1, old
            for cell in notebook.cells:
                cell.source = cell.source.replace(old, new)
        values = ", ".join(f"{key!r}: {expression}" for key, expression in (show or {}).items())
        shown = nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({{{values}}}))")
        notebook.cells = [nbformat.v4.new_code_cell(BEFORE), *notebook.cells[:cells], shown]
        NotebookClient(notebook, km=self.kernel, timeout=3600).execute()
        return notebook, json.loads(stdout(notebook.cells[-1].outputs))

    def trained(self) -> Path:
        """The SAE of the first notebook, which the others use."""
        if not (self.runs / "notebooks" / "switch").exists():
            self.run(TRAIN)
        return self.runs / "notebooks" / "switch"


def outputs(notebook: Any) -> Iterator[Any]:
    return (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)


def printed(notebook: Any) -> str:
    return stdout(outputs(notebook))


def stdout(found: Iterable[Any]) -> str:
    """Of a cell or several: on a busy machine, what one ``print`` writes may come in two outputs."""
    return "".join(output.text for output in found if output.get("name") == "stdout")


def n_pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))
