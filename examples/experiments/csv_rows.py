"""Rows of the experiments' CSVs: reading, writing and selecting them, and means with ranges over seeds.

A table is a list of rows with the same columns; None and nan where nothing was measured.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_TEXT = {"experiment", "architecture", "start", "gate", "load_balancing", "load_balance_scale", "units"}


def read(file: Path) -> list[Row]:
    """Read a CSV: numbers as floats, empty fields as nan; no rows if the file does not exist."""
    if not file.exists():
        return []
    with open(file, newline="") as handle:
        return [{n: v if n in _TEXT else float(v or "nan") for n, v in row.items()} for row in csv.DictReader(handle)]


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    """Write a CSV atomically: floats with six digits, None as an empty field."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    with open(unfinished, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
        )
    os.replace(unfinished, file)


def with_seconds(rows: Iterable[Row], timing: Iterable[Row]) -> list[Row]:
    """Add to each row the seconds of its training steps: their number times the time of one, or nan if unknown."""
    shape = ("architecture", "d_sae", "n_experts", "k")
    per_step = {tuple(t[n] for n in shape): t["seconds_per_step"] for t in timing}
    return [
        {**r, "seconds": r.get("step", r.get("steps", 0)) * per_step.get(tuple(r[n] for n in shape), math.nan)}
        for r in rows
    ]


def of(rows: Iterable[Row], *experiments: str, **settings: Any) -> list[Row]:
    """The rows of these experiments and settings, each SAE once."""
    seen: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["experiment"] in experiments and all(row[n] == v for n, v in settings.items()):
            seen[tuple((n, str(v)) for n, v in row.items() if n != "experiment")] = row
    return list(seen.values())


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[n] for n in names)].append(row)
    return dict(sorted(groups.items()))


def label(row: Row) -> str:
    return f"switch, {row['n_experts']:.0f}" if row["architecture"] == "switch" else row["architecture"]


def middle_k(rows: Iterable[Row]) -> float:
    ks = sorted({r["k"] for r in rows})
    return ks[len(ks) // 2]


def values(rows: Iterable[Row], name: str) -> list[float]:
    return [r[name] for r in rows]


def mean(numbers: Sequence[float]) -> float:
    return statistics.fmean(numbers)


def span(numbers: Sequence[float], digits: int = 3) -> str:
    """A mean with its minimum and maximum."""
    if len(numbers) == 1:
        return f"{numbers[0]:.{digits}f}"
    return f"{mean(numbers):.{digits}f} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def signed(changes: Sequence[float]) -> str:
    """Relative changes: their mean with their minimum and maximum."""
    return f"{mean(changes):+.1%} ({min(changes):+.1%} to {max(changes):+.1%})"


def change(a: Sequence[float], b: Sequence[float]) -> str:
    """The relative change of the means, with its range over pairs of seeds."""
    low, high = min(a) / max(b) - 1, max(a) / min(b) - 1
    return f"{mean(a) / mean(b) - 1:+.1%} ({low:+.1%} to {high:+.1%})"


def verdict(a: Sequence[float], b: Sequence[float], sign: int) -> str:
    """Whether a is above b (sign 1) or below it (-1); undecided where seeds overlap, and marked where there is one."""
    if min(a) <= max(b) and min(b) <= max(a):
        return "seeds overlap"
    answer = "holds" if (mean(a) - mean(b)) * sign > 0 else "does not hold"
    return answer if min(len(a), len(b)) > 1 else f"{answer} (one seed)"


def rounded(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"
