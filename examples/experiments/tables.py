"""The tables made from the experiments' CSVs. Ranges are over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cells import L1_ARCHITECTURES, Cell
from claims import claims
from csv_rows import Row, change, grouped, label, signed, span, values, verdict
from gains import against_tokens, at_equal_seconds, efficiency, fits
from plans import L1_SWEEP, SWEEP
from studied import EXPERTS, SPLIT_EXPERTS, STUDY

ABLATION = "ablation: "

# What an ablation changes, and the experiments that compare.
_CHANGED = (
    *("load_balance_coefficient", "load_balance_warm_up", "router_lr", "router_start_std", "lr_warm_up"),
    *("aux_loss_coefficient", "start", "batch", "lr"),
    *("n_experts", "n_active_experts", "n_shared_experts", "gate", "load_balancing"),
    *("router_z_loss_coefficient", "expert_overlap_coefficient"),
)


def everything(rows: list[Row], _curves: list[Row]) -> list[Row]:
    """Every SAE that is compared, over its seeds, at each number of tokens."""
    compared = [r for r in rows if not r["experiment"].startswith((ABLATION, STUDY, SWEEP, L1_SWEEP))]
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
    return [
        {
            "setting": experiment.removeprefix(ABLATION),
            "value": said(changed),
            "FVU": span(values(same, "fvu"), 4),
            **_error(same, plain),
            "dead": span([r["dead_latents"] / r["d_sae"] for r in same], 3),
            "tokens": f"{same[0]['tokens']:.0f}",
            "seeds": f"{len(same)} and {len(plain)}",
        }
        for experiment, changed, same, plain in changes(rows, ABLATION)
        if changed
    ]


def study(rows: list[Row], curves: list[Row]) -> list[Row]:
    """What is beyond one active expert, against one expert per token with the same seeds, which comes first."""
    courses = {(experiment, said(changed)): (a, b) for experiment, changed, a, b in changes(curves, STUDY)}

    def timed(experiment: str, changed: Row, same: list[Row], plain: list[Row]) -> str:
        of_seeds = at_equal_seconds(same, plain, *courses.get((experiment, said(changed)), ([], [])))
        return signed(of_seeds) if changed and of_seeds else ""

    return [
        {
            "experiment": experiment.removeprefix(STUDY),
            "changed": said(changed) or "nothing",
            "FVU": span(values(same, "fvu"), 4),
            **(_error(same, plain) if changed else {"change of the error": "", "smaller error": ""}),
            "at equal seconds": timed(experiment, changed, same, plain),
            "CE recovered": span(values(same, "ce_recovered"), 4),
            "dead": span([r["dead_latents"] / r["d_sae"] for r in same], 3),
            "duplicates": span(values(same, "duplicates"), 4),
            "busiest expert": span(values(same, "load_max"), 2),
            "FLOPs": f"{same[0]['flops_per_activation']:.3g}",
            "ms per step": span(values(same, "step_ms"), 1),
            "tokens": f"{same[0]['tokens']:.0f}",
            "seeds": f"{len(same)} and {len(plain)}",
        }
        for experiment, changed, same, plain in changes(rows, STUDY)
    ]


def changes(rows: list[Row], prefix: str) -> Iterator[tuple[str, Row, list[Row], list[Row]]]:
    """By experiment: what is changed of its baseline, those rows, and the baseline's; that itself first.

    Args:
        rows: All.
        prefix: Of the experiments, ``STUDY`` or ``ABLATION``.
    """
    for (experiment,), mine in grouped([r for r in rows if r["experiment"].startswith(prefix)], "experiment").items():
        by_value = grouped([{n: getattr(Cell, n) for n in _CHANGED} | r for r in mine], *_CHANGED)
        n_experts = SPLIT_EXPERTS if experiment.endswith("split") else EXPERTS
        usual = {"lr": _swept_lr(rows, mine[0])} | ({"n_experts": n_experts} if prefix == STUDY else {})
        changed = {key: _differences(key, usual) for key in by_value}
        plain = next((same for key, same in by_value.items() if not changed[key]), None)
        for key in sorted(by_value, key=lambda key: bool(changed[key])) if plain else ():
            yield experiment, changed[key], by_value[key], plain or []


def _swept_lr(rows: list[Row], one: Row) -> float:
    """The best learning rate of this SAE's sweep."""
    shape = "architecture", "n_experts", "d_sae"
    swept = [r for r in rows if r["experiment"] == SWEEP and all(r[n] == one[n] for n in shape)]
    return min(swept, key=lambda r: r["fvu"])["lr"] if swept else one["lr"]


def _differences(key: tuple[Any, ...], usual: Row) -> Row:
    """From a cell's defaults, but for what is usual here; without any, the number of experts is not a change."""
    defaults = {n: getattr(Cell, n) for n in _CHANGED} | usual
    found = {n: v for n, v in zip(_CHANGED, key, strict=True) if v != defaults[n]}
    return {n: v for n, v in found.items() if n != "n_experts" or n in usual}


def said(changed: Row) -> str:
    """The changed settings in words."""
    return ", ".join(f"{n} {v if isinstance(v, str) else f'{v:g}'}" for n, v in changed.items())


def _error(a: Sequence[Row], b: Sequence[Row]) -> Row:
    x, y = values(a, "mse"), values(b, "mse")
    return {"change of the error": change(x, y), "smaller error": verdict(x, y, -1)}


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
    ("study", "Beyond one active expert: one setting changed at a time", study),
]
