"""What the figures share: colours, means with ranges, axes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from csv_rows import Row, mean

GREY = {"standard": "#999999", "gated": "#555555"}


def colour(row: Row) -> Any:
    """The colour of an SAE, the same in every figure."""
    if row["architecture"] == "switch":
        return plt.get_cmap("viridis")(1.05 - min(math.log2(row["n_experts"]), 7) / 6.5)
    return GREY.get(row["architecture"], "#d1495b")


def errorbars(axis: Any, points: dict[float, list[float]], name: str, **style: Any) -> None:
    """A mean and a range at each x."""
    xs = sorted(x for x in points if not math.isnan(x))
    means = [mean(points[x]) for x in xs]
    low = [m - min(points[x]) for x, m in zip(xs, means, strict=True)]
    high = [max(points[x]) - m for x, m in zip(xs, means, strict=True)]
    options: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 1.2, "capsize": 2.5} | style
    axis.errorbar(xs, means, yerr=[low, high], label=name, **options)


def decorated(axis: Any, **settings: Any) -> None:
    axis.set(**settings)
    axis.grid(alpha=0.25, which="major")
    axis.spines[["top", "right"]].set_visible(False)


def plain_ticks(axis: Any, ticks: Iterable[float]) -> None:
    """Label a logarithmic axis with the x values themselves."""
    ticks = sorted(ticks)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
