"""The study beyond one active expert: what it compares, and its table."""

from collections import defaultdict
from dataclasses import replace

import costs
import plans
import studied
import tables
from helpers.experiments import measured, swept
from plans import PLANS


def test_the_study_compares_saes_of_the_same_width_and_most_at_the_same_flops():
    plan = PLANS["study"]
    planned = plans.cells(plan, [])
    by_experiment = defaultdict(list)
    for c in planned:
        if c.experiment.startswith(studied.STUDY) and c.seed == 0:
            by_experiment[c.experiment.removeprefix(studied.STUDY)].append(c)
    assert set(by_experiment) == {
        *("several experts, same FLOPs", "several experts, as wide", "load balance", "duplicates", "split"),
        *("several experts, same FLOPs, layer 12", "load balance, layer 12"),
    }
    for name, mine in by_experiment.items():
        assert mine[0] == studied.baseline(replace(mine[0], start="apart"))
        assert len(set(mine)) == len(mine) > 1
        assert len({c.d_sae for c in mine}) == 1
        if "same FLOPs" in name or "load" in name:
            assert {c.active_width for c in mine} == {2048}
    assert {c.active_width for c in by_experiment["several experts, as wide"]} == {2048, 4096, 8192}
    assert {(c.d_sae, c.n_experts) for c in planned if c.experiment == plans.SWEEP} == {
        *((2048, 1), (16384, 8), (2048, 4)),
    }
    rows = swept("switch", 8, {5e-4: 0.3, 1e-3: 0.2, 2e-3: 0.25}, 16384)
    ready = [c for c in plans.cells(plan, rows) if c.is_ready and c.experiment.startswith(studied.STUDY)]
    assert {c.lr for c in ready} == {1e-3}
    assert {c.n_experts for c in ready} == {8, 15, 16, 31, 32}  # at the rate of the eight
    assert sum(costs.minutes(plan).values()) / 2 < 140


def test_the_study_stands_beside_one_expert_per_token():
    name = f"{studied.STUDY}several experts, same FLOPs"
    common = {"experiment": name, "architecture": "switch", "d_sae": 16384.0, "duplicates": 0.02}
    plain = [measured(**common, seed=s, n_experts=8.0, mse=1.0 + s / 100) for s in (0, 1)]
    two = {"n_experts": 16.0, "n_active_experts": 2.0, "gate": "renormalized"}
    other = [measured(**common, seed=s, mse=0.9, **two) for s in (0, 1)]
    first, second = tables.study(other + plain, [])
    assert (first["changed"], first["change of the error"]) == ("nothing", "")
    assert second["changed"] == "n_experts 16, n_active_experts 2, gate renormalized"
    assert second["change of the error"].startswith("-10.4%")
    assert second["smaller error"] == "holds"
    assert second["duplicates"] == "0.0200 (0.0200 to 0.0200)"
    assert tables.study(other, []) == []


def test_errors_are_compared_after_equal_seconds_too():
    """One run's steps take twice as long, and its error falls twice as fast with each."""
    name = f"{studied.STUDY}load balance"
    common = {"experiment": name, "architecture": "switch", "d_sae": 16384.0, "duplicates": 0.02, "n_experts": 8.0}
    kinds = {"loss": (10.0, 0.8), "bias": (20.0, 0.5)}  # milliseconds, and what is left of the error after ten steps
    rows = [
        measured(**common, seed=s, load_balancing=kind, step_ms=ms)
        for kind, (ms, _) in kinds.items()
        for s in (0.0, 1.0)
    ]
    curves = [
        {**row, "step": 10.0 * i, "fvu": kinds[row["load_balancing"]][1] ** i * (1 + row["seed"]), "falling": i > 4}
        for row in rows
        for i in range(1, 6)
    ]
    _, other = tables.study(rows, curves)
    # After 0.4 seconds one has made 40 steps, the other 20.
    change = f"{0.5**2 / 0.8**4 - 1:+.1%}"
    assert other["at equal seconds"] == f"{change} ({change} to {change})"
