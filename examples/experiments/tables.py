"""What the CSVs of the experiments say: orderings beside the authors', slopes, who wins in seconds, which defaults.

Every table is a list of rows of the same columns; None where nothing was measured. Ranges are over seeds.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cells import L1_ARCHITECTURES, best_lr, growing

Row = dict[str, Any]
_TEXT = {"experiment", "architecture", "gate", "load_balance_scale", "units"}
SETTINGS = [
    *("experiment", "architecture", "d_sae", "k", "n_experts", "lr", "l1_coefficient", "load_balance_coefficient"),
    *("load_balance_scale", "gate", "units", "passes", "seed"),
]


# Rows


def read(file: Path) -> list[Row]:
    """Numbers as floats, an empty field as nan; no rows if there is no file."""
    if not file.exists():
        return []
    with open(file, newline="") as handle:
        return [{n: v if n in _TEXT else float(v or "nan") for n, v in row.items()} for row in csv.DictReader(handle)]


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    """Floats with six digits, None as an empty field. Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    with open(unfinished, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
        )
    os.replace(unfinished, file)


def with_seconds(rows: Iterable[Row], timing: Iterable[Row]) -> list[Row]:
    """Each row with the seconds of its training steps: their number times the time of one, nan if that is unknown."""
    shape = ("architecture", "d_sae", "n_experts", "k")
    per_step = {tuple(t[n] for n in shape): t["seconds_per_step"] for t in timing}
    return [
        {**r, "seconds": r.get("step", r.get("steps", 0)) * per_step.get(tuple(r[n] for n in shape), math.nan)}
        for r in rows
    ]


def of(rows: Iterable[Row], *experiments: str, **settings: Any) -> list[Row]:
    """Rows of these experiments and settings, each SAE once."""
    seen: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["experiment"] in experiments and all(row[n] == v for n, v in settings.items()):
            seen[tuple((n, str(v)) for n, v in row.items() if n != "experiment")] = row
    return list(seen.values())


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[n] for n in names)].append(row)
    return dict(sorted(groups.items()))


def label(row: Row) -> str:
    return f"switch, {row['n_experts']:.0f}" if row["architecture"] == "switch" else row["architecture"]


