"""What is trained: every cell of every experiment, in stages, since later cells use what earlier ones found."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One SAE to train. Two cells of different experiments with the same settings are trained once."""

    architecture: str  # standard, gated, topk (SAELens's own, dense), sparse_topk, switch
    d_sae: int
    k: int = 32  # of those with an L1 coefficient: the L0 it was chosen for
    n_experts: int = 1
    lr: float = 1e-3
    l1_coefficient: float = 0.0
    load_balance_coefficient: float = 0.3
    gate: str = "probability"
    seed: int = 0

    def key(self, of_run: dict[str, Any]) -> str:
        """A name for the cell and the settings of the whole run."""
        text = json.dumps([asdict(self), of_run], sort_keys=True)
        return f"{self.architecture}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def label(self) -> str:
        return f"switch {self.n_experts}" if self.architecture == "switch" else self.architecture

    def weight(self, d_in: int) -> float:
        """How long it takes, in arbitrary units: for the estimate of the time left."""
        dense = 5 * self.d_sae if self.architecture not in ("sparse_topk", "switch") else self.d_sae / self.n_experts
        return d_in * (2 * dense + 12 * self.k) + 0.15 * self.d_sae * d_in


@dataclass(frozen=True)
class Plan:
    """The size of the experiments."""

    d_sae: int
    ks: tuple[int, ...]
    experts: tuple[int, ...]
    flop_matched: tuple[int, ...]
    seeds: tuple[int, ...]
    few_seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    coefficients: tuple[float, ...]
    scaling: tuple[int, ...]
    l1_coefficients: dict[str, tuple[float, ...]]
    baselines: tuple[str, ...] = ("standard", "gated")


