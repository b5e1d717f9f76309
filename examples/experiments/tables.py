"""The tables made from the experiments' CSVs. Ranges are over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cells import L1_ARCHITECTURES, Cell
from claims import claims
from csv_rows import Row, change, grouped, label, span, values, verdict
from gains import against_tokens, efficiency, fits
from plans import L1_SWEEP, SWEEP

# What an ablation changes, and the experiments that compare.
_CHANGED = (
    *("load_balance_coefficient", "load_balance_warm_up", "router_lr", "router_start_std", "lr_warm_up"),
    *("aux_loss_coefficient", "start", "batch"),
)


def everything(rows: list[Row], _curves: list[Row]) -> list[Row]:
    """Every SAE that is compared, over its seeds, at each number of tokens."""
    compared = [r for r in rows if not r["experiment"].startswith(("ablation", SWEEP, L1_SWEEP))]
    shape = ("experiment", "layer", "k", "architecture", "n_experts", "d_sae", "tokens")
    return [
        {
            "experiment": experiment,
            "layer": f"{layer:.0f}",
            "SAE": label(mine[0]),
            "width": f"{F:.0f}",
            "k": f"{k:.0f}",
            "L0": span(values(mine, "l0"), 1),
            "tokens": f"{tokens:.0f}",
            "FVU": span(values(mine, "fvu"), 4),
            "FVU, other text": span(values(mine, "fvu_other"), 4),
            "CE recovered": "" if math.isnan(mine[0]["ce_recovered"]) else span(values(mine, "ce_recovered"), 4),
            "dead": span([r["dead_latents"] / F for r in mine], 3),
            "busiest expert": span(values(mine, "load_max"), 2),
            "ms per step": span(values(mine, "step_ms"), 1),
            "seeds": len(mine),
        }
        for (experiment, layer, k, _, _, F, tokens), mine in grouped(compared, *shape).items()
    ]


def learning_rates(rows: list[Row], _curves: list[Row]) -> list[Row]:
    """Per shape: the learning rates tried, and the one that the sweep chose."""
    found = []
    swept = [r for r in rows if r["experiment"] == SWEEP]
    for (a, F, E), mine in grouped(swept, "architecture", "d_sae", "n_experts").items():
        judged = "final_loss" if a in L1_ARCHITECTURES else "fvu"
        at = {r["lr"]: r[judged] for r in sorted(mine, key=lambda r: r["lr"])}
        best = min(at, key=at.__getitem__)
        found.append(
            {
                "SAE": label(mine[0]),
                "width": f"{F:.0f}",
                "tokens": f"{mine[0]['tokens']:.0f}",
                "tried": ", ".join(f"{lr:g}" for lr in at),
                "FVU (L1: loss) at each": ", ".join(f"{e:.4g}" for e in at.values()),
                "best": f"{best:g}",
                "at the edge": "yes" if len(at) > 1 and best in (min(at), max(at)) else "no",
                "experts": f"{E:.0f}",
            }
        )
    return found


def ablations(rows: list[Row], _curves: list[Row]) -> list[Row]:
    """One setting changed at a time, against the defaults with the same seeds."""
    found = []
    for (experiment,), mine in grouped(
        [r for r in rows if r["experiment"].startswith("ablation")], "experiment"
    ).items():
        by_value = grouped(mine, *_CHANGED)
        plain = tuple(getattr(Cell, n) for n in _CHANGED)
        for key, same in by_value.items() if plain in by_value else ():
            if key == plain:
                continue
            a, b = values(same, "mse"), values(by_value[plain], "mse")
            changed = {n: v for n, v, default in zip(_CHANGED, key, plain, strict=True) if v != default}
            found.append(
                {
                    "setting": experiment.removeprefix("ablation: "),
                    "value": ", ".join(f"{n} {v if isinstance(v, str) else f'{v:g}'}" for n, v in changed.items()),
                    "change of the error": change(a, b),
                    "smaller error": verdict(a, b, -1),
                    "dead": span([r["dead_latents"] / r["d_sae"] for r in same], 3),
                    "tokens": f"{same[0]['tokens']:.0f}",
                    "seeds": f"{len(a)} and {len(b)}",
                }
            )
    return found


def texts(facts: dict[str, Any]) -> list[Row]:
    """Documents and contexts of every kind of text, from run.json."""
    return [
        {"kind": kind} | {n: str(number) for n, number in of_kind.items()} for kind, of_kind in facts["texts"].items()
    ]


TABLES: list[tuple[str, str, Callable[[list[Row], list[Row]], list[Row]]]] = [
    ("claims", "The authors' claims", claims),
    ("tokens", "The gain at matched FLOPs against the number of tokens", against_tokens),
    ("fits", "Fits of the gain against the logarithm of the tokens: mean and standard error over seeds", fits),
    ("efficiency", "When Switch has TopK's final error", efficiency),
    ("everything", "Every SAE, over its seeds", everything),
    ("learning_rates", "Learning rates", learning_rates),
    ("ablations", "One setting changed at a time", ablations),
]
