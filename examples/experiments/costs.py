"""What the experiments cost: predicted from measured rates, and corrected by what has been measured since."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from cells import Cell
from plans import L1_SWEEP, SWEEP, Plan, cells

# Of the language model on one core of a 2.6 GHz Xeon: a layer takes so many seconds per token.
_SECONDS_PER_TOKEN_AND_LAYER = 9.5e-5


def activation_seconds(plan: Plan) -> float:
    """Predicted, on one core: one pass to the last layer that a token is wanted of."""
    seconds, done = 0.0, 0
    for layer, n in sorted(plan.layer_tokens().items(), reverse=True):
        seconds += max(0, n - done) * (layer + 1) * _SECONDS_PER_TOKEN_AND_LAYER
        done = max(done, n)
    return seconds


def minutes(plan: Plan) -> dict[str, float]:
    """Of one core, by experiment, as predicted; what two experiments share counts for the first."""
    found: dict[str, float] = defaultdict(float, {"activations": activation_seconds(plan) / 60})
    seen = set()
    for cell in cells(plan, []):
        key = cell.key({}), cell.tokens
        if key not in seen or cell.l1_coefficient is None:
            found[cell.experiment] += cell.seconds(ce_contexts=_ce_contexts(plan, cell)) / 60
        seen.add(key)
    if len(plan.learning_rates) == 2:
        found[SWEEP] *= 3 / 2  # see Plan.learning_rates
    return found


def costs(plan: Plan, workers: int) -> str:
    """Cells and minutes of each experiment, as predicted."""
    numbers, found = Counter(cell.experiment for cell in cells(plan, [])), minutes(plan)
    lines = [f"  {name}: {f'{numbers[name]} cells, ' if name in numbers else ''}{m:.1f}" for name, m in found.items()]
    total = sum(found.values())
    head = f"predicted minutes of one core, {total:.0f} in all; {total / workers:.0f} minutes for {workers} workers:"
    return "\n".join([head, *lines])


def _ce_contexts(plan: Plan, cell: Cell) -> int:
    return 0 if cell.experiment in (SWEEP, L1_SWEEP) else plan.ce_contexts


def minutes_left(plan: Plan, cache: Any, results: Any, workers: int) -> float:
    """Predicted from what is left, and from how much longer than predicted the finished part took."""
    from training import finished

    parts = sum(not cache.part_file(part).exists() for part in range(cache.n_parts))
    predicted = activation_seconds(plan) * parts / cache.n_parts
    took, expected = 0.0, 0.0
    seen = set()
    for cell in results.planned(plan):
        if cell.is_ready and (folder := results.of(cell)) in seen:
            continue
        if cell.is_ready:
            seen.add(folder)
            found = finished(cell, folder)
            took += sum(f["took"]["seconds"] for f in found)
            expected += sum(f["took"]["steps"] for f in found) * cell.step_seconds(cache.source.d_in)
            if len(found) == len(cell.budgets):
                continue
        predicted += cell.seconds(cache.source.d_in, _ce_contexts(plan, cell))
    slower = took / expected if expected else 1.0
    return predicted * slower / 60 / workers