PLANS = {
    "default": Plan(
        d_sae=4096,
        ks=(16, 32, 64),
        experts=(2, 4, 8, 16, 32, 64),
        flop_matched=(2, 4, 8),
        seeds=(0, 1, 2),
        few_seeds=(0, 1),
        learning_rates=(3e-4, 1e-3, 3e-3),
        coefficients=(0.0, 0.03, 0.3, 3.0, 30.0),
        scaling=(2**11, 2**12, 2**13, 2**14, 2**15, 2**16),
        l1_coefficients={"standard": (0.3, 1.0, 3.0), "gated": (0.3, 1.0, 3.0)},
    ),
    "full": Plan(
        d_sae=4096,
        ks=(8, 16, 32, 64, 128),
        experts=(2, 4, 8, 16, 32),
        flop_matched=(2, 4, 8, 16),
        seeds=(0, 1, 2, 3, 4),
        few_seeds=(0, 1, 2),
        learning_rates=(1e-4, 3e-4, 6e-4, 1e-3, 2e-3, 4e-3),
        coefficients=(0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
        scaling=(2**11, 2**12, 2**13, 2**14, 2**15, 2**16),
        l1_coefficients={"standard": (0.1, 0.3, 1.0, 3.0, 10.0), "gated": (0.1, 0.3, 1.0, 3.0, 10.0)},
    ),
    "tiny": Plan(
        d_sae=256,
        ks=(8,),
        experts=(4,),
        flop_matched=(),
        seeds=(0, 1),
        few_seeds=(0,),
        learning_rates=(1e-3,),
        coefficients=(),
        scaling=(),
        l1_coefficients={},
        baselines=(),
    ),
}

N_STAGES = 3


def stage(number: int, plan: Plan, rows: Sequence[Row]) -> list[tuple[str, Cell]]:
    """(experiment, cell) of a stage; ``rows`` are the results of those before."""
    return [_learning_rates, _l1_coefficients, _comparisons][number](plan, rows)


def _learning_rates(plan: Plan, rows: Sequence[Row]) -> list[tuple[str, Cell]]:  # noqa: ARG001
    k = plan.ks[len(plan.ks) // 2]
    shapes = [Cell("sparse_topk", plan.d_sae, k)]
    shapes += [Cell("switch", plan.d_sae, k, E) for E in _ends(plan.experts)]
    shapes += [
        Cell(a, plan.d_sae, k, l1_coefficient=plan.l1_coefficients[a][len(plan.l1_coefficients[a]) // 2])
        for a in plan.baselines
    ]
    return [("learning rate", replace(c, lr=lr)) for c in shapes for lr in plan.learning_rates]


def _l1_coefficients(plan: Plan, rows: Sequence[Row]) -> list[tuple[str, Cell]]:
    k = plan.ks[len(plan.ks) // 2]
    return [
        ("L1 coefficient", Cell(a, plan.d_sae, k, l1_coefficient=c, lr=best_lr(rows, a, 1)))
        for a in plan.baselines
        for c in plan.l1_coefficients[a]
    ]


def _comparisons(plan: Plan, rows: Sequence[Row]) -> list[tuple[str, Cell]]:
    def tuned(architecture: str, d_sae: int, k: int, E: int = 1, **options: Any) -> Cell:
        return Cell(architecture, d_sae, k, E, lr=best_lr(rows, architecture, E), **options)

    cells = []
    for seed in plan.seeds:
        for k in plan.ks:
            cells.append(("fixed width", tuned("sparse_topk", plan.d_sae, k, seed=seed)))
            cells += [("fixed width", tuned("switch", plan.d_sae, k, E, seed=seed)) for E in plan.experts]
    for seed in plan.few_seeds:
        for k in plan.ks:
            cells += [("matched FLOPs", tuned("switch", plan.d_sae * E, k, E, seed=seed)) for E in plan.flop_matched]
    for k in plan.ks:
        for a in plan.baselines:
            l1 = l1_for_l0(rows, a, k)
            cells += [("fixed width", tuned(a, plan.d_sae, k, l1_coefficient=l1, seed=s)) for s in plan.few_seeds[:1]]
    middle, E = plan.ks[len(plan.ks) // 2], plan.experts[len(plan.experts) // 2]
    cells.append(("fixed width", replace(tuned("sparse_topk", plan.d_sae, middle), architecture="topk")))
    for seed in plan.few_seeds:
        cells += [
            ("coefficient", tuned("switch", plan.d_sae, middle, E, load_balance_coefficient=c, seed=seed))
            for c in plan.coefficients
        ]
        if plan.coefficients:
            cells += [
                ("gate", tuned("switch", plan.d_sae, middle, n, gate=gate, seed=seed))
                for n in _ends(plan.experts)
                for gate in ("probability", "one")
            ]
    for width in plan.scaling:
        cells.append(("scaling", tuned("sparse_topk", width, middle)))
        for n in sorted({8, 64, max(2, width // 512)}):
            if width // n >= middle:
                cells.append(("scaling", tuned("switch", width, middle, n)))
    return cells


def _ends(values: Sequence[int]) -> list[int]:
    return sorted({values[0], values[-1]})


def best_lr(rows: Sequence[Row], architecture: str, n_experts: int) -> float:
    """Of the learning-rate sweep: that with the least error; for a number of experts not swept, the nearest one's."""
    swept = [r for r in rows if r["experiment"] == "learning rate" and r["architecture"] == architecture]
    if not swept:
        return Cell.lr
    nearest = min({r["n_experts"] for r in swept}, key=lambda E: abs(math.log(E / n_experts)))
    return min((r for r in swept if r["n_experts"] == nearest), key=lambda r: r["fvu"])["lr"]


def l1_for_l0(rows: Sequence[Row], architecture: str, l0: float) -> float:
    """The coefficient whose L0 should be ``l0``: a straight line through the two nearest, both axes logarithmic."""
    swept = sorted(
        (math.log(max(r["l0"], 1e-3)), math.log(r["l1_coefficient"]))
        for r in rows
        if r["experiment"] == "L1 coefficient" and r["architecture"] == architecture
    )
    below = [p for p in swept if p[0] <= math.log(l0)]
    i = min(max(len(below) - 1, 0), len(swept) - 2)
    (x0, y0), (x1, y1) = swept[i], swept[i + 1]
    slope = 0.0 if x1 == x0 else (y1 - y0) / (x1 - x0)
    return math.exp(y0 + slope * (math.log(l0) - x0))
