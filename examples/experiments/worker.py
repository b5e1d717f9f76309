"""A worker: computes activations, then trains cells, whatever no other worker has taken, until nothing is left.

Killed at any moment and started again, or beside others, it goes on: a part or a cell counts once its file is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import Cell
from claiming import claimed
from plans import L1_SWEEP, SWEEP, Plan, Row, cells

_POLL_SECONDS = 0.5


class Results:
    """What has been measured so far, on disk: a folder per cell, a file per budget."""

    def __init__(self, folder: Path, of_run: dict[str, Any]) -> None:
        self.folder, self.of_run = folder, of_run

    def of(self, cell: Cell) -> Path:
        return self.folder / cell.key(self.of_run)

    def is_finished(self, cell: Cell) -> bool:
        return cell.is_ready and all((self.of(cell) / f"{budget}.json").exists() for budget in cell.budgets)

    def rows_and_curves(self, planned: Sequence[Cell]) -> tuple[list[Row], list[Row]]:
        from training import finished

        rows, curves = [], []
        for cell in planned:
            for found in finished(cell, self.of(cell)) if cell.is_ready else []:
                settings = cell.settings | {"tokens": found["tokens"]}
                rows.append(settings | found["row"])
                curves += [settings | point for point in found["curve"]]
        return rows, curves

    def planned(self, plan: Plan) -> list[Cell]:
        """Every cell; those whose settings the results do not yet choose are not ready."""
        found = cells(plan, [])
        while True:  # what one sweep chooses, another one needs
            rows, _ = self.rows_and_curves([c for c in found if c.experiment in (SWEEP, L1_SWEEP)])
            again = cells(plan, rows)
            if again == found:
                return found
            found = again


def work(plan: Plan, cache: Any, results: Results, parent: int | None = None) -> None:
    """Take part in everything that is to be done."""
    from training import remove_trunks

    def go_on() -> None:
        if parent is not None and os.getppid() != parent:
            raise SystemExit("the command that started this worker is gone")

    for _part in cache.fill():
        go_on()
    while not all(cache.part_file(part).exists() for part in range(cache.n_parts)):
        go_on()
        time.sleep(_POLL_SECONDS)
    trained = _Trainer(plan, cache, results, go_on)
    while True:
        go_on()
        planned = results.planned(plan)
        todo = [c for c in planned if not results.is_finished(c)]
        if not todo:
            for cell in planned:  # one may have been killed between its last result and this
                remove_trunks(results.of(cell))
            return
        if not any(trained.if_free(cell) for cell in todo if cell.is_ready):
            time.sleep(_POLL_SECONDS)  # others train what is left, or what chooses it


class _Trainer:
    """Trains a cell that no other worker trains, and keeps the layers that it has read."""

    def __init__(self, plan: Plan, cache: Any, results: Results, go_on: Any) -> None:
        self.plan, self.cache, self.results, self.go_on = plan, cache, results, go_on
        self.layers: dict[int, Any] = {}
        self.losses: dict[int, Any] = {}

    def if_free(self, cell: Cell) -> bool:
        from training import train

        folder = self.results.of(cell)
        with claimed(self.results.folder.parent / "locks", folder.name) as mine:
            if not mine or self.results.is_finished(cell):
                return False
            ce = None if cell.experiment in (SWEEP, L1_SWEEP) else lambda sae: self.loss(cell.layer).recovered(sae)
            train(cell, self.layer(cell.layer), folder, ce, self.go_on)
        return True

    def layer(self, number: int) -> Any:
        from activations import Layer

        if number not in self.layers:
            self.layers[number] = Layer.of(self.cache, number)
        return self.layers[number]

    def loss(self, number: int) -> Any:
        from measuring import LanguageModelLoss

        if number not in self.losses:
            self.losses[number] = LanguageModelLoss(self.layer(number), self.plan.ce_contexts)
        return self.losses[number]
