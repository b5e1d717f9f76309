"""The paper's claims: the authors' numbers beside those measured here, and whether each ordering holds."""

from __future__ import annotations

from csv_rows import Row, change, grouped, mean, middle_k, of, span, values, verdict

from short_runs.learning_rates import L1_ARCHITECTURES

# The authors: GPT-2 small, layer 8, 24,576 latents, 819M tokens, one seed, k = 32 unless stated otherwise; from the
# result files in github.com/amudide/switch_sae. Change of the MSE against TopK; share of dead latents.
_FIXED = {16: "+13.5%", 32: "+19.3%", 64: "+28.8%", 128: "+39.5%"}
_FIXED_CE = {16: "0.9888 to 0.9910", 32: "0.9876 to 0.9910", 64: "0.9852 to 0.9910"}
_MATCHED = {2: "-9.8%", 4: "-16.0%", 8: "-20.9%"}
_FIXED_DEAD = {16: "0.4% to 4.5%", 32: "0.3% to 4.5%", 64: "1.7% to 4.5%"}
_MATCHED_DEAD = {2: "4.3% to 4.5%", 4: "7.6% to 4.5%", 8: "10.8% to 4.5%"}


def claims(rows: list[Row]) -> list[Row]:
    """Per claim: the authors' number, the number here over seeds, whether it holds here."""
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