def middle_k(rows: Iterable[Row]) -> float:
    ks = sorted({r["k"] for r in rows})
    return ks[len(ks) // 2]


def values(rows: Iterable[Row], name: str) -> list[float]:
    return [r[name] for r in rows]


def mean(numbers: Sequence[float]) -> float:
    return statistics.fmean(numbers)


def span(numbers: Sequence[float], digits: int = 3) -> str:
    """A mean with the least and the largest."""
    if len(numbers) == 1:
        return f"{numbers[0]:.{digits}f}"
    return f"{mean(numbers):.{digits}f} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


# The paper's claims


def change(a: Sequence[float], b: Sequence[float]) -> str:
    """Of the means, and the range over pairs of seeds."""
    low, high = min(a) / max(b) - 1, max(a) / min(b) - 1
    return f"{mean(a) / mean(b) - 1:+.1%} ({low:+.1%} to {high:+.1%})"


def verdict(a: Sequence[float], b: Sequence[float], sign: int) -> str:
    """Whether a is above b (sign 1) or below it (-1). Seeds that overlap are no ordering; one seed is called one."""
    if min(a) <= max(b) and min(b) <= max(a):
        return "seeds overlap"
    answer = "holds" if (mean(a) - mean(b)) * sign > 0 else "does not hold"
    return answer if min(len(a), len(b)) > 1 else f"{answer} (one seed)"


# Authors: GPT-2 small, layer 8, 24,576 latents, 819M tokens, one seed, k = 32 where not said otherwise; from the result
# files in github.com/amudide/switch_sae. Change of the MSE against TopK; dead latents as a share.
_FIXED = {16: "+13.5%", 32: "+19.3%", 64: "+28.8%", 128: "+39.5%"}
_FIXED_CE = {16: "0.9888 to 0.9910", 32: "0.9876 to 0.9910", 64: "0.9852 to 0.9910"}
_MATCHED = {2: "-9.8%", 4: "-16.0%", 8: "-20.9%"}
_FIXED_DEAD = {16: "0.4% to 4.5%", 32: "0.3% to 4.5%", 64: "1.7% to 4.5%"}
_MATCHED_DEAD = {2: "4.3% to 4.5%", 4: "7.6% to 4.5%", 8: "10.8% to 4.5%"}


def claims(rows: list[Row]) -> list[Row]:
    """Claim, the authors' number, ours over seeds, whether it holds here."""
    fixed, matched = of(rows, "fixed width"), of(rows, "matched FLOPs")
    found: list[Row] = []
    if not fixed:
        return found

    def add(claim: str, theirs: str, a: list[Row], b: list[Row], sign: int, name: str = "mse") -> None:
        if not a or not b:
            return
        x, y = values(a, name), values(b, name)
        ours = change(x, y) if name == "mse" else f"{span(x)} to {span(y)}"
        seeds = f"{len(x)} and {len(y)}"
        found.append({"claim": claim, "authors": theirs, "here": ours, "seeds": seeds, "": verdict(x, y, sign)})

    def dead(part: list[Row]) -> list[Row]:
        return [{"dead": r["dead_latents"] / r["d_sae"]} for r in part]

    middle = middle_k(fixed)
    topk = {k: of(fixed, "fixed width", architecture="sparse_topk", k=k) for (k,) in grouped(fixed, "k")}
    switch = grouped([r for r in fixed if r["architecture"] == "switch"], "n_experts", "k")
    wide = grouped(matched, "n_experts", "k")
    for (E, k), mine in switch.items():
        theirs = _FIXED.get(int(E), "") if k == middle else ""
        add(f"fixed width, k {k:.0f}: {E:.0f} experts have a larger error than TopK", theirs, mine, topk[k], 1)
    for (E, k), mine in switch.items():
        if k == middle and (E / 2, k) in switch:
            theirs = {32: "+5.2%", 64: "+7.9%", 128: "+8.3%"}.get(int(E), "")
            add(f"fixed width: {E:.0f} experts have a larger error than {E / 2:.0f}", theirs, mine, switch[E / 2, k], 1)
    ks = sorted(topk)
    for E in sorted({E for E, k in switch if (E, ks[0]) in switch and (E, ks[-1]) in switch and len(ks) > 1}):
        gaps = [[{"gap": r["mse"] / mean(values(topk[k], "mse"))} for r in switch[E, k]] for k in (ks[-1], ks[0])]
        theirs = {16: "1.135 to 1.016", 64: "1.288 to 1.019"}.get(int(E), "")
        claim = (
            f"fixed width: the error of {E:.0f} experts over TopK's is larger at k {ks[-1]:.0f} than at k {ks[0]:.0f}"
        )
        add(claim, theirs and theirs + " (k 32 to 8)", gaps[0], gaps[1], 1, "gap")
    for (E, k), mine in switch.items():
        if k == middle:
            theirs = _FIXED_CE.get(int(E), "")
            claim = f"fixed width: {E:.0f} experts recover less of the CE loss than TopK"
            add(claim, theirs, mine, topk[k], -1, "ce_recovered")
    for (E, k), mine in switch.items():
        if k == middle:
            claim = f"fixed width: {E:.0f} experts have a smaller share of dead latents than TopK"
            add(claim, _FIXED_DEAD.get(int(E), ""), dead(mine), dead(topk[k]), -1, "dead")
    for (E, k), mine in wide.items():
        theirs = _MATCHED.get(int(E), "") if k == middle else ""
        add(f"matched FLOPs, k {k:.0f}: {E:.0f} experts have a smaller error than TopK", theirs, mine, topk[k], -1)
    for (E, k), mine in wide.items():
        if k == middle and (E / 2, k) in wide:
            theirs = {4: "-6.9%", 8: "-5.8%"}.get(int(E), "")
            add(
                f"matched FLOPs: {E:.0f} experts have a smaller error than {E / 2:.0f}",
                theirs,
                mine,
                wide[E / 2, k],
                -1,
            )
    for (E, k), mine in wide.items():
        if k == middle:
            theirs = {2: "0.9924 to 0.9910", 4: "0.9934 to 0.9910", 8: "0.9941 to 0.9910"}.get(int(E), "")
            add(
                f"matched FLOPs: {E:.0f} experts recover more of the CE loss than TopK",
                *(theirs, mine, topk[k], 1, "ce_recovered"),
            )
    for (E, k), mine in wide.items():
        if k == middle:
            claim = f"matched FLOPs: {E:.0f} experts have a larger share of dead latents than TopK"
            add(claim, _MATCHED_DEAD.get(int(E), ""), dead(mine), dead(topk[k]), 1, "dead")
    baselines = {(a, k): of(fixed, "fixed width", architecture=a, k=k) for a in L1_ARCHITECTURES for k in ks}
    for (a, k), mine in baselines.items():
        if mine:
            name = "ReLU with an L1 loss" if a == "standard" else "Gated"
            theirs = {"standard": "+56% (L0 53, k 48)", "gated": "+26% (L0 49, k 48)"}[a] if k == middle else ""
            l0 = mean(values(mine, "l0"))
            add(f"{name} at L0 {l0:.1f} has a larger error than TopK at k {k:.0f}", theirs, mine, topk[k], 1)
    relu, gated = baselines["standard", middle], baselines["gated", middle]
    add("ReLU with an L1 loss has a larger error than Gated at about the same L0", "+23% (L0 53, 49)", relu, gated, 1)
    found += _claims_of_sweeps(rows)
    return found


def _claims_of_sweeps(rows: list[Row]) -> list[Row]:
    found = []
    coefficient = {c: same for (c,), same in grouped(of(rows, "coefficient"), "load_balance_coefficient").items()}
    if 0.0 in coefficient and len(coefficient) > 1:
        errors = {c: values(same, "mse") for c, same in coefficient.items()}
        best = min((c for c in errors if c > 0), key=lambda c: mean(errors[c]))
        worst = max(errors)
        seeds = f"{len(errors[0.0])} and {len(errors[best])}"
        found.append(
            {
                "claim": f"without the load-balance loss the error is larger than with the best coefficient, {best:g}",
                "authors": "+9.5% (16 experts, k 64)",
                "here": change(errors[0.0], errors[best]),
                "seeds": seeds,
                "": verdict(errors[0.0], errors[best], 1),
            }
        )
        load = values(coefficient[0.0], "load_max"), values(coefficient[best], "load_max")
        found.append(
            {
                "claim": f"without it the busiest expert has more of the load (1: even) than with {best:g}",
                "authors": "balance loss 2.03 to 1.00",
                "here": f"{span(load[0], 2)} to {span(load[1], 2)}",
                "seeds": seeds,
                "": verdict(*load, 1),
            }
        )
        flat = verdict(errors[worst], errors[best], 1)
        found.append(
            {
                "claim": f"a far too large coefficient, {worst:g}, does no harm against {best:g}",
                "authors": "+0.7% (100 to 1)",
                "here": change(errors[worst], errors[best]),
                "seeds": f"{len(errors[worst])} and {len(errors[best])}",
                "": {"holds": "does not hold", "does not hold": "holds"}.get(flat, flat),
            }
        )
    longer = grouped([r for r in of(rows, "passes") if r["passes"] > 1], "passes", "architecture", "d_sae", "n_experts")
    for (n, a, F, E), mine in longer.items():
        topk = [r for (m, b, *_), same in longer.items() if (m, b) == (n, "sparse_topk") for r in same]
        if a != "switch" or not topk:
            continue
        x, y, fixed = values(mine, "mse"), values(topk, "mse"), topk[0]["d_sae"] == F
        claim = f"{'fixed width' if fixed else 'matched FLOPs'}, {n:.0f} passes: {E:.0f} experts have a "
        found.append(
            {
                "claim": claim + f"{'larger' if fixed else 'smaller'} error than TopK",
                "authors": (_FIXED if fixed else _MATCHED).get(int(E), ""),
                "here": change(x, y),
                "seeds": f"{len(x)} and {len(y)}",
                "": verdict(x, y, 1 if fixed else -1),
            }
        )
    gates = grouped(of(rows, "gate"), "n_experts", "gate")
    for E in sorted({E for E, _ in gates if (E, "one") in gates and (E, "probability") in gates}):
        one, probability = values(gates[E, "one"], "mse"), values(gates[E, "probability"], "mse")
        found.append(
            {
                "claim": f"{E:.0f} experts: a gate of 1 has a larger error than the router's probability",
                "authors": "+22% (without load balance)" if E == 16 else "",
                "here": change(one, probability),
                "seeds": f"{len(one)} and {len(probability)}",
                "": verdict(one, probability, 1),
            }
        )
    return found


# Scaling


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
    """Least squares of log y on log x: slope, its standard error (nan for two points), intercept."""
    X, Y = [math.log(v) for v in x], [math.log(v) for v in y]
    centre = mean(X)
    spread = sum((v - centre) ** 2 for v in X)
    slope = sum((v - centre) * w for v, w in zip(X, Y, strict=True)) / spread
    intercept = mean(Y) - slope * centre
    residual = sum((w - intercept - slope * v) ** 2 for v, w in zip(X, Y, strict=True))
    error = math.sqrt(residual / (len(X) - 2) / spread) if len(X) > 2 else math.nan
    return slope, error, intercept


def best_width(mine: list[Row]) -> float:
    """From which a wider SAE of the family is no better: the tokens, not the architecture, limit it."""
    by_width = {F: mean(values(same, "fvu")) for (F,), same in grouped(mine, "d_sae").items()}
    return min(by_width, key=by_width.__getitem__)


def slopes(rows: list[Row]) -> list[Row]:
    """Of FVU against FLOPs and seconds, over the means of seeds; over all widths, and up to the best one."""
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
                        "slope": _number(slope),
                        "standard error": _number(error),
                        "least FVU at width": f"{best:.0f}",
                    }
                )
    return found


