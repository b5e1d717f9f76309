"""The figures of the experiments; each takes the rows of the CSVs, and is None where they hold nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from axes import GREY, colour, decorated, errorbars, plain_ticks
from csv_rows import Row, grouped, label, mean, values
from gains import AUTHORS, by_one, line, matched, paired
from plans import SWEEP
from studied import STUDY
from tables import ABLATION, changes, said


def gain(rows: list[Row], _curves: list[Row]) -> Any:
    """Error against tokens, and the change against TopK with the fitted lines."""
    by_tokens = {E: mine for (k, E), mine in matched(rows).items() if k == _first_k(rows)}
    if 1.0 not in by_tokens or len(by_tokens) < 2:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.4))
    for E, mine in by_tokens.items():
        shade = {"color": colour(next(iter(mine.values()))[0])}
        name = label(next(iter(mine.values()))[0])
        errorbars(axes[0], {t: values(same, "fvu") for t, same in mine.items()}, name, **shade)
        if E == 1:
            continue
        changes = {t: paired(same, by_tokens[1.0].get(t, [])) for t, same in mine.items()}
        changes = {t: c for t, c in changes.items() if c}
        errorbars(axes[1], changes, name, linestyle="none" if len(changes) > 1 else "-", **shade)
        if len(changes) > 1:
            intercept, slope = line(list(changes), [1 + mean(c) for c in changes.values()])
            xs = np.geomspace(min(changes), max(changes), 50)
            axes[1].plot(xs, np.exp(intercept + slope * np.log10(xs)) - 1, lw=1, ls=":", **shade)
        if int(E) in AUTHORS:
            axes[1].axhline(AUTHORS[int(E)], lw=0.8, ls="--", **shade)
    axes[1].axhline(0, color="black", lw=0.8)
    decorated(axes[0], xlabel="tokens", ylabel="variance unexplained", xscale="log", yscale="log")
    title = "change of the error (dashed: the authors)"
    decorated(axes[1], xlabel="tokens", ylabel=title, xscale="log")
    axes[1].yaxis.set_major_formatter(lambda v, _: f"{v:+.0%}")
    axes[0].yaxis.set_minor_formatter("{x:.2f}")
    ticks = sorted(by_tokens[1.0])
    for axis in axes:
        axis.set_xticks(ticks, [f"{t / 1e6:g}M" for t in ticks])
        axis.xaxis.set_minor_formatter("")
        axis.legend(fontsize=8, frameon=False)
    return figure


def training(rows: list[Row], curves: list[Row]) -> Any:
    """Error while training, against steps, FLOPs and seconds; TopK's error at the end."""
    k = _first_k(rows)
    mine = [r for r in curves if r["experiment"] == "matched FLOPs" and r["k"] == k and not r["falling"]]
    ends = {E: same for (k_, E), same in matched(rows).items() if k_ == k}
    if not mine:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    for axis, x in zip(axes, ("step", "flops", "seconds"), strict=True):
        for (E,), same in grouped(mine, "n_experts").items():
            end = ends[E][max(ends[E])]
            per_step = {
                "step": 1.0,
                "flops": 3 * mean(values(end, "flops_per_activation")) * end[0]["batch"],
                "seconds": mean(values(end, "step_ms")) / 1e3,
            }[x]
            at = by_one(same, "step")
            xs = [step * per_step for step in at]
            errors = [values(r, "fvu") for r in at.values()]
            axis.plot(xs, list(map(mean, errors)), lw=1.3, label=label(same[0]), color=colour(same[0]))
            axis.fill_between(
                xs, list(map(min, errors)), list(map(max, errors)), alpha=0.2, color=colour(same[0]), lw=0
            )
            errorbars(
                axis,
                {end[0]["steps"] * per_step: values(end, "fvu")},
                "",
                **{"color": colour(same[0]), "marker": "s", "linestyle": "none"},
            )
        if 1.0 in ends:
            axis.axhline(mean(values(ends[1.0][max(ends[1.0])], "fvu")), color="black", lw=0.8, ls="--")
        named = {"step": "training steps", "flops": "FLOPs of training, as the paper counts"}.get(x, "seconds")
        decorated(axis, xlabel=named, ylabel="variance unexplained", yscale="log", xscale="log")
        axis.xaxis.set_minor_formatter("")
        axis.yaxis.set_minor_formatter("{x:.2f}")
        axis.yaxis.set_major_formatter("{x:.2f}")
        axis.tick_params(axis="y", which="both", labelsize=7)
    axes[0].legend(fontsize=8, frameon=False, title="line: constant rate; square: after its fall", title_fontsize=7)
    return figure


