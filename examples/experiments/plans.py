"""Which cells are trained, the most important first, and what their sweeps choose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cells import L1_ARCHITECTURES, TUNING_SEED, Cell, with_experts
from studied import STUDY, baseline, studied

Row = dict[str, Any]
SWEEP, L1_SWEEP = "learning rate", "L1 coefficient"
_EXTENSIONS = 2  # of a sweep, beyond the values of the plan


@dataclass(frozen=True)
class Plan:
    """The size of the experiments. Tokens are seen once."""

    tokens: int
    budgets: tuple[int, ...]
    sweep_tokens: int
    learning_rates: tuple[float, ...]  # the best of two is at an edge: a third, at least, is tried
    width: int  # latents of TopK, of an expert at matched FLOPs, of all at fixed width
    matched: dict[int, tuple[int, ...]]  # experts by k; the first k is that of sweeps and of all other experiments
    fixed: tuple[int, ...]
    fixed_tokens: int
    seeds: tuple[int, ...]
    middle: tuple[int, ...]  # experts at the middle layer, at matched FLOPs
    middle_tokens: int
    batch: int = 512
    ablations: dict[str, tuple[int, ...]] = field(default_factory=dict)  # keys of ABLATIONS: of how many experts
    ablation_tokens: int = 0
    study_tokens: tuple[int, int] = (0, 0)  # of the early and the middle layer; see studied.py
    l1_coefficients: dict[str, tuple[float, ...]] = field(default_factory=dict)
    layers: tuple[int, int] = (6, 12)
    held_out_contexts: int = 260
    ce_contexts: int = 32

    @property
    def k(self) -> int:
        return next(iter(self.matched))

    def layer_tokens(self) -> dict[int, int]:
        """Training activations that each layer needs."""
        early, middle = self.layers
        of_middle = max(self.middle_tokens if self.middle else 0, self.study_tokens[1])
        return {early: self.tokens} | ({middle: of_middle} if of_middle else {})


# What may be better than the defaults, one at a time.
ABLATIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "load-balance coefficient": tuple({"load_balance_coefficient": c} for c in (0.0, 0.03, 0.1, 1.0)),
    "load-balance warm-up": ({"load_balance_warm_up": 0.1},),
    "router's learning rate": tuple({"router_lr": m} for m in (0.25, 4.0)),
    "router's start": tuple({"router_start_std": s} for s in (0.1, 3.0)),
    "warm-up": ({"lr_warm_up": 0.05},),
    "AuxK": tuple({"aux_loss_coefficient": c} for c in (1 / 32, 1 / 4)),
    "experts start as copies": ({"start": "copies"}, {"start": "shared"}),
    "batch size": tuple({"batch": b} for b in (256, 1024)),
    "learning rate": tuple({"lr": lr} for lr in (1e-3, 5e-4)),
}

_BUDGETS = (250_000, 500_000, 1_000_000, 2_000_000, 3_000_000)
# What one night adds to the default.
_ADDED: dict[str, Any] = {
    "middle": (2, 4, 8),
    "ablations": {"learning rate": (2, 1)},
    "ablation_tokens": 3_000_000,
    "l1_coefficients": {"standard": (2.0, 4.0, 8.0), "gated": (3.0, 6.0, 12.0)},
}
PLANS = {
    "default": Plan(
        tokens=3_000_000,
        budgets=_BUDGETS,
        sweep_tokens=750_000,
        learning_rates=(1e-3, 2e-3),
        width=2048,
        matched={32: (2, 4, 8)},
        fixed=(8, 32),
        fixed_tokens=1_000_000,
        seeds=(0, 1, 2),
        middle=(4,),
        middle_tokens=500_000,
    ),
    "study": Plan(
        tokens=750_000,
        budgets=(750_000,),
        sweep_tokens=500_000,
        learning_rates=(1e-3, 2e-3),
        width=2048,
        matched={32: ()},
        fixed=(),
        fixed_tokens=0,
        seeds=(0, 1, 2),
        middle=(8,),
        middle_tokens=400_000,
        study_tokens=(750_000, 400_000),
        ablations=dict.fromkeys(
            (
                "router's learning rate",
                "router's start",
                "warm-up",
                "AuxK",
                "experts start as copies",
                "batch size",
            ),
            (8,),
        ),
        ablation_tokens=500_000,
    ),
    "tiny": Plan(
        tokens=4096,
        budgets=(2048, 4096),
        sweep_tokens=1024,
        learning_rates=(2e-3,),
        width=32,
        matched={4: (2,)},
        fixed=(),
        fixed_tokens=0,
        seeds=(0, 1),
        middle=(),
        middle_tokens=0,
        batch=64,
        layers=(0, 1),
        held_out_contexts=4,
        ce_contexts=2,
    ),
}
PLANS["full"] = replace(PLANS["default"], matched=dict.fromkeys((32, 64), (2, 4, 8, 16)), **_ADDED)
PLANS["rest"] = replace(PLANS["default"], matched={32: (16,), 64: (2, 4, 8, 16)}, fixed=(), **_ADDED)


def cells(plan: Plan, rows: Sequence[Row]) -> list[Cell]:
    """Every cell, most important first. ``rows`` are the results so far, which choose what is still None."""
    base = Cell("", "sparse_topk", plan.width, plan.k, layer=plan.layers[0], budgets=plan.budgets, batch=plan.batch)
    compared = [replace(c, lr=best_lr(plan, rows, c)) for c in _comparisons(plan, base)]
    for seed in plan.seeds if any(plan.study_tokens) else ():
        of_seed = studied(replace(base, seed=seed), plan.layers, plan.study_tokens)
        compared += [replace(c, lr=best_lr(plan, rows, baseline(c))) for c in of_seed]
    compared = [_with_l1(plan, rows, c) for c in compared]
    if plan.ablations:
        compared += _ablations(plan, base, rows)
    found: list[Cell] = []
    for cell in compared:  # a sweep comes right before the first cell that needs it
        own = not cell.experiment.startswith(STUDY) or cell == baseline(cell)
        if own and all(_shape(cell) != _shape(other) for other in found):
            found += _sweep(plan, cell, rows) + _l1_sweep(plan, cell, rows)
        found.append(cell)
    return found


def _comparisons(plan: Plan, base: Cell) -> Iterator[Cell]:
    """By seed, so that a run cut short has all architectures with fewer seeds, and not the other way round."""
    for k, numbers in plan.matched.items():
        for seed in plan.seeds:
            topk = replace(base, experiment="matched FLOPs", k=k, seed=seed)
            topk = topk if k == plan.k else replace(topk, budgets=(plan.tokens,))
            yield topk
            yield from (with_experts(topk, n, matched=True) for n in numbers)
    for seed in plan.seeds:
        topk = replace(base, experiment="fixed width", budgets=(plan.fixed_tokens,), seed=seed)
        yield from (with_experts(topk, n, matched=False) for n in plan.fixed)
    for seed in plan.seeds if plan.middle else ():
        topk = replace(base, experiment="middle layer", layer=plan.layers[1], budgets=(plan.middle_tokens,), seed=seed)
        yield topk
        yield from (with_experts(topk, n, matched=True) for n in plan.middle)
    for seed in plan.seeds:
        for a in plan.l1_coefficients:
            yield replace(
                base,
                **{"experiment": "L1 baselines", "architecture": a, "seed": seed},
                **{"budgets": (plan.fixed_tokens,), "l1_coefficient": None},
            )


def _ablations(plan: Plan, base: Cell, rows: Sequence[Row]) -> list[Cell]:
    found = []
    for seed in plan.seeds:
        for name, numbers in plan.ablations.items():
            for E in numbers:
                plain = replace(base, budgets=(plan.ablation_tokens,), seed=seed)
                plain = with_experts(plain, E, matched=True) if E > 1 else plain
                of_which = f", {E} experts" if E > 1 else ", TopK"
                experiment = f"ablation: {name}{of_which if len(numbers) > 1 else ''}"
                plain = replace(plain, experiment=experiment, lr=best_lr(plan, rows, plain))
                found += [replace(plain, **change) for change in ({}, *ABLATIONS[name])]
    return found


# Sweeps


def _shape(cell: Cell | Row) -> tuple[Any, ...]:
    found = cell if isinstance(cell, dict) else vars(cell)
    return found["architecture"], found["d_sae"], found["n_experts"]


def _sweep(plan: Plan, cell: Cell, rows: Sequence[Row]) -> list[Cell]:
    """The learning rates of a shape: at the first k and the early layer, which other k and layers share."""
    errors = {r["lr"]: _judged(r) for r in rows if r["experiment"] == SWEEP and _shape(r) == _shape(cell)}
    l1 = plan.l1_coefficients.get(cell.architecture, (0.0,))
    swept = replace(
        Cell(SWEEP, cell.architecture, cell.d_sae, plan.k, cell.n_experts, plan.layers[0], batch=plan.batch),
        **{"budgets": (plan.sweep_tokens,), "seed": TUNING_SEED, "l1_coefficient": l1[len(l1) // 2]},
    )
    return [replace(swept, lr=lr) for lr in extended(plan.learning_rates, errors)]


def _l1_sweep(plan: Plan, cell: Cell, rows: Sequence[Row]) -> list[Cell]:
    if cell.architecture not in plan.l1_coefficients:
        return []
    swept = replace(cell, experiment=L1_SWEEP, k=plan.k, budgets=(plan.sweep_tokens,), seed=TUNING_SEED)
    coefficients = bracketing(plan.l1_coefficients[cell.architecture], _l0s(rows, cell.architecture), plan.k)
    return [replace(swept, lr=best_lr(plan, rows, cell), l1_coefficient=c) for c in coefficients]


def _l0s(rows: Sequence[Row], architecture: str) -> dict[float, float]:
    """The L0 that each swept coefficient gave."""
    swept = (r for r in rows if r["experiment"] == L1_SWEEP and r["architecture"] == architecture)
    return {r["l1_coefficient"]: r["l0"] for r in swept}


def _with_l1(plan: Plan, rows: Sequence[Row], cell: Cell) -> Cell:
    if cell.l1_coefficient is not None:
        return cell
    l0s = _l0s(rows, cell.architecture)
    planned = bracketing(plan.l1_coefficients[cell.architecture], l0s, cell.k)
    return replace(cell, l1_coefficient=l1_for_l0(l0s, cell.k)) if all(c in l0s for c in planned) else cell


def extended(values: Sequence[float], found: dict[float, float]) -> list[float]:
    """The values, extended beyond the edge by their own ratio while the best one found is at the edge."""
    values = list(values)
    for _ in range(_EXTENSIONS):
        if len(values) < 2 or not all(v in found for v in values):
            break
        best, ratio = min(values, key=found.__getitem__), values[1] / values[0]
        if best == values[-1]:
            values.append(float(f"{values[-1] * ratio:.6g}"))
        elif best == values[0]:
            values.insert(0, float(f"{values[0] / ratio:.6g}"))
        else:
            break
    return values


def best_lr(plan: Plan, rows: Sequence[Row], cell: Cell) -> float | None:
    """The best learning rate of the cell's sweep; None while that goes on."""
    swept = {r["lr"]: _judged(r) for r in rows if r["experiment"] == SWEEP and _shape(r) == _shape(cell)}
    planned = extended(plan.learning_rates, swept)
    return min(planned, key=swept.__getitem__) if all(lr in swept for lr in planned) else None


