"""What decides between the cells of the experiments, which cells a plan has, and what they cost."""

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import product

import cells
import costs
import plans
import pytest
from helpers.experiments import swept
from plans import PLANS

DEFAULT = PLANS["default"]

# What decides


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ({}, [1e-3, 2e-3]),
        ({1e-3: 0.2}, [1e-3, 2e-3]),  # not all there yet
        ({1e-3: 0.3, 2e-3: 0.2}, [1e-3, 2e-3, 4e-3]),
        ({1e-3: 0.3, 2e-3: 0.2, 4e-3: 0.1}, [1e-3, 2e-3, 4e-3, 8e-3]),
        ({1e-3: 0.3, 2e-3: 0.2, 4e-3: 0.25}, [1e-3, 2e-3, 4e-3]),
        ({1e-3: 0.1, 2e-3: 0.2}, [5e-4, 1e-3, 2e-3]),
    ],
)
def test_a_sweep_goes_on_while_the_best_is_at_its_edge(errors, expected):
    assert plans.extended([1e-3, 2e-3], errors) == expected


def test_a_sweep_does_not_go_on_for_ever():
    errors = {1e-3 * 2**i: -i for i in range(30)}
    assert len(plans.extended([1e-3, 2e-3], errors)) == 2 + plans._EXTENSIONS


def test_a_cell_waits_for_the_sweep_of_its_own_shape():
    switch = cells.Cell("", "switch", 4096, n_experts=2)
    some = swept("switch", 2, {5e-4: 0.3, 1e-3: 0.2}, 4096) + swept("switch", 4, {1e-3: 0.1, 2e-3: 0.2}, 8192)
    assert plans.best_lr(DEFAULT, some, switch) is None
    assert plans.best_lr(DEFAULT, some + swept("switch", 2, {2e-3: 0.25}, 4096), switch) == 1e-3
    assert plans.best_lr(DEFAULT, some + swept("switch", 2, {2e-3: 0.15}, 4096), switch) is None  # 4e-3 is to be tried
    l1 = swept("standard", 1, {5e-4: 30.0, 1e-3: 20.0, 2e-3: 25.0}, name="final_loss")
    assert plans.best_lr(DEFAULT, l1, cells.Cell("", "standard", 2048)) == 1e-3


def test_an_ablation_of_several_shapes_says_which_and_takes_the_rate_of_each():
    plan = PLANS["rest"]
    rows = swept("switch", 2, {1e-3: 0.2, 2e-3: 0.1, 4e-3: 0.3}, 4096)
    rows += swept("sparse_topk", 1, {5e-4: 0.2, 1e-3: 0.1, 2e-3: 0.2})
    found = defaultdict(set)
    for cell in plans.cells(plan, rows):
        if cell.experiment.startswith("ablation: "):
            found[cell.experiment, cell.architecture, cell.n_experts, cell.d_sae].add((cell.seed, cell.lr))
    assert found == {
        ("ablation: learning rate, 2 experts", "switch", 2, 4096): set(product(range(3), (2e-3, 1e-3, 5e-4))),
        ("ablation: learning rate, TopK", "sparse_topk", 1, 2048): set(product(range(3), (1e-3, 5e-4))),
    }
    assert {c.experiment for c in plans.cells(PLANS["study"], []) if c.experiment.startswith("ablation: ")} == {
        f"ablation: {name}" for name in PLANS["study"].ablations
    }


def l1_rows(coefficients, l0_times_c: float) -> list[dict]:
    return [
        {"experiment": plans.L1_SWEEP, "architecture": "standard", "l1_coefficient": c, "l0": l0_times_c / c}
        for c in coefficients
    ]


def test_the_l1_coefficient_for_an_l0_is_interpolated_on_logarithms():
    for l0 in (10, 50, 70, 100, 150, 400):
        assert plans.l1_for_l0({c: 100 / c for c in (0.5, 1.0, 4.0)}, l0) == pytest.approx(100 / l0)
    baseline = cells.Cell("", "standard", 2048, 40, l1_coefficient=None)
    assert plans._with_l1(PLANS["full"], l1_rows((2.0, 4.0), 100), baseline).l1_coefficient is None
    assert plans._with_l1(PLANS["full"], l1_rows((2.0, 4.0, 8.0), 100), baseline).l1_coefficient == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("l0s", "expected"),
    [
        ({}, [2.0, 4.0, 8.0]),
        ({2.0: 20.0, 4.0: 10.0}, [2.0, 4.0, 8.0]),  # not all there yet
        ({2.0: 40.0, 4.0: 30.0, 8.0: 20.0}, [2.0, 4.0, 8.0]),
        ({2.0: 20.0, 4.0: 10.0, 8.0: 5.0}, [1.0, 2.0, 4.0, 8.0]),
        ({1.0: 30.0, 2.0: 20.0, 4.0: 10.0, 8.0: 5.0}, [0.5, 1.0, 2.0, 4.0, 8.0]),
        ({1.0: 40.0, 2.0: 20.0, 4.0: 10.0, 8.0: 5.0}, [1.0, 2.0, 4.0, 8.0]),
        ({0.5: 31.0, 1.0: 30.0, 2.0: 20.0, 4.0: 10.0, 8.0: 5.0}, [0.5, 1.0, 2.0, 4.0, 8.0]),  # not for ever
        ({2.0: 90.0, 4.0: 70.0, 8.0: 50.0}, [2.0, 4.0, 8.0, 16.0]),
    ],
    ids=str,
)
def test_l1_coefficients_are_swept_until_the_l0_lies_among_theirs(l0s, expected):
    assert plans.bracketing([2.0, 4.0, 8.0], l0s, 32) == expected


