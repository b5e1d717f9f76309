"""The tables made from the experiments' CSVs: claims, settings, learning rates, slopes, crossovers, passes.

Ranges are over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from csv_rows import Row, change, grouped, label, mean, of, span, values, verdict

from short_runs.claims import claims
from short_runs.learning_rates import L1_ARCHITECTURES, best_lr
from short_runs.scaling import crossover, slopes


def learning_rates(rows: list[Row]) -> list[Row]:
    """Per shape: the learning rate that the sweep chose, also as a multiple of the paper's law for either width."""
    found = []
    swept = of(rows, "learning rate")
    for (a, F, E), mine in grouped(swept, "architecture", "d_sae", "n_experts").items():
        lrs = sorted({r["lr"] for r in mine})
        best = best_lr(swept, a, F, E)
        judged = "final_loss" if a in L1_ARCHITECTURES else "fvu"
        at = {r["lr"]: r[judged] for r in mine}
        found.append(
            {
                "architecture": a,
                "width": f"{F:.0f}",
                "experts": f"{E:.0f}",
                "tried": ", ".join(f"{lr:g}" for lr in lrs),
                "best": f"{best:g}",
                "at the edge": "yes" if best in (lrs[0], lrs[-1]) and len(lrs) > 1 else "no",
                "times 2e-4 / sqrt(F / 2^14)": f"{best / (2e-4 / math.sqrt(F / 2**14)):.1f}",
                "times 2e-4 / sqrt(M / 2^14)": f"{best / (2e-4 / math.sqrt(F / E / 2**14)):.1f}",
                "judged by": judged,
                "at each": ", ".join(f"{at[lr]:.4g}" for lr in lrs),
            }
        )
    return found


def l0_reached(rows: list[Row]) -> list[Row]:
    """The L0 that the interpolated L1 coefficients reach."""
    return [
        {
            "architecture": a,
            "L0 wanted": f"{k:.0f}",
            "L1 coefficient": f"{mean(values(mine, 'l1_coefficient')):.3g}",
            "L0 reached": span(values(mine, "l0"), 1),
            "FVU": span(values(mine, "fvu")),
            "CE recovered": span(values(mine, "ce_recovered")),
            "seeds": len(mine),
        }
        for (a, k), mine in grouped(of(rows, "fixed width"), "architecture", "k").items()
        if a in L1_ARCHITECTURES
    ]


def defaults(rows: list[Row]) -> list[Row]:
    """Per swept setting: the error of each value, and the values that are indistinguishable from the best."""
    sweeps: list[tuple[str, str, str, dict[str, Any]]] = [
        ("load_balance_coefficient", "coefficient", "load_balance_coefficient", {}),
        ("load_balance_coefficient, more passes", "coefficient, more passes", "load_balance_coefficient", {}),
        ("load_balance_coefficient, scale 'variance', activations as they are", *_scale("variance")),
        ("load_balance_coefficient, scale 'd_in', activations as they are", *_scale("d_in")),
        *(
            (f"gate, {E:.0f} experts", "gate", "gate", {"n_experts": E})
            for (E,) in grouped(of(rows, "gate"), "n_experts")
        ),
        *(
            (f"n_experts at fixed width, k {k:.0f}", "fixed width", "n_experts", {"architecture": "switch", "k": k})
            for (k,) in grouped(of(rows, "fixed width"), "k")
        ),
        *(
            (f"n_experts at matched FLOPs, k {k:.0f}", "matched FLOPs", "n_experts", {"k": k})
            for (k,) in grouped(of(rows, "matched FLOPs"), "k")
        ),
    ]
    found = []
    for setting, experiment, name, where in sweeps:
        by_value = {v: values(same, "fvu") for (v,), same in grouped(of(rows, experiment, **where), name).items()}
        if len(by_value) < 2:
            continue
        best = min(by_value, key=lambda v: mean(by_value[v]))
        ties = [v for v in by_value if v != best and verdict(by_value[v], by_value[best], 1) == "seeds overlap"]
        found.append(
            {
                "setting": setting,
                "best": _value(best),
                "not told from it": ", ".join(map(_value, ties)),
                "FVU of each": "; ".join(f"{_value(v)}: {span(e, 4)}" for v, e in by_value.items()),
                "seeds": len(by_value[best]),
            }
        )
    return found


def _scale(name: str) -> tuple[str, str, dict[str, Any]]:
    return "coefficient's scale", "load_balance_coefficient", {"load_balance_scale": name}


def _value(v: Any) -> str:
    return v if isinstance(v, str) else f"{v:g}"


def passes(rows: list[Row]) -> list[Row]:
    """The effect of further passes over the same tokens on each SAE, and on Switch against TopK."""
    found = []
    by_passes = grouped(of(rows, "passes"), "architecture", "n_experts", "d_sae", "passes")
    first = min((n for *_, n in by_passes), default=1)
    for (a, E, F, n), mine in by_passes.items():
        topk = [r for (b, *_, m), same in by_passes.items() if (b, m) == ("sparse_topk", n) for r in same]
        found.append(
            {
                "SAE": label(mine[0]),
                "width": f"{F:.0f}",
                "passes": f"{n:.0f}",
                "FVU": span(values(mine, "fvu"), 4),
                "against the fewest passes": change(values(mine, "fvu"), values(by_passes[a, E, F, first], "fvu")),
                "against TopK, as many passes": change(values(mine, "fvu"), values(topk, "fvu")),
                "seeds": len(mine),
            }
        )
    return found


TABLES: list[tuple[str, str, Callable[[list[Row]], list[Row]]]] = [
    ("claims", "The paper's claims", claims),
    ("defaults", "Settings", defaults),
    ("learning_rates", "Learning rates", learning_rates),
    ("slopes", "Slopes of log FVU", slopes),
    ("crossover", "Switch against TopK at equal FVU or less", crossover),
    ("l0_reached", "L1 coefficients", l0_reached),
    ("passes", "Passes over the same tokens", passes),
]
