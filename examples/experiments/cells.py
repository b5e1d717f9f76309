"""The cells of every experiment, in stages: later cells use the results of earlier ones."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

Row = dict[str, Any]
L1_ARCHITECTURES = ("standard", "gated")
# Sweeps have a separate seed, so that the SAEs that chose a setting are not those compared afterwards.
TUNING_SEED = 100
_EXTENSIONS = 4  # of a sweep, beyond the values of the plan


@dataclass(frozen=True)
class Cell:
    """One SAE to train. Two cells of different experiments with the same settings are trained once."""

    architecture: str  # standard, gated, topk (SAELens's own, dense), sparse_topk, switch
    d_sae: int
    k: int = 16  # with an L1 coefficient: the L0 that it was chosen for
    n_experts: int = 1
    lr: float = 2e-3
    l1_coefficient: float = 0.0
    load_balance_coefficient: float = 0.3
    load_balance_scale: str = "variance"
    gate: str = "probability"
    units: str = "unit variance"  # of the activations; "model": as the language model has them
    passes: int = 1
    seed: int = 0

    def key(self, of_run: dict[str, Any]) -> str:
        """A name for the cell and the settings of the whole run."""
        text = json.dumps([asdict(self), of_run], sort_keys=True)
        return f"{self.architecture}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def label(self) -> str:
        return f"switch {self.n_experts}" if self.architecture == "switch" else self.architecture

    @property
    def shape(self) -> tuple[str, int, int, int]:
        """The settings that the time of a step depends on."""
        return self.architecture, self.d_sae, self.n_experts, self.k

    def weight(self, d_in: int, batch: int = 256) -> float:
        """Duration in arbitrary units, to estimate the time left."""
        encoders = {"standard": 5.0, "topk": 5.0, "gated": 15.0}.get(self.architecture, 1.0)
        return (
            self.passes * d_in * (batch * (2 * encoders * self.d_sae / self.n_experts + 60 * self.k) + 400 * self.d_sae)
        )


@dataclass(frozen=True)
class Plan:
    """The size of the experiments."""

    d_sae: int
    ks: tuple[int, ...]
    experts: tuple[int, ...]
    experts_all_ks: tuple[int, ...]  # trained at every k, the others at the middle one
    flop_matched: tuple[int, ...]
    seeds: tuple[int, ...]
    few_seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    wide: int  # learning rates are tuned at this width too
    coefficients: tuple[float, ...] = ()
    long_coefficients: tuple[float, ...] = ()  # with the most passes
    scale_coefficients: tuple[float, ...] = ()
    gate_experts: tuple[int, ...] = ()
    scaling: tuple[int, ...] = ()
    scaling_passes: int = 1
    passes: tuple[int, ...] = ()
    l1_coefficients: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def middle_k(self) -> int:
        return self.ks[len(self.ks) // 2]

    @property
    def middle_experts(self) -> int:
        return 16 if 16 in self.experts else self.experts[len(self.experts) // 2]


PLANS = {
    "default": Plan(
        d_sae=2048,
        ks=(8, 16, 32),
        experts=(2, 4, 8, 16, 32, 64),
        experts_all_ks=(4, 16, 64),
        flop_matched=(2, 4, 8),
        seeds=(0, 1, 2),
        few_seeds=(0, 1),
        learning_rates=(1e-3, 2e-3, 4e-3),
        wide=8192,
        coefficients=(0.0, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0),
        long_coefficients=(0.0, 0.1, 0.3, 1.0),
        scale_coefficients=(0.01, 0.3, 3.0, 30.0),
        gate_experts=(2, 16, 64),
        scaling=(2**11, 2**12, 2**13, 2**14, 2**15, 2**16),
        passes=(1, 4),
        l1_coefficients={"standard": (4.0, 8.0, 16.0), "gated": (6.0, 12.0, 24.0)},
    ),
    "full": Plan(
        d_sae=4096,
        ks=(8, 16, 32, 64),
        experts=(2, 4, 8, 16, 32, 64),
        experts_all_ks=(2, 4, 8, 16, 32, 64),
        flop_matched=(2, 4, 8, 16),
        seeds=(0, 1, 2, 3, 4),
        few_seeds=(0, 1, 2),
        learning_rates=(5e-4, 1e-3, 2e-3, 4e-3),
        wide=16384,
        coefficients=(0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        long_coefficients=(0.0, 0.03, 0.1, 0.3, 1.0, 3.0),
        scale_coefficients=(0.01, 0.1, 0.3, 1.0, 3.0, 30.0),
        gate_experts=(2, 4, 8, 16, 32, 64),
        scaling=(2**11, 2**12, 2**13, 2**14, 2**15, 2**16),
        scaling_passes=4,
        passes=(1, 2, 4),
        l1_coefficients={"standard": (2.0, 4.0, 8.0, 16.0), "gated": (3.0, 6.0, 12.0, 24.0)},
    ),
    "tiny": Plan(
        d_sae=256,
        ks=(8,),
        experts=(4,),
        experts_all_ks=(4,),
        flop_matched=(),
        seeds=(0, 1),
        few_seeds=(0,),
        learning_rates=(2e-3,),
        wide=256,
    ),
}


def stages(plan: Plan, rows: Sequence[Row]) -> list[list[tuple[str, Cell]]]:
    """The (experiment, cell) pairs of every stage.

    ``rows`` are the results so far: they decide the cells of later stages, and whether earlier sweeps are extended.
    """
    k, experts = plan.middle_k, sorted({plan.experts[0], plan.experts[len(plan.experts) // 2 - 1], plan.experts[-1]})
    sparse = [Cell("sparse_topk", F, k) for F in sorted({plan.d_sae, plan.wide})]
    sparse += [Cell("switch", plan.d_sae, k, E) for E in experts]
    sparse += [Cell("switch", plan.wide, k, E) for E in experts[1:] if plan.wide > plan.d_sae]
    dense = [
        Cell(a, plan.d_sae, k, l1_coefficient=values[len(values) // 2]) for a, values in plan.l1_coefficients.items()
    ]
    return [
        _learning_rates(sparse, plan, rows),
        _comparisons(plan, rows),
        _learning_rates(dense, plan, rows),
        _l1_coefficients(plan, rows),
        _baselines(plan, rows),
    ]


def _learning_rates(shapes: Sequence[Cell], plan: Plan, rows: Sequence[Row]) -> list[tuple[str, Cell]]:
    cells = []
    for shape in shapes:
        swept = {r["lr"]: _criterion(r) for r in _swept(rows, "learning rate", shape.architecture, shape)}
        cells += [replace(shape, lr=lr, seed=TUNING_SEED) for lr in _extended(plan.learning_rates, swept)]
    return [("learning rate", c) for c in cells]


def _extended(values: Sequence[float], found: dict[float, float]) -> list[float]:
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


def _l1_coefficients(plan: Plan, rows: Sequence[Row]) -> list[tuple[str, Cell]]:
    """Extended until their L0s enclose every k."""
    cells = []
    for a, values in plan.l1_coefficients.items():
        lr = best_lr(rows, a, plan.d_sae, 1)
        l0 = {r["l1_coefficient"]: r["l0"] for r in _swept(rows, "L1 coefficient", a)}
        values, ratio = list(values), values[1] / values[0]
        for _ in range(_EXTENSIONS):
            if all(v in l0 for v in values) and max(l0.values()) < max(plan.ks):
                values.insert(0, float(f"{values[0] / ratio:.6g}"))
            if all(v in l0 for v in values) and min(l0.values()) > min(plan.ks):
                values.append(float(f"{values[-1] * ratio:.6g}"))
        cells += [Cell(a, plan.d_sae, plan.middle_k, l1_coefficient=c, lr=lr, seed=TUNING_SEED) for c in values]
    return [("L1 coefficient", c) for c in cells]


def _comparisons(plan: Plan, rows: Sequence[Row]) -> list[tuple[str, Cell]]:
    def tuned(architecture: str, d_sae: int, k: int = plan.middle_k, E: int = 1, **options: Any) -> Cell:
        return Cell(architecture, d_sae, k, E, lr=best_lr(rows, architecture, d_sae, E), **options)

    cells: list[tuple[str, Cell]] = []
    for seed in plan.seeds:
        for k in plan.ks:
            experts = plan.experts if k == plan.middle_k else plan.experts_all_ks
            cells.append(("fixed width", tuned("sparse_topk", plan.d_sae, k, seed=seed)))
            cells += [("fixed width", tuned("switch", plan.d_sae, k, E, seed=seed)) for E in experts]
            cells += [("matched FLOPs", tuned("switch", plan.d_sae * E, k, E, seed=seed)) for E in plan.flop_matched]
    E = plan.middle_experts
    for seed in plan.seeds:
        cells += [
            ("coefficient", tuned("switch", plan.d_sae, E=E, load_balance_coefficient=c, seed=seed))
            for c in plan.coefficients
        ]
        cells += [
            ("gate", tuned("switch", plan.d_sae, E=n, gate=gate, seed=seed))
            for n in plan.gate_experts
            for gate in ("probability", "one")
        ]
    for seed in plan.few_seeds:
        cells += [
            (
                "coefficient's scale",
                tuned(
                    *("switch", plan.d_sae),
                    **{"E": E, "load_balance_coefficient": c, "load_balance_scale": scale, "units": "model"},
                    seed=seed,
                ),
            )
            for c in plan.scale_coefficients
            for scale in ("variance", "d_in")
        ]
    for width in plan.scaling:
        for seed in plan.few_seeds:
            longer = {"passes": plan.scaling_passes, "seed": seed}
            cells.append(("scaling", tuned("sparse_topk", width, **longer)))
            cells += [
                ("scaling", tuned("switch", width, E=E, **longer))
                for E in sorted({8, 64, growing(width)})
                if width // E >= plan.middle_k
            ]
    for seed in plan.few_seeds:
        cells += [
            (
                "coefficient, more passes",
                tuned("switch", plan.d_sae, E=E, load_balance_coefficient=c, passes=max(plan.passes), seed=seed),
            )
            for c in plan.long_coefficients
        ]
    for seed in plan.seeds:
        for n in plan.passes:
            cells.append(("passes", tuned("sparse_topk", plan.d_sae, passes=n, seed=seed)))
            cells.append(("passes", tuned("switch", plan.d_sae, E=E, passes=n, seed=seed)))
            cells += [("passes", tuned("switch", plan.d_sae * m, E=m, passes=n, seed=seed)) for m in plan.flop_matched]
    return cells


def _baselines(plan: Plan, rows: Sequence[Row]) -> list[tuple[str, Cell]]:
    lr = best_lr(rows, "sparse_topk", plan.d_sae, 1)
    cells = [Cell("topk", plan.d_sae, plan.middle_k, lr=lr, seed=seed) for seed in plan.seeds]
    for a in plan.l1_coefficients:
        lr = best_lr(rows, a, plan.d_sae, 1)
        cells += [
            Cell(a, plan.d_sae, k, lr=lr, l1_coefficient=l1_for_l0(rows, a, k), seed=seed)
            for seed in plan.seeds
            for k in plan.ks
        ]
    return [("fixed width", c) for c in cells]


def growing(d_sae: int) -> int:
    """The number of experts with 256 latents each."""
    return max(2, d_sae // 256)


# Results of earlier stages


def _swept(rows: Sequence[Row], experiment: str, architecture: str, shape: Cell | None = None) -> list[Row]:
    found = [r for r in rows if r["experiment"] == experiment and r["architecture"] == architecture]
    return [r for r in found if shape is None or (r["d_sae"], r["n_experts"]) == (shape.d_sae, shape.n_experts)]


def _criterion(row: Row) -> float:
    """The criterion for a learning rate. With an L1 coefficient, the error alone would favour a larger L0."""
    return row["final_loss"] if row["architecture"] in L1_ARCHITECTURES else row["fvu"]


def best_lr(rows: Sequence[Row], architecture: str, d_sae: int, n_experts: int) -> float:
    """The best learning rate of the sweep; for other shapes, that of the nearest, in log width and log experts."""
    swept = _swept(rows, "learning rate", architecture)
    if not swept:
        return Cell.lr

    def distance(row: Row) -> float:
        return abs(math.log(row["d_sae"] / d_sae)) + abs(math.log(row["n_experts"] / n_experts))

    nearest = min(map(distance, swept))
    return min((r for r in swept if distance(r) == nearest), key=_criterion)["lr"]


def l1_for_l0(rows: Sequence[Row], architecture: str, l0: float) -> float:
    """The coefficient expected to give ``l0``: log-log interpolation between the two nearest."""
    swept = sorted(
        (math.log(max(r["l0"], 1e-3)), math.log(r["l1_coefficient"]))
        for r in _swept(rows, "L1 coefficient", architecture)
    )
    if len(swept) < 2:
        return 1.0
    below = [p for p in swept if p[0] <= math.log(l0)]
    i = min(max(len(below) - 1, 0), len(swept) - 2)
    (x0, y0), (x1, y1) = swept[i], swept[i + 1]
    slope = 0.0 if x1 == x0 else (y1 - y0) / (x1 - x0)
    return math.exp(y0 + slope * (math.log(l0) - x0))