def test_a_baseline_waits_until_its_l0_lies_among_those_of_the_sweep():
    baseline = cells.Cell("", "standard", 2048, 40, l1_coefficient=None)
    rows = l1_rows((2.0, 4.0, 8.0), 50)
    assert plans._with_l1(PLANS["full"], rows, baseline).l1_coefficient is None
    assert plans._with_l1(PLANS["full"], rows + l1_rows((1.0,), 50), baseline).l1_coefficient == pytest.approx(1.25)
    (swept,) = {c.l1_coefficient for c in plans._l1_sweep(PLANS["full"], baseline, rows)} - {2.0, 4.0, 8.0}
    assert swept == 1.0


# The plans


@pytest.mark.parametrize("name", list(PLANS))
def test_every_planned_cell_can_be_built_and_has_its_activations(name):
    plan = PLANS[name]
    tokens = plan.layer_tokens()
    seeds = defaultdict(set)
    for cell in plans.cells(plan, []):
        n_parts = cell.n_experts + cell.n_shared_experts
        assert cell.d_sae % n_parts == 0
        assert cell.active_width >= cell.k
        assert cell.tokens <= tokens[cell.layer]
        assert list(cell.budgets) == sorted(set(cell.budgets))
        assert cell.seconds() > 0
        if cell.experiment not in (plans.SWEEP, plans.L1_SWEEP):
            seeds[replace(cell, seed=0)].add(cell.seed)
    assert {frozenset(s) for s in seeds.values()} == {frozenset(plan.seeds)}
    warmed = [c for c in plans.cells(plan, []) if c.lr_warm_up or c.load_balance_warm_up or c.router_lr != 1]
    assert all(len(c.budgets) == 1 for c in warmed)  # runs of other lengths have no part in common


def test_the_default_plan_answers_the_headline_first_and_stays_under_100_minutes_on_two_cores():
    planned = plans.cells(DEFAULT, [])
    order = list(dict.fromkeys((c.experiment, c.seed) for c in planned))
    assert order[0] == (plans.SWEEP, cells.TUNING_SEED)
    sweeps = [i for i, c in enumerate(planned) if c.experiment == plans.SWEEP]
    for i, c in enumerate(planned):
        if c.experiment != plans.SWEEP:  # its sweep comes before it, and no sweep that only later cells need
            assert any(plans._shape(planned[j]) == plans._shape(c) for j in sweeps if j < i)
    assert plans._shape(planned[sweeps[-1]]) == plans._shape(next(c for c in reversed(planned) if c.n_experts == 32))
    assert order[1:4] == [("matched FLOPs", 0), ("matched FLOPs", 1), ("matched FLOPs", 2)]
    matched = [c for c in planned if c.experiment == "matched FLOPs"]
    assert {c.d_sae // c.n_experts for c in matched} == {2048}
    assert Counter(c.n_experts for c in matched) == {1: 3, 2: 3, 4: 3, 8: 3}
    assert {c.budgets for c in matched} == {(250_000, 500_000, 1_000_000, 2_000_000, 3_000_000)}
    assert sum(costs.minutes(DEFAULT).values()) / 2 < 95
    assert DEFAULT.layer_tokens() == {6: 3_000_000, 12: 500_000}


def test_fields_that_came_later_leave_the_names_of_earlier_results():
    plain = cells.Cell("", "switch", 64, 4, 2, 0, (640,), lr=2e-3, batch=32)
    assert plain.key({}) == "switch-2-14fd60a385a0"
    assert replace(plain, n_active_experts=2).key({}) != plain.key({})


def test_costs_are_those_of_the_rates_that_they_are_predicted_from():
    plan = replace(DEFAULT, tokens=3_000_000, middle=())
    assert costs.activation_seconds(plan) == pytest.approx(3e6 / 1500, rel=0.01)
    both = costs.activation_seconds(replace(plan, middle=(4,), middle_tokens=1_000_000))
    assert both == pytest.approx(2e6 / 1500 + 1e6 / 800, rel=0.02)  # one pass serves both layers
    for E, minutes in ((1, 3), (8, 8)):  # of 2.13 million tokens, as measured once on one core
        cell = cells.Cell("", "switch", 2048 * E, n_experts=E, budgets=(2_130_000,))
        assert cell.seconds() == pytest.approx(60 * minutes, rel=0.05)
    chain = replace(cell, budgets=DEFAULT.budgets)
    assert chain.steps_trained == pytest.approx(1.25 * 3_000_000 / 512, rel=1e-3)
    said = costs.costs(DEFAULT, 2)
    assert "12 cells" in said
    assert f"{sum(costs.minutes(DEFAULT).values()) / 2:.0f} minutes for 2 workers" in said
