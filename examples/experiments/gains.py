"""What Switch gains over TopK at matched FLOPs: against the number of tokens, and in tokens, FLOPs and seconds.

Seeds are paired: the SAEs of one seed see the same tokens in the same order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from csv_rows import Row, change, grouped, mean, rounded, span, values, verdict

# The authors: GPT-2 small, layer 8, k 32, 819M tokens, one seed; github.com/amudide/switch_sae.
AUTHORS = {2: -0.098, 4: -0.160, 8: -0.209}
_FAR = 100_000_000
_EXPONENTS = np.linspace(0.1, 2.0, 39)


def matched(rows: Sequence[Row]) -> dict[tuple[float, float], dict[float, list[Row]]]:
    """Rows at matched FLOPs by k and number of experts (1: TopK), then by tokens."""
    mine = [r for r in rows if r["experiment"] == "matched FLOPs"]
    return {key: by_one(same, "tokens") for key, same in grouped(mine, "k", "n_experts").items()}


def by_one(rows: Sequence[Row], name: str) -> dict[float, list[Row]]:
    return {value: same for (value,), same in grouped(rows, name).items()}


def paired(switch: Sequence[Row], topk: Sequence[Row], name: str = "mse") -> list[float]:
    """The relative change of each seed that both have."""
    other = {r["seed"]: r[name] for r in topk}
    return [r[name] / other[r["seed"]] - 1 for r in sorted(switch, key=lambda r: r["seed"]) if r["seed"] in other]


def against_tokens(rows: Sequence[Row], _curves: Sequence[Row] = ()) -> list[Row]:
    """The change of the error against TopK after every budget."""
    found, by_tokens = [], matched(rows)
    for (k, E), mine in by_tokens.items():
        for tokens, switch in mine.items() if E > 1 else ():
            topk = by_tokens[k, 1.0].get(tokens)
            if not topk:
                continue
            a, b = values(switch, "mse"), values(topk, "mse")
            found.append(
                {
                    "experts": f"{E:.0f}",
                    "k": f"{k:.0f}",
                    "tokens": f"{tokens:.0f}",
                    "TopK's FVU": span(values(topk, "fvu"), 4),
                    "Switch's FVU": span(values(switch, "fvu"), 4),
                    "change of the error": change(a, b),
                    "seeds": f"{len(a)} and {len(b)}",
                    "smaller than TopK's": verdict(a, b, -1),
                }
            )
    return found


def at_equal_seconds(
    a: Sequence[Row], b: Sequence[Row], a_curves: Sequence[Row], b_curves: Sequence[Row]
) -> list[float]:
    """The relative change of the error from b to a, by seed, after the seconds that the faster of the two trained.

    Read off the held-out curves before the rates fall; a step takes its run's median.
    """
    found = []
    for seed in sorted(set(values(a, "seed")) & set(values(b, "seed"))):
        courses = [_course(rows, curves, seed) for rows, curves in ((a, a_curves), (b, b_curves))]
        if all(courses):
            until = min(seconds[-1] for seconds, _ in courses)
            x, y = (float(np.interp(until, seconds, errors)) for seconds, errors in courses)
            found.append(x / y - 1)
    return found


def _course(rows: Sequence[Row], curves: Sequence[Row], seed: float) -> tuple[list[float], list[float]] | tuple[()]:
    """Seconds and errors of one run at a constant rate."""
    (row,) = [r for r in rows if r["seed"] == seed]
    points = sorted((p["step"], p["fvu"]) for p in curves if p["seed"] == seed and not p["falling"])
    return ([step * row["step_ms"] / 1e3 for step, _ in points], [fvu for _, fvu in points]) if points else ()


# Fits of log(error of Switch / error of TopK), seed by seed


def line(tokens: Sequence[float], ratio: Sequence[float]) -> tuple[float, float]:
    """Least squares of the log ratio on log10 tokens: intercept, slope."""
    slope, intercept = np.polyfit(np.log10(tokens), np.log(ratio), 1)
    return float(intercept), float(slope)


def saturating(tokens: Sequence[float], ratio: Sequence[float]) -> tuple[float, float, float]:
    """Least squares of the log ratio on ``limit + size * (tokens / 10^6)^-exponent``, exponents from 0.1 to 2."""
    x, y = np.asarray(tokens) / 1e6, np.log(ratio)
    best: tuple[float, tuple[float, float, float]] = (math.inf, (math.nan, math.nan, math.nan))
    for exponent in _EXPONENTS:
        design = np.stack([np.ones_like(x), x**-exponent], axis=1)
        solution, *_ = np.linalg.lstsq(design, y, rcond=None)
        residual = float(np.square(design @ solution - y).sum())
        best = min(best, (residual, (float(solution[0]), float(solution[1]), float(exponent))))
    return best[1]


def fits(rows: Sequence[Row], _curves: Sequence[Row] = ()) -> list[Row]:
    """Where the gain begins and what both fits expect at a hundred million tokens: mean and standard error of seeds.

    A line in log tokens knows no limit and so expects too much; a limit that is approached as a power of the tokens is
    the more careful guess. How far they lie apart says more of the uncertainty than the errors of either do.
    """
    found, by_tokens = [], matched(rows)
    for (k, E), mine in by_tokens.items():
        series = _ratios(mine, by_tokens[k, 1.0]) if E > 1 else {}
        if not series:
            continue
        lines = [line(*zip(*points, strict=True)) for points in series.values()]
        limits = [saturating(*zip(*points, strict=True)) for points in series.values() if len(points) > 3]
        far = [math.exp(a + b * math.log10(_FAR)) - 1 for a, b in lines]
        careful = [math.exp(limit + size * (_FAR / 1e6) ** -power) - 1 for limit, size, power in limits]
        residuals = [
            abs(math.exp(a + b * math.log10(t)) / r - 1)
            for (a, b), points in zip(lines, series.values(), strict=True)
            for t, r in points
        ]
        found.append(
            {
                "experts": f"{E:.0f}",
                "k": f"{k:.0f}",
                "budgets": len(next(iter(series.values()))),
                "seeds": len(series),
                "change per tenfold tokens": with_error([math.exp(b) - 1 for _, b in lines]),
                "gain begins at": begins(lines, min(t for points in series.values() for t, _ in points)),
                "greatest misfit of the line": f"{max(residuals):.1%}",
                "expected at 1e8, line": with_error(far),
                "expected at 1e8, limit": with_error(careful) if careful else "",
                "authors at 8.19e8": f"{AUTHORS[int(E)]:+.1%}" if E in AUTHORS else "",
            }
        )
    return found


def begins(lines: Sequence[tuple[float, float]], fewest: float) -> str:
    """Where the seeds' lines cross equal error; "before" where that is fewer tokens than any run had."""
    crossings = [10 ** (-a / b) for a, b in lines if b < 0]
    if len(crossings) < len(lines):
        return "no gain that grows"
    said = ["before " + rounded(fewest) if t < fewest else rounded(t) for t in (min(crossings), max(crossings))]
    return " to ".join(dict.fromkeys(said))


