"""The authors' claims: their numbers beside those measured here, with how many tokens, and whether each holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from csv_rows import Row, change, grouped, mean, span, values, verdict
from gains import by_one, efficiency, matched

# The authors: GPT-2 small, layer 8, 24,576 latents, k 32, 819M tokens, one seed; from the result files in
# github.com/amudide/switch_sae. Changes are of the MSE against TopK.
_ERROR = {2: "-9.8%", 4: "-16.0%", 8: "-20.9%"}
_CE = {2: "0.9924 to 0.9910", 4: "0.9934 to 0.9910", 8: "0.9941 to 0.9910"}
_DEAD = {2: "4.3% to 4.5%", 4: "7.6% to 4.5%", 8: "10.8% to 4.5%"}
_FIXED = {16: "+13.5%", 32: "+19.3%", 64: "+28.8%"}
_L1 = {"standard": "+56% (L0 53, k 48)", "gated": "+26% (L0 49, k 48)"}


def claims(rows: list[Row], curves: list[Row]) -> list[Row]:
    """Per claim: the authors' number, the number here over seeds, whether it holds here."""
    parts: list[Callable[[list[Row], list[Row]], list[Row]]] = [_matched, _efficient, _fixed, _middle, _l1]
    return [row for part in parts for row in part(rows, curves)]


def _row(topic: str, claim: str, theirs: str, here: str, tokens: float, seeds: str, holds: str) -> Row:
    facts = {"topic": topic, "claim": claim, "authors": theirs, "here": here}
    return facts | {"tokens": f"{tokens:,.0f}", "seeds": seeds, "holds here": holds}


def _compared(topic: str, claim: str, theirs: str, a: Sequence[Row], b: Sequence[Row], sign: int, name: str) -> Row:
    """``a`` against ``b``, which is expected to be above (1) or below (-1) it."""
    x, y = values(a, name), values(b, name)
    here = change(x, y) if name == "mse" else f"{span(x)} to {span(y)}"
    return _row(topic, claim, theirs, here, a[0]["tokens"], f"{len(x)} and {len(y)}", verdict(x, y, sign))


def _dead(rows: Sequence[Row]) -> list[Row]:
    return [r | {"dead": r["dead_latents"] / r["d_sae"]} for r in rows]


def _matched(rows: list[Row], _curves: list[Row]) -> list[Row]:
    found, by_tokens = [], matched(rows)
    for (k, E), mine in by_tokens.items():
        topk = by_tokens.get((k, 1.0), {})
        both = mine.keys() & topk.keys()
        if E == 1 or not both:
            continue
        a, b = mine[max(both)], topk[max(both)]
        theirs = int(E) if k == 32 else 0
        at = f"matched FLOPs, k {k:.0f}: {E:.0f} experts"
        found.append(
            _compared("error", f"{at} have a smaller error than TopK", _ERROR.get(theirs, ""), a, b, -1, "mse")
        )
        claim = f"{at} recover more of the CE loss than TopK"
        found.append(_compared("CE loss", claim, _CE.get(theirs, ""), a, b, 1, "ce_recovered"))
        claim = f"{at} have a larger share of dead latents than TopK"
        found.append(_compared("dead latents", claim, _DEAD.get(theirs, ""), _dead(a), _dead(b), 1, "dead"))
    return sorted(found, key=lambda r: ["error", "CE loss", "dead latents"].index(r["topic"]))


def _efficient(rows: list[Row], curves: list[Row]) -> list[Row]:
    tokens = max((r["tokens"] for r in rows if r["experiment"] == "matched FLOPs"), default=0)
    by_pair = {(r["k"], r["experts"]): r for r in reversed(efficiency(rows, curves))}  # whole runs, where there are any
    found = []
    for r in reversed(by_pair.values()):
        parts = {name: r[f"part of TopK's {name}"] for name in ("tokens", "FLOPs", "seconds")}
        here = f"{parts['tokens']} of the steps, {parts['FLOPs']} of the FLOPs, {parts['seconds']} of the seconds"
        here = "not reached" if parts["tokens"] == "not reached" else here
        error = "final error" if r["read off"] == "whole runs" else "error before the learning rate falls"
        claim = f"matched FLOPs, k {r['k']}: {r['experts']} experts reach TopK's {error} in a fifth of the steps"
        reached = parts["tokens"].split()[0]
        share = float(reached) if reached[0].isdigit() else 1.0
        holds = "holds" if share <= 0.2 else "does not hold" if share == 1 else f"not in a fifth, in {share:.3f}"
        if not r["not reached by"].startswith("0 "):
            holds = f"does not hold: not reached by {r['not reached by']}"
        found.append(_row("sample efficiency", claim, "", here, tokens, str(r["seeds"]), holds))
    return found


def _fixed(rows: list[Row], _curves: list[Row]) -> list[Row]:
    found = []
    mine = [r for r in rows if r["experiment"] == "fixed width"]
    for (E, tokens), switch in grouped(mine, "n_experts", "tokens").items():
        topk = matched(rows).get((switch[0]["k"], 1.0), {}).get(tokens)
        if topk:
            claim = f"fixed width, k {switch[0]['k']:.0f}: {E:.0f} experts have a larger error than TopK"
            found.append(_compared("fixed width", claim, _FIXED.get(int(E), ""), switch, topk, 1, "mse"))
    return found


def _middle(rows: list[Row], _curves: list[Row]) -> list[Row]:
    """By the CE loss: with massive activations, as published, a thousandth of the tokens has nearly all the error."""
    by_experts = by_one([r for r in rows if r["experiment"] == "middle layer"], "n_experts")
    topk = by_experts.pop(1.0, [])
    return [
        _compared(
            "middle layer",
            f"layer {mine[0]['layer']:.0f}, matched FLOPs, k {mine[0]['k']:.0f}: {E:.0f} experts recover more of the "
            "CE loss than TopK",
            *("", mine, topk, 1, "ce_recovered"),
        )
        for E, mine in by_experts.items()
        if topk
    ]


def _l1(rows: list[Row], _curves: list[Row]) -> list[Row]:
    found = []
    mine = [r for r in rows if r["experiment"] == "L1 baselines"]
    for (a, k, tokens), same in grouped(mine, "architecture", "k", "tokens").items():
        topk = matched(rows).get((k, 1.0), {}).get(tokens)
        if topk:
            name = {"standard": "ReLU with an L1 loss", "gated": "Gated"}[a]
            claim = f"{name} at L0 {mean(values(same, 'l0')):.1f} has a larger error than TopK at k {k:.0f}"
            found.append(_compared("baselines", claim, _L1[a] if k == 32 else "", same, topk, 1, "mse"))
    return found