def crossover(rows: list[Row]) -> list[Row]:
    """For every TopK SAE: the Switch SAE that reaches its FVU or less in the fewest seconds, and in fewest FLOPs."""
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
                "FVU": _number(topk["fvu"]),
                "seconds": _number(topk["seconds"]),
                "family": name,
            }
            for x in ("seconds", "flops_per_activation"):
                best = min(as_good, key=lambda p: p[x], default=None)
                short = "seconds" if x == "seconds" else "FLOPs"
                row[f"width, least {short}"] = f"{best['F']:.0f}" if best else "none reaches it"
                row[f"{short}, Switch over TopK"] = _number(best[x] / topk[x]) if best else ""
            same = next((p for p in points if p["F"] == topk["F"]), None)
            row["seconds at equal width"] = _number(same["seconds"] / topk["seconds"]) if same else ""
            row["FVU at equal width"] = _number(same["fvu"] / topk["fvu"]) if same else ""
            found.append(row)
    return found


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


# Settings


def learning_rates(rows: list[Row]) -> list[Row]:
    """What the sweep chose for each shape, as it is and as a multiple of the paper's law on either width."""
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
    """Where the interpolated L1 coefficients ended."""
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
    """Of every setting swept: each value's error, and which values cannot be told from the best."""
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
    """What further passes over the same tokens give each SAE, and where they put Switch beside TopK."""
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