def _ratios(switch: dict[float, list[Row]], topk: dict[float, list[Row]]) -> dict[float, list[tuple[float, float]]]:
    """By seed: tokens and the error's ratio, of seeds that have two budgets at least."""
    found: dict[float, list[tuple[float, float]]] = {}
    for tokens in sorted(switch.keys() & topk.keys()):
        other = {r["seed"]: r["mse"] for r in topk[tokens]}
        for r in switch[tokens]:
            if r["seed"] in other:
                found.setdefault(r["seed"], []).append((tokens, r["mse"] / other[r["seed"]]))
    return {seed: points for seed, points in found.items() if len(points) > 1}


def with_error(numbers: Sequence[float]) -> str:
    """A mean and its standard error."""
    if len(numbers) < 2:
        return f"{numbers[0]:+.1%} (one seed)"
    return f"{mean(numbers):+.1%} ± {statistics.stdev(numbers) / math.sqrt(len(numbers)):.1%}"


# Sample efficiency


def reaching(tokens: Sequence[float], errors: Sequence[float], target: float) -> float:
    """Tokens at which the error first is the target, by linear interpolation of logarithms.

    Returns:
        nan if it never is; the fewest tokens measured if it is from the start on.
    """
    before: tuple[float, float] | None = None
    for t, e in sorted(zip(tokens, errors, strict=True)):
        if e <= target:
            if before is None or e == target:
                return t
            (t0, e0), share = before, 0.0
            share = math.log(e0 / target) / math.log(e0 / e)
            return math.exp(math.log(t0) + share * math.log(t / t0))
        before = t, e
    return math.nan


