"""Plots as plotly takes them: data and layout, which the page's script draws in the reader's browser."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Trace = Mapping[str, object]  # plotly's name for one series or heatmap of a plot

INK, BLUE, ORANGE = "#333333", "#3b6fb6", "#d9822b"
COSINES = [[0, BLUE], [0.5, "#ffffff"], [1, ORANGE]]
COUNTS = [[0, "#ffffff"], [1, BLUE]]


@dataclass(frozen=True)
class Plot:
    """A plot of the page.

    Attributes:
        name: Unique on the page; part of the id of the element that it is drawn in.
        title: Its title, and its description for screen readers.
        data: Its traces.
        layout: plotly's layout.
    """

    name: str
    title: str
    data: Sequence[Trace]
    layout: Mapping[str, object]


def plot(
    name: str,
    title: str,
    data: Trace | Sequence[Trace],
    x: str = "",
    y: str = "",
    *,
    xaxis: Trace | None = None,
    yaxis: Trace | None = None,
    **layout: object,
) -> Plot:
    """Make a plot in the style of the page.

    Args:
        name: See ``Plot``.
        title: See ``Plot``.
        data: One trace or several.
        x: Title of the x axis.
        y: Title of the y axis.
        xaxis: Further settings of the x axis.
        yaxis: Further settings of the y axis.
        **layout: Further settings of plotly's layout.
    """

    def axis(text: str, settings: Trace | None) -> Trace:
        look = {"gridcolor": "#e8e8e8", "zerolinecolor": "#cccccc", "automargin": True, "title": {"text": text}}
        return {**look, **(settings or {})}

    return Plot(
        name,
        title,
        [data] if isinstance(data, Mapping) else data,
        {
            "title": {"text": title, "x": 0, "xanchor": "left", "xref": "paper", "font": {"size": 13}},
            "margin": {"l": 48, "r": 12, "t": 40, "b": 44},
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
            "legend": {"orientation": "h", "y": -0.3, "yanchor": "top", "x": 0},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "hovermode": "closest",
            **layout,
            "xaxis": axis(x, xaxis),
            "yaxis": axis(y, yaxis),
        },
    )


def bars(x: Iterable[object], heights: Tensor, color: str = BLUE, **more: object) -> Trace:
    """A bar chart."""
    return {"type": "bar", "x": list(x), "y": rounded(heights), "marker": {"color": color}, **more}


def line(x: Sequence[object], y: Sequence[object], color: str, name: str) -> Trace:
    """A line."""
    return {"type": "scatter", "mode": "lines", "name": name, "line": {"color": color}, "x": x, "y": y}


def heatmap(z: Tensor, colors: list[list[object]], hover: str, **more: object) -> Trace:
    """A heatmap; ``hover`` is plotly's template of what is shown of one cell."""
    look = {"colorscale": colors, "colorbar": {"thickness": 10}, "hovertemplate": f"{hover}<extra></extra>"}
    return {"type": "heatmap", "z": rounded(z), **look, **more}


def rounded(values: object) -> object:
    """Nested lists of numbers to five digits, None where not finite: JSON has no other way to say so."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.5g}") if isinstance(values, int | float) and math.isfinite(values) else None
