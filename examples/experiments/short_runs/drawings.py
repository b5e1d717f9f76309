"""The figures of the experiments; each takes the rows of the CSVs, and is None where they hold nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from axes import GREY, colour, decorated, errorbars, plain_ticks
from csv_rows import Row, grouped, label, mean, middle_k, of, values

from short_runs.scaling import families, fit


def frontier(rows: list[Row]) -> Any:
    """MSE, explained variance and CE recovered against L0, one line per architecture."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    for axis, y, title in zip(
        axes,
        ("mse", "explained", "ce_recovered"),
        ("MSE (model's units)", "explained variance", "CE loss recovered"),
        strict=True,
    ):
        for _, mine in grouped(rows, "architecture", "n_experts").items():
            points = {
                mean(values(same, "l0")): [1 - r["fvu"] if y == "explained" else r[y] for r in same]
                for same in grouped(mine, "k").values()
            }
            errorbars(axis, points, label(mine[0]), color=colour(mine[0]))
        decorated(axis, xlabel="L0 (active latents per token)", ylabel=title)
        plain_ticks(axis, {r["k"] for r in rows})
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def fixed_width(rows: list[Row], _curves: list[Row]) -> Any:
    fixed = of(rows, "fixed width")
    everywhere = {r["n_experts"] for r in fixed if r["k"] == max(values(fixed, "k"))}
    # SAELens's topk is numerically identical to sparse_topk, and has one k.
    return frontier([r for r in fixed if r["n_experts"] in everywhere and r["architecture"] != "topk"])


def matched_flops(rows: list[Row], _curves: list[Row]) -> Any:
    matched = of(rows, "matched FLOPs")
    return frontier(of(rows, "fixed width", architecture="sparse_topk") + matched) if matched else None


def training_curves(_rows: list[Row], curves: list[Row]) -> Any:
    """Error against steps, FLOPs and seconds, in both settings."""
    settings = {name: of(curves, name) for name in ("fixed width", "matched FLOPs") if of(curves, name)}
    if not settings:
        return None
    plain = [r for r in settings["fixed width"] if r["architecture"] == "sparse_topk"]
    if "matched FLOPs" in settings:
        settings["matched FLOPs"] = plain + settings["matched FLOPs"]
    figure, axes = plt.subplots(len(settings), 3, figsize=(11, 3.4 * len(settings)), squeeze=False)
    for row_of_axes, (setting, mine) in zip(axes, settings.items(), strict=True):
        mine = [r for r in mine if r["k"] == middle_k(mine) and r["architecture"] != "topk"]
        for axis, x in zip(row_of_axes, ("step", "flops", "seconds"), strict=True):
            for (_, _, F), same in grouped(mine, "architecture", "n_experts", "d_sae").items():
                points = grouped(same, "step").values()
                xs = [mean(values(at, x)) for at in points]
                errors = [values(at, "fvu") for at in points]
                name = label(same[0]) + (f", F {F:.0f}" if setting != "fixed width" else "")
                dashes = "--" if math.log2(same[0]["n_experts"]) % 2 else "-"  # neighbours differ in more than colour
                axis.plot(xs, list(map(mean, errors)), label=name, lw=1.3, ls=dashes, color=colour(same[0]))
                axis.fill_between(
                    xs, list(map(min, errors)), list(map(max, errors)), alpha=0.2, color=colour(same[0]), lw=0
                )
            named = {"step": "training steps", "flops": "FLOPs of training, as the paper counts"}.get(x, "seconds")
            scale = "linear" if x == "step" else "log"
            decorated(axis, xlabel=named, ylabel="variance unexplained", yscale="log", xscale=scale)
            axis.set_yticks([0.2, 0.3, 0.4, 0.6], ["0.2", "0.3", "0.4", "0.6"])
            axis.minorticks_off()
        row_of_axes[1].legend(fontsize=7, frameon=False, title=setting, title_fontsize=8, loc="lower left")
    return figure


def experts(rows: list[Row], _curves: list[Row]) -> Any:
    """Error, dead latents and expert load against the number of experts."""
    switch = of(rows, "fixed width", architecture="switch")
    if len({r["n_experts"] for r in switch}) < 2:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    for i, ((k,), mine) in enumerate(grouped(switch, "k").items()):
        by_E = {E: same for (E,), same in grouped(mine, "n_experts").items()}
        name, shade = f"k {k:.0f}", f"C{i}"
        topk = of(rows, "fixed width", architecture="sparse_topk", k=k)
        errorbars(axes[0], {E: values(same, "fvu") for E, same in by_E.items()}, name, color=shade)
        errorbars(
            axes[1], {E: [r["dead_latents"] / r["d_sae"] for r in same] for E, same in by_E.items()}, name, color=shade
        )
        if topk:
            at = {"color": shade, "ls": "--", "lw": 0.9, "label": f"TopK, k {k:.0f}"}
            axes[0].axhline(mean(values(topk, "fvu")), **at)
            axes[1].axhline(mean([r["dead_latents"] / r["d_sae"] for r in topk]), **at)
        errorbars(axes[2], {E: values(same, "load_max") for E, same in by_E.items()}, f"{name}, busiest", color=shade)
        errorbars(
            axes[2],
            {E: values(same, "load_min") for E, same in by_E.items()},
            f"{name}, idlest",
            **{"color": shade, "marker": "v", "linestyle": ":"},
        )
    for axis, y in zip(axes, ("variance unexplained", "share of dead latents", "load (1: an even share)"), strict=True):
        decorated(axis, xlabel="experts", ylabel=y)
        plain_ticks(axis, {r["n_experts"] for r in switch})
        axis.legend(fontsize=7, frameon=False)
    return figure