def _judged(row: Row) -> float:
    """The criterion for a learning rate. With an L1 coefficient, the error alone would favour a larger L0."""
    return row["final_loss"] if row["architecture"] in L1_ARCHITECTURES else row["fvu"]


def bracketing(coefficients: Sequence[float], l0s: dict[float, float], l0: float) -> list[float]:
    """The coefficients, extended by their own ratio while ``l0`` lies outside what they give.

    A coefficient that is extrapolated may miss it twofold.
    """
    found = list(coefficients)
    for _ in range(_EXTENSIONS):
        if len(found) < 2 or not all(c in l0s for c in found):
            break
        reached, ratio = [l0s[c] for c in found], found[1] / found[0]
        if max(reached) < l0:
            found.insert(0, float(f"{found[0] / ratio:.6g}"))
        elif min(reached) > l0:
            found.append(float(f"{found[-1] * ratio:.6g}"))
    return found


def l1_for_l0(l0s: dict[float, float], l0: float) -> float:
    """The coefficient expected to give ``l0``: log-log interpolation between the two nearest."""
    points = sorted((math.log(max(reached, 1e-3)), math.log(c)) for c, reached in l0s.items())
    if len(points) < 2:
        return math.exp(points[0][1])
    below = [p for p in points if p[0] <= math.log(l0)]
    i = min(max(len(below) - 1, 0), len(points) - 2)
    (x0, y0), (x1, y1) = points[i], points[i + 1]
    slope = 0.0 if x1 == x0 else (y1 - y0) / (x1 - x0)
    return math.exp(y0 + slope * (math.log(l0) - x0))
