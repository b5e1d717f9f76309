"""The history of a training run: the logged metrics, kept as lines of JSON beside the weights, with or without W&B."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from sae_lens_switch.common.printable import logger
from sae_lens_switch.training.wandb_file import wandb_rows

FILENAME = "history.jsonl"
# Steps kept per run, at most: enough for a curve, few enough to cost nothing.
_POINTS = 200
# 100x the size of the history of a run with a thousand experts.
_LARGEST = 1 << 28

Number = int | float | None  # None where it was not finite
Row = dict[str, Number | list[Number]]


class History:
    """SAELens's and our metrics under their W&B names, at regular steps; per-expert metrics as one list.

    Attributes:
        every: Keep one step out of this many.
        rows: What was kept, oldest first.
    """

    def __init__(self, total_steps: int) -> None:
        self.every = max(1, -(-total_steps // _POINTS))
        self.rows: list[Row] = []

    def is_due(self, step: int) -> bool:
        """Whether to keep this step, counted from 1."""
        return step % self.every == 0

    def add(self, step: int, log: Mapping[str, object]) -> None:
        """Keep the numbers of a step's log."""
        self.rows.append({"step": step, **_row(log)})

    def save(self, folder: str | Path) -> Path:
        """Write ``history.jsonl`` atomically; returns its path."""
        file = Path(folder) / FILENAME
        unfinished = file.with_suffix(".unfinished")
        try:
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)
        return file

    def load(self, folder: str | Path) -> None:
        """Resume from the history in a checkpoint, if it has one; a broken one is dropped with a warning."""
        file = Path(folder) / FILENAME
        try:
            self.rows = read_history(file) if file.exists() else []
        except (ValueError, OSError) as error:
            logger.warning(f"the curves begin anew: {error}")
            self.rows = []


def read_history(file: str | Path) -> list[Row]:
    """Read a ``history.jsonl``, or the ``.wandb`` file that W&B keeps of a run, online or offline.

    Returns:
        One row per kept step: numbers and lists of numbers by name, None for those that were not finite. Other values
        are dropped.

    Raises:
        ValueError: If the file is neither.
    """
    file = Path(file)
    if file.suffix == ".wandb":
        return [_row(row) for row in wandb_rows(file)]
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"{file}: expected at most {_LARGEST:,} bytes; got {file.stat().st_size:,}")
    rows = []
    text = file.read_text(encoding="utf-8", errors="replace")
    # Split at line feeds only: names may contain other characters that Python counts as line breaks.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: expected one JSON object per line ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: expected a JSON object; got {line[:40]!r}")
        rows.append(numbers_of(row))
    return rows


def numbers_of(table: Mapping[str, object]) -> Row:
    """The entries that are a number, a list of numbers or None, with None for what no finite float can hold."""
    found: Row = {}
    for name, value in table.items():
        with suppress(TypeError):
            found[name] = [_number(v) for v in value] if isinstance(value, list) else _number(value)
    return found


def _number(value: object) -> Number:
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise TypeError
    if isinstance(value, int):
        return value if abs(value) < 2**1023 else None
    return value if value is not None and math.isfinite(value) else None


def _row(log: Mapping[str, object]) -> Row:
    """Numbers to six digits, None where not finite; ``name_expert_0``, ``name_expert_1``, ... as one list ``name``."""
    row: Row = {}
    lists: dict[str, dict[int, Number]] = {}
    for name, value in log.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        number = _number(value)
        number = float(f"{number:.6g}") if isinstance(number, float) else number
        stem, found, expert = name.rpartition("_expert_")
        if found and expert.isdigit():
            lists.setdefault(stem, {})[int(expert)] = number
        else:
            row[name] = number
    return row | {stem: [numbers[e] for e in sorted(numbers)] for stem, numbers in lists.items()}
