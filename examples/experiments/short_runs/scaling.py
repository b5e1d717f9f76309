"""How the error falls with width: slopes, and where Switch meets TopK at equal error."""

from __future__ import annotations

import math
from collections.abc import Sequence

from csv_rows import Row, grouped, mean, of, rounded, values

from short_runs.learning_rates import growing


def families(rows: list[Row]) -> dict[str, list[Row]]:
    chosen = of(rows, "scaling")
    found = {
        "TopK": [r for r in chosen if r["architecture"] == "sparse_topk"],
        "Switch, 8 experts": [r for r in chosen if r["n_experts"] == 8],
        "Switch, 64 experts": [r for r in chosen if r["n_experts"] == 64],
        "Switch, F / 256 experts": [r for r in chosen if r["n_experts"] > 1 and r["n_experts"] == growing(r["d_sae"])],
    }
    return {name: mine for name, mine in found.items() if mine}


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Least-squares fit of log y on log x: slope, its standard error (nan for two points), intercept."""
    X, Y = [math.log(v) for v in x], [math.log(v) for v in y]
    centre = mean(X)
    spread = sum((v - centre) ** 2 for v in X)
    slope = sum((v - centre) * w for v, w in zip(X, Y, strict=True)) / spread
    intercept = mean(Y) - slope * centre
    residual = sum((w - intercept - slope * v) ** 2 for v, w in zip(X, Y, strict=True))
    error = math.sqrt(residual / (len(X) - 2) / spread) if len(X) > 2 else math.nan
    return slope, error, intercept


def best_width(mine: list[Row]) -> float:
    """The width with the least error in a family: beyond it, tokens are the limit and not the architecture."""
    by_width = {F: mean(values(same, "fvu")) for (F,), same in grouped(mine, "d_sae").items()}
    return min(by_width, key=by_width.__getitem__)


def slopes(rows: list[Row]) -> list[Row]:
    """Slopes of log FVU against log FLOPs and log seconds, over means of seeds; all widths, and up to the best one."""
    found = []
    for name, mine in families(rows).items():
        best = best_width(mine)
        for x in ("flops", "seconds"):
            for to in sorted({best, max(values(mine, "d_sae"))}):
                points = [
                    (mean(values(same, "flops_per_activation" if x == "flops" else x)), mean(values(same, "fvu")))
                    for (width,), same in grouped(mine, "d_sae").items()
                    if width <= to
                ]
                known = len({p[0] for p in points}) > 1 and not any(math.isnan(v) for p in points for v in p)
                slope, error, _ = fit(*zip(*points, strict=True)) if known else (math.nan, math.nan, math.nan)
                found.append(
                    {
                        "family": name,
                        "FVU against": x,
                        "widths": f"{min(values(mine, 'd_sae')):.0f} to {to:.0f}",
                        "points": len(points),
                        "slope": rounded(slope),
                        "standard error": rounded(error),
                        "least FVU at width": f"{best:.0f}",
                    }
                )
    return found


def crossover(rows: list[Row]) -> list[Row]:
    """Per TopK SAE: the Switch SAEs that reach its FVU or less in the fewest seconds, and in the fewest FLOPs."""
    found = []
    by_family = {
        name: [
            {"F": F, **{n: mean(values(same, n)) for n in ("fvu", "seconds", "flops_per_activation")}}
            for (F,), same in grouped(mine, "d_sae").items()
        ]
        for name, mine in families(rows).items()
    }
    for topk in by_family.get("TopK", []):
        for name, points in by_family.items():
            if name == "TopK":
                continue
            as_good = [p for p in points if p["fvu"] <= topk["fvu"]]
            row = {
                "TopK width": f"{topk['F']:.0f}",
                "FVU": rounded(topk["fvu"]),
                "seconds": rounded(topk["seconds"]),
                "family": name,
            }
            for x in ("seconds", "flops_per_activation"):
                best = min(as_good, key=lambda p: p[x], default=None)
                short = "seconds" if x == "seconds" else "FLOPs"
                row[f"width, least {short}"] = f"{best['F']:.0f}" if best else "none reaches it"
                row[f"{short}, Switch over TopK"] = rounded(best[x] / topk[x]) if best else ""
            same = next((p for p in points if p["F"] == topk["F"]), None)
            row["seconds at equal width"] = rounded(same["seconds"] / topk["seconds"]) if same else ""
            row["FVU at equal width"] = rounded(same["fvu"] / topk["fvu"]) if same else ""
            found.append(row)
    return found