def efficiency(rows: Sequence[Row], curves: Sequence[Row]) -> list[Row]:
    """The part of TopK's tokens, FLOPs and seconds at which Switch has TopK's final error.

    "whole runs": of runs that end, each with its learning rate fallen to 0, interpolated between budgets: what one
    would have paid for a run of that length; of runs of one length there is none. "while training": read off the
    held-out curves before either's learning rate falls, as the authors do.
    """
    found, by_tokens = [], matched(rows)
    for (k, E), mine in by_tokens.items():
        topk = by_tokens[k, 1.0]
        last = max(topk)
        if E == 1 or last not in mine:
            continue
        for read, points in (("whole runs", _ends), ("while training", _training)):
            if read == "whole runs" and len(mine) < 2:
                continue
            shares = []
            for seed, reference in _by_seed(topk[last]).items():
                switch = _by_seed(mine[last]).get(seed)
                targets, own = (points(rows, curves, k, n, seed) for n in (1.0, E))
                if switch is None or not targets or not own:
                    continue
                at, target = targets[-1]
                shares.append((reaching(*zip(*own, strict=True), target) / at, switch, reference))
            if shares:
                found.append(_shares(E, k, read, shares, min(mine) / last))
    return found


def _shares(E: float, k: float, read: str, shares: list[tuple[float, Row, Row]], least: float) -> Row:
    never = sum(math.isnan(s) for s, *_ in shares)
    row: Row = {"experts": f"{E:.0f}", "k": f"{k:.0f}", "read off": read, "seeds": len(shares)}
    for name, cost in (("tokens", None), ("FLOPs", "flops_per_activation"), ("seconds", "step_ms")):
        parts = [s * (1 if cost is None else a[cost] / b[cost]) for s, a, b in shares if not math.isnan(s)]
        row[f"part of TopK's {name}"] = span(parts) if parts else "not reached"
    row["not reached by"] = f"{never} of {len(shares)} seeds"
    at_least = read == "whole runs" and any(s <= least * (1 + 1e-9) for s, *_ in shares)
    row["note"] = "the fewest tokens measured: it may be less" if at_least else ""
    return row


def _by_seed(rows: Sequence[Row]) -> dict[float, Row]:
    return {r["seed"]: r for r in rows}


def _ends(rows: Sequence[Row], _curves: Sequence[Row], k: float, E: float, seed: float) -> list[tuple[float, float]]:
    mine = [r for r in rows if _is(r, k, E, seed)]
    return sorted((r["tokens"], r["fvu"]) for r in mine)


def _training(
    _rows: Sequence[Row], curves: Sequence[Row], k: float, E: float, seed: float
) -> list[tuple[float, float]]:
    mine = [r for r in curves if _is(r, k, E, seed) and not r["falling"]]
    return sorted((r["tokens_seen"], r["fvu"]) for r in mine)


def _is(row: Row, k: float, E: float, seed: float) -> bool:
    return (row["experiment"], row["k"], row["n_experts"], row["seed"]) == ("matched FLOPs", k, E, seed)
