"""The parts of README.md and docs/experiments that are made from CSVs: see benchmarks/publish.py.

The long runs, whose CSVs are in docs/experiments/long and /rest, stand for what they measured; what they have not
measured comes from the short runs, whose CSVs are in docs/experiments. Every row says with how many tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import short_runs.claims
from claims import claims
from csv_rows import Row, read
from gains import against_tokens, efficiency, fits
from tables import ablations, study

SHORT = Path(__file__).parents[2] / "docs" / "experiments"
LONG, REST, STUDIED = SHORT / "long", SHORT / "rest", SHORT / "study"
_COMMANDS = {
    "default": "make experiments",
    "full": "python examples/experiments/run.py --full",
    "rest": "python examples/experiments/run.py --plan rest",
}
_SHORT_COMMAND = "[short runs](#the-short-runs)"
# Topics of the long runs' claims, in the order of the table, with the claims of the short runs on the same.
_TOPICS = {
    "error": r"matched FLOPs, (k 16|4 passes): .* smaller error",
    "sample efficiency": "",
    "middle layer": "",
    "CE loss": r"matched FLOPs: .* CE loss",
    "dead latents": r"matched FLOPs: .* dead latents",
    "fixed width": r"fixed width, k 16: (16|32|64) experts",
    "baselines": r"(ReLU|Gated) .*at L0 .* at k 16",
    "gate": r"16 experts: a gate",
    "load balance": r"without the load-balance loss|a far too large coefficient",
}
_HEADLINE = ("error", "sample efficiency", "fixed width")
_COLUMNS = {
    "claim": "claim",
    "authors": "authors, 819M tokens",
    "here": "here",
    "tokens": "tokens here",
    "holds here": "holds here",
    "command": "command",
}


def all_claims(long: Path = LONG, short: Path = SHORT, rest: Path = REST) -> list[Row]:
    """By topic: of the long runs, or where they have nothing on it, of the short ones."""
    measured, earlier = _long_claims(long), _short_claims(short)
    later = _finished(_long_claims(rest), rest)
    # The first long runs had massive activations after the middle layer.
    again = {row["topic"] for row in later} & {"middle layer"}
    measured = [row for row in measured if row["topic"] not in again] + later
    known = {row["topic"] for row in measured}
    found = measured + [row for row in earlier if row["topic"] not in known]
    order = list(_TOPICS)
    return sorted(found, key=lambda row: order.index(row["topic"]))


def _long_claims(folder: Path) -> list[Row]:
    rows = read(folder / "results.csv")
    if not rows:
        return []
    command = _COMMANDS.get(json.loads((folder / "run.json").read_text())["plan"], _COMMANDS["default"])
    return [row | {"command": f"`{command}`"} for row in claims(rows, read(folder / "curves.csv"))]


def _short_claims(folder: Path) -> list[Row]:
    found = []
    for row in short_runs.claims.claims(read(folder / "results.csv")):
        topic = next((t for t, of_it in _TOPICS.items() if of_it and re.match(of_it, row["claim"])), None)
        if topic is not None:
            tokens = "4 x 100,000" if "4 passes" in row["claim"] else "100,000"
            more = {"topic": topic, "tokens": tokens, "holds here": row[""], "command": _SHORT_COMMAND}
            found.append(row | more)
    return found


def table(rows: Sequence[Row], columns: dict[str, str] | None = None) -> str:
    columns = columns or {name: name for name in rows[0]}
    lines = [list(columns.values()), ["---"] * len(columns), *([str(r[name]) for name in columns] for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def headline() -> str:
    columns = {name: said for name, said in _COLUMNS.items() if name != "command"}
    return table([row for row in all_claims() if row["topic"] in _HEADLINE], columns)


def _finished(rows: list[Row], folder: Path) -> list[Row]:
    """Those with all seeds: a run is published when only a part of it is over, too."""
    if not rows:
        return []
    n = len(json.loads((folder / "run.json").read_text())["settings"]["seeds"])
    return [row for row in rows if set(re.findall(r"\d+", str(row["seeds"]))) == {str(n)}]


def _of_long_runs(rows: list[Row]) -> str:
    return table(rows) if rows else "Not measured yet."


def _of_both(made: Callable[[list[Row], list[Row]], list[Row]]) -> str:
    rows = [made(read(folder / "results.csv"), read(folder / "curves.csv")) for folder in (LONG, REST)]
    return _of_long_runs(rows[0] + _finished(rows[1], REST))


BLOCKS = {
    "experiments-claims": lambda: table(all_claims(), _COLUMNS),
    "experiments-headline": headline,
    "experiments-tokens": lambda: _of_both(against_tokens),
    "experiments-fits": lambda: _of_both(fits),
    "experiments-ablations": lambda: _of_long_runs(ablations(read(STUDIED / "results.csv"), [])),
    "experiments-rates": lambda: _of_long_runs(ablations(read(REST / "results.csv"), [])),
    "experiments-study": lambda: _of_long_runs(study(read(STUDIED / "results.csv"), read(STUDIED / "curves.csv"))),
    "experiments-efficiency": lambda: _of_both(efficiency),
}