def experts(rows: list[Row], _curves: list[Row]) -> Any:
    """Error, CE loss and dead latents against the number of experts, at matched FLOPs and at fixed width."""
    k = _first_k(rows)
    topk = matched(rows).get((k, 1.0), {})
    if not topk:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    drawn: set[float] = set()
    for i, experiment in enumerate(("matched FLOPs", "fixed width")):
        mine = [r for r in rows if r["experiment"] == experiment and r["k"] == k]
        last = max(values(mine, "tokens"), default=math.nan)
        mine = [r for r in mine if r["tokens"] == last and r["n_experts"] > 1] + topk.get(last, [])
        by_experts = by_one(mine, "n_experts")
        if len(by_experts) < 2:
            continue
        drawn |= by_experts.keys()
        name = f"{experiment}, {last / 1e6:g}M tokens"
        style = {"color": f"C{i}"}
        errorbars(axes[0], {E: values(same, "fvu") for E, same in by_experts.items()}, name, **style)
        ce = {E: values(same, "ce_recovered") for E, same in by_experts.items()}
        errorbars(axes[1], {E: c for E, c in ce.items() if not math.isnan(c[0])}, name, **style)
        dead = {E: [r["dead_latents"] / r["d_sae"] for r in same] for E, same in by_experts.items()}
        errorbars(axes[2], dead, name, **style)
    if not drawn:
        plt.close(figure)
        return None
    for axis, y in zip(axes, ("variance unexplained", "CE loss recovered", "share of dead latents"), strict=True):
        decorated(axis, xlabel="experts (1: TopK)", ylabel=y)
        plain_ticks(axis, drawn)
        axis.legend(fontsize=8, frameon=False)
    return figure


def learning_rates(rows: list[Row], _curves: list[Row]) -> Any:
    swept = [r for r in rows if r["experiment"] == SWEEP]
    if len({r["lr"] for r in swept}) < 2:
        return None
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    for (a, F, _), mine in grouped(swept, "architecture", "d_sae", "n_experts").items():
        judged = "final_loss" if a in GREY else "fvu"
        best = min(values(mine, judged))
        points = {r["lr"]: [r[judged] / best] for r in mine}
        errorbars(axis, points, f"{label(mine[0])}, F {F:.0f}", color=colour(mine[0]))
    decorated(axis, xlabel="learning rate", ylabel="error (L1: loss) over the best")
    plain_ticks(axis, set(values(swept, "lr")))
    axis.legend(fontsize=7, frameon=False)
    return figure


def settings(rows: list[Row], _curves: list[Row]) -> Any:
    """One setting changed at a time: the change of the error by seed, dead latents and CE loss; grey: unchanged."""
    found = [row for prefix in (STUDY, ABLATION) for row in changes(rows, prefix) if row[1]]
    if not found:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(13, 1.5 + 0.26 * len(found)), sharey=True)
    for y, (_, _, same, plain) in enumerate(found):
        shade = "C0" if same[0]["layer"] == found[0][2][0]["layer"] else "C1"
        _across(axes[0], y, paired(same, plain), shade)
        for mine, of_one in ((plain, "#aaaaaa"), (same, shade)):
            _across(axes[1], y, [r["dead_latents"] / r["d_sae"] for r in mine], of_one)
            _across(axes[2], y, values(mine, "ce_recovered"), of_one)
    names = [f"{experiment.partition(': ')[2]}: {said(changed)}" for experiment, changed, _, _ in found]
    axes[0].set_yticks(range(len(found)), names, fontsize=7)
    axes[0].invert_yaxis()
    axes[0].axvline(0, color="black", lw=0.8)
    axes[0].xaxis.set_major_formatter(lambda v, _: f"{v:+.0%}")
    for axis, x in zip(axes, ("change of the error", "share of dead latents", "CE loss recovered"), strict=True):
        decorated(axis, xlabel=x)
    return figure


def _across(axis: Any, y: float, xs: list[float], shade: str) -> None:
    """A mean and a range along x."""
    if xs:
        middle = mean(xs)
        reach = [[middle - min(xs)], [max(xs) - middle]]
        axis.errorbar([middle], [y], xerr=reach, color=shade, marker="o", markersize=3.5, linewidth=1.2, capsize=2.5)


def _first_k(rows: list[Row]) -> float:
    return next((r["k"] for r in rows if r["experiment"] == "matched FLOPs"), math.nan)


FIGURES: list[tuple[str, str, Callable[[list[Row], list[Row]], Any]]] = [
    ("gain", "Matched FLOPs: each expert as wide as the TopK SAE", gain),
    ("training", "Error while training, at matched FLOPs", training),
    ("experts", "The number of experts", experts),
    ("learning_rates", "Learning rates", learning_rates),
    ("settings", "One setting changed at a time (blue: the early layer; orange: the middle one)", settings),
]