def sweeps(rows: list[Row], _curves: list[Row]) -> Any:
    """The load-balance coefficient and its scale, the gate, the learning rate."""
    coefficient, gate = of(rows, "coefficient"), of(rows, "gate")
    scale, rate = of(rows, "coefficient's scale"), of(rows, "learning rate")
    if not coefficient or not gate or not scale or not rate:
        return None
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.4))
    least = min(c for c in values(coefficient, "load_balance_coefficient") if c > 0) / 10
    longer = of(rows, "coefficient, more passes")
    for axis, y, title in (
        (axes[0, 0], "fvu", "variance unexplained"),
        (axes[0, 1], "load_max", "load of the busiest expert"),
    ):
        for (n,), mine in grouped(coefficient + longer, "passes").items():
            by_c = grouped(mine, "load_balance_coefficient").items()
            name = f"{n:.0f} passes" if n > 1 else "one pass"
            errorbars(axis, {max(c, least): values(same, y) for (c,), same in by_c}, name)
        decorated(axis, xlabel=f"load-balance coefficient (0 drawn at {least:g})", ylabel=title, xscale="log")
    for (name,), mine in grouped(scale, "load_balance_scale").items():
        points = {c: values(same, "fvu") for (c,), same in grouped(mine, "load_balance_coefficient").items()}
        errorbars(axes[0, 2], points, f"scale: {name}")
    title = "coefficient, activations in the model's units"
    decorated(axes[0, 2], xlabel=title, ylabel="variance unexplained", xscale="log")
    for (name,), mine in grouped(gate, "gate").items():
        points = {E: values(same, "fvu") for (E,), same in grouped(mine, "n_experts").items()}
        errorbars(axes[1, 0], points, {"one": "gate: 1", "probability": "gate: the router's probability"}[name])
    decorated(axes[1, 0], xlabel="experts", ylabel="variance unexplained")
    plain_ticks(axes[1, 0], set(values(gate, "n_experts")))
    narrow = min(values(rate, "d_sae"))
    for (a, width, _), mine in grouped(rate, "architecture", "d_sae", "n_experts").items():
        judged = "final_loss" if a in GREY else "fvu"
        best = min(values(mine, judged))
        style = {"color": colour(mine[0]), "linestyle": "-" if width == narrow else "--"}
        points = {r["lr"]: [r[judged] / best] for r in mine}
        errorbars(axes[1, 1], points, f"{label(mine[0])}, F {width:.0f}", **style)
    decorated(axes[1, 1], xlabel="learning rate", ylabel="error (L1: loss) over the best")
    plain_ticks(axes[1, 1], set(values(rate, "lr")))
    for (_, _, width), mine in grouped(of(rows, "passes"), "architecture", "n_experts", "d_sae").items():
        points = {n: values(same, "fvu") for (n,), same in grouped(mine, "passes").items()}
        errorbars(axes[1, 2], points, f"{label(mine[0])}, F {width:.0f}", color=colour(mine[0]))
    decorated(axes[1, 2], xlabel="passes over the same tokens", ylabel="variance unexplained")
    plain_ticks(axes[1, 2], set(values(of(rows, "passes"), "passes")))
    for axis in axes.flat:
        axis.legend(fontsize=7, frameon=False)
    return figure


def scaling(rows: list[Row], _curves: list[Row]) -> Any:
    """Error against width, FLOPs and seconds, with least-squares lines."""
    found = families(rows)
    if not found or max(len(grouped(mine, "d_sae")) for mine in found.values()) < 2:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(13, 5))
    shades = {"TopK": "#d1495b", "Switch, 8 experts": "#7ad151", "Switch, 64 experts": "#414487"}
    named = {"d_sae": "latents", "flops_per_activation": "FLOPs per activation, as the paper counts"}
    for axis, x in zip(axes, ("d_sae", "flops_per_activation", "seconds"), strict=True):
        for name, mine in found.items():
            shade = shades.get(name, "#2a9d8f")
            points = {mean(values(same, x)): values(same, "fvu") for same in grouped(mine, "d_sae").values()}
            xs = sorted(v for v in points if not math.isnan(v))
            if len(xs) < 2:
                continue
            fitted = ""
            if x != "d_sae":
                slope, error, intercept = fit(xs, [mean(points[v]) for v in xs])
                axis.plot(xs, [math.exp(intercept) * v**slope for v in xs], ls=":", lw=1, color=shade)
                fitted = f": {slope:.3f} ± {error:.3f}"
            errorbars(axis, points, name + fitted, color=shade, linestyle="-" if x == "d_sae" else "none")
        label_x = named.get(x, "seconds of training")
        decorated(axis, xlabel=label_x, ylabel="variance unexplained", xscale="log", yscale="log")
        axis.xaxis.set_minor_formatter("")
        axis.yaxis.set_major_formatter("{x:.2f}")
        axis.yaxis.set_minor_formatter("{x:.2f}")
        axis.tick_params(axis="y", which="both", labelsize=7)
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
        axis.legend(fontsize=7, frameon=False, title=None if x == "d_sae" else "slopes", title_fontsize=7, **below)
    plain_ticks(axes[0], {r["d_sae"] for mine in found.values() for r in mine})
    axes[0].tick_params(axis="x", labelsize=7)
    return figure


FIGURES: list[tuple[str, str, Callable[[list[Row], list[Row]], Any]]] = [
    ("fixed_width", "Fixed width", fixed_width),
    ("matched_flops", "Matched FLOPs per activation: experts as wide as the TopK SAE", matched_flops),
    ("training", "Error while training", training_curves),
    ("experts", "The number of experts at fixed width", experts),
    ("sweeps", "Settings", sweeps),
    ("scaling", "Widths", scaling),
]
