"""Draws the experiments from their CSVs: PNGs, and one HTML page with the pictures, the tables and the orderings.

    python examples/experiments/figures.py                      # of runs/experiments
    python examples/experiments/figures.py --input FOLDER       # of any folder with results.csv and curves.csv

Points are means over seeds, bars the range from the least to the largest seed; one seed has no bar.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
_NUMBERS_AS_TEXT = {"experiment", "architecture", "gate"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--input", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--output", type=Path, help="none: the input folder")
    args = parser.parse_args(argv)
    rows, curves = read(args.input / "results.csv"), read(args.input / "curves.csv")
    output = args.output or args.input
    output.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, title, draw in FIGURES:
        figure = draw(rows, curves)
        if figure is not None:
            figure.suptitle(title, fontsize=11)
            figure.tight_layout()
            figure.savefig(output / f"{name}.png", dpi=110)
            plt.close(figure)
            drawn.append((name, title))
    (output / "index.html").write_text(page(output, drawn, rows))
    print(f"{len(drawn)} pictures and index.html in {output}")


def read(file: Path) -> list[Row]:
    with open(file, newline="") as handle:
        return [{n: v if n in _NUMBERS_AS_TEXT else float(v) for n, v in row.items()} for row in csv.DictReader(handle)]


def label(row: Row) -> str:
    return f"switch, {row['n_experts']:.0f}" if row["architecture"] == "switch" else row["architecture"]


def of(rows: Iterable[Row], *experiments: str) -> list[Row]:
    """Rows of these experiments, each setting once."""
    seen: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["experiment"] in experiments:
            seen[tuple((n, v) for n, v in row.items() if n != "experiment")] = row
    return list(seen.values())


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[n] for n in names)].append(row)
    return dict(sorted(groups.items()))


def line(axis: Any, points: dict[float, list[float]], name: str, marker: str = "o") -> None:
    xs = sorted(points)
    means = [statistics.mean(points[x]) for x in xs]
    low = [m - min(points[x]) for x, m in zip(xs, means, strict=True)]
    high = [max(points[x]) - m for x, m in zip(xs, means, strict=True)]
    axis.errorbar(xs, means, yerr=[low, high], label=name, marker=marker, markersize=3.5, linewidth=1, capsize=2)


def frontier(rows: list[Row]) -> Any:
    """L0 against error and against loss recovered, a line an architecture."""
    if not rows:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, y, title in zip(axes, ("fvu", "ce_recovered"), ("variance unexplained", "CE recovered"), strict=True):
        for _, mine in grouped(rows, "architecture", "n_experts").items():
            points: dict[float, list[float]] = defaultdict(list)
            for same in grouped(mine, "k").values():
                points[statistics.mean(r["l0"] for r in same)] = [r[y] for r in same]
            line(axis, points, label(mine[0]))
        axis.set(xlabel="L0", ylabel=title, xscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return figure


def fixed_width(rows: list[Row], _curves: list[Row]) -> Any:
    return frontier(of(rows, "fixed width"))


def matched_flops(rows: list[Row], _curves: list[Row]) -> Any:
    matched = of(rows, "matched FLOPs")
    plain = [r for r in of(rows, "fixed width") if r["architecture"] == "sparse_topk"]
    return frontier(plain + matched) if matched else None


def middle_k(rows: Iterable[Row]) -> float:
    ks = sorted({r["k"] for r in rows})
    return ks[len(ks) // 2]


def training_curves(_rows: list[Row], curves: list[Row]) -> Any:
    """Error against steps, FLOPs and seconds."""
    chosen = [r for r in curves if r["experiment"] in ("fixed width", "matched FLOPs")]
    if not chosen:
        return None
    chosen = [r for r in chosen if r["k"] == middle_k(chosen) and r["seed"] == 0]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for axis, x in zip(axes, ("step", "flops", "seconds"), strict=True):
        for (_, _, width), mine in grouped(chosen, "architecture", "n_experts", "d_sae").items():
            mine = sorted({r["step"]: r for r in mine}.values(), key=lambda r: r["step"])
            axis.plot([r[x] for r in mine], [r["fvu"] for r in mine], label=f"{label(mine[0])}, F {width:.0f}", lw=1)
        axis.set(xlabel=x, ylabel="variance unexplained", yscale="log", xscale="linear" if x == "step" else "log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=6)
    return figure


def experts(rows: list[Row], _curves: list[Row]) -> Any:
    """Dead latents and expert load against the number of experts."""
    switch = [r for r in of(rows, "fixed width") if r["architecture"] == "switch"]
    if len({r["n_experts"] for r in switch}) < 2:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for (k,), mine in grouped(switch, "k").items():
        by_E = grouped(mine, "n_experts")
        line(axes[0], {E: [r["dead_latents"] / r["d_sae"] for r in same] for (E,), same in by_E.items()}, f"k {k:.0f}")
        line(axes[1], {E: [r["load_max"] for r in same] for (E,), same in by_E.items()}, f"k {k:.0f}, busiest")
        line(axes[1], {E: [r["load_min"] for r in same] for (E,), same in by_E.items()}, f"k {k:.0f}, idlest", "v")
    axes[0].set(xlabel="experts", ylabel="share of dead latents", xscale="log")
    axes[1].set(xlabel="experts", ylabel="load, times an even share", xscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def sweeps(rows: list[Row], _curves: list[Row]) -> Any:
    """The coefficient of the load balance, and the gate."""
    coefficient, gate = of(rows, "coefficient"), of(rows, "gate")
    if not coefficient or not gate:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    by_c = {max(c, 0.01): same for (c,), same in grouped(coefficient, "load_balance_coefficient").items()}
    line(axes[0], {c: [r["fvu"] for r in same] for c, same in by_c.items()}, "")
    line(axes[1], {c: [r["load_max"] for r in same] for c, same in by_c.items()}, "")
    axes[0].set(xlabel="coefficient (0 drawn at 0.01)", ylabel="variance unexplained", xscale="log")
    axes[1].set(xlabel="coefficient (0 drawn at 0.01)", ylabel="busiest expert's load", xscale="log")
    for (name,), mine in grouped(gate, "gate").items():
        line(axes[2], {E: [r["fvu"] for r in same] for (E,), same in grouped(mine, "n_experts").items()}, name)
    axes[2].set(xlabel="experts", ylabel="variance unexplained", xscale="log")
    axes[2].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure


def scaling(rows: list[Row], _curves: list[Row]) -> Any:
    """Error against FLOPs and against seconds over widths."""
    chosen = of(rows, "scaling")
    if len(chosen) < 2:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    families = {
        "sparse_topk": [r for r in chosen if r["architecture"] == "sparse_topk"],
        "switch, 8": [r for r in chosen if r["n_experts"] == 8],
        "switch, 64": [r for r in chosen if r["n_experts"] == 64],
        "switch, F / 512": [r for r in chosen if r["n_experts"] > 1 and r["n_experts"] == max(2, r["d_sae"] // 512)],
    }
    for axis, x in zip(axes, ("flops_per_activation", "seconds"), strict=True):
        for name, mine in families.items():
            mine = sorted(mine, key=lambda r: r["d_sae"])
            if len(mine) > 1:
                axis.plot([r[x] for r in mine], [r["fvu"] for r in mine], marker="o", ms=3.5, lw=1, label=name)
        axis.set(xlabel=x.replace("_", " "), ylabel="variance unexplained", xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=7)
    return figure


FIGURES: list[tuple[str, str, Callable[[list[Row], list[Row]], Any]]] = [
    ("fixed_width", "Fixed width", fixed_width),
    ("matched_flops", "Matched FLOPs per activation (experts as wide as the TopK SAE)", matched_flops),
    ("training", "Error against steps, FLOPs and seconds", training_curves),
    ("experts", "Dead latents and load against the number of experts, fixed width", experts),
    ("sweeps", "The load-balance coefficient and the gate", sweeps),
    ("scaling", "Widths from 2^11 to 2^16", scaling),
]


# Tables


def claims(rows: list[Row]) -> list[tuple[str, str, str]]:
    """(what the paper found, here, whether it holds), at the middle k. An overlap of seeds is no ordering."""
    fixed, matched = of(rows, "fixed width"), of(rows, "matched FLOPs")
    if not fixed:
        return []
    k = middle_k(fixed)
    topk = [r["fvu"] for r in fixed if r["architecture"] == "sparse_topk" and r["k"] == k]
    found = []
    for (E,), same in grouped([r for r in fixed if r["architecture"] == "switch" and r["k"] == k], "n_experts").items():
        found.append((f"fixed width, {E:.0f} experts: worse than TopK", *compared([r["fvu"] for r in same], topk, 1)))
    for (E,), same in grouped([r for r in matched if r["k"] == k], "n_experts").items():
        found.append(
            (f"matched FLOPs, {E:.0f} experts: better than TopK", *compared([r["fvu"] for r in same], topk, -1))
        )
    for name in ("standard", "gated"):
        theirs = [r["fvu"] for r in fixed if r["architecture"] == name and r["k"] == k]
        if theirs:
            found.append((f"{name}: worse than TopK at equal L0", *compared(theirs, topk, 1)))
    return found


def compared(a: list[float], b: list[float], sign: int) -> tuple[str, str]:
    change = statistics.mean(a) / statistics.mean(b) - 1
    overlap = min(a) <= max(b) and min(b) <= max(a)
    holds = "seeds overlap" if overlap else "holds" if change * sign > 0 else "does not hold"
    return f"{change:+.1%} error ({len(a)} against {len(b)} seeds)", holds


def page(folder: Path, drawn: list[tuple[str, str]], rows: list[Row]) -> str:
    pictures = "".join(
        f"<h2>{html.escape(title)}</h2><img alt='{name}' src='data:image/png;base64,"
        f"{base64.b64encode((folder / f'{name}.png').read_bytes()).decode()}'>"
        for name, title in drawn
    )
    orderings = table(["the paper", "here", ""], claims(rows))
    names = [n for n in (rows[0] if rows else {}) if n != "experiment"]
    everything = table(
        ["experiment", *names],
        [[r["experiment"], *(r[n] if isinstance(r[n], str) else f"{r[n]:.5g}" for n in names)] for r in rows],
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<title>Switch SAE experiments</title><style>body{font:15px sans-serif;max-width:1100px;margin:auto;"
        "padding:0 1em}img{max-width:100%}div{overflow-x:auto}table{border-collapse:collapse;font-size:12px}"
        "td,th{border:1px solid #ccc;padding:2px 6px;text-align:right}</style>"
        f"<h1>Switch SAE experiments</h1>{pictures}<h2>Orderings</h2>{orderings}"
        f"<h2>Every cell</h2>{everything}</html>\n"
    )


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(v))}</{tag}>" for v in values) + "</tr>"

    return f"<div><table>{cells('th', head)}{''.join(cells('td', row) for row in body)}</table></div>"


if __name__ == "__main__":
    main()
