"""The experiments on a small setting: two SAEs, two seeds, a real language model; and what decides between cells."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples" / "experiments"), str(ROOT / "examples")]
import cells  # noqa: E402
import figures  # noqa: E402

COLUMNS = [
    *("experiment", "architecture", "d_sae", "k", "n_experts", "lr", "l1_coefficient", "load_balance_coefficient"),
    *("gate", "seed", "l0", "mse", "fvu", "ce_recovered", "dead_latents", "load_max", "load_min"),
    *("flops_per_activation", "steps", "tokens", "seconds"),
]


def run(folder: Path) -> None:
    options = ["--tokens", "12000", "--held-out", "1024", "--eval-contexts", "2", "--batch", "256"]
    command = [sys.executable, ROOT / "examples" / "experiments" / "run.py", "--plan", "tiny", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "TQDM_DISABLE": "1"}
    subprocess.run(
        [*command, "--models", ROOT / "runs" / "models", "--output", folder], check=True, env=environment, cwd=folder
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experiments")
    run(folder)
    return folder


def test_the_csv_holds_every_cell_with_what_was_measured(results):
    with open(results / "results.csv", newline="") as handle:
        assert next(csv.reader(handle)) == COLUMNS
    rows = figures.read(results / "results.csv")
    fixed = figures.of(rows, "fixed width")
    assert {(r["architecture"], r["seed"]) for r in fixed} == {
        *((a, s) for a in ("sparse_topk", "switch") for s in (0, 1)),
        ("topk", 0),
    }
    for r in fixed:
        assert r["l0"] == pytest.approx(r["k"])
        assert 0 < r["fvu"] < 1.2
        assert 0 < r["mse"] < math.inf
        assert -0.5 < r["ce_recovered"] < 1
        assert r["flops_per_activation"] == 2 * 576 * r["d_sae"] / r["n_experts"] + (
            2 * 576 * r["n_experts"] if r["architecture"] == "switch" else 0
        )
        assert r["load_min"] <= 1 <= r["load_max"]
        assert r["tokens"] == 46 * 256
    stock, ours = (next(r for r in fixed if r["architecture"] == a and r["seed"] == 0) for a in ("topk", "sparse_topk"))
    assert ours["fvu"] == pytest.approx(stock["fvu"], rel=1e-3)
    assert ours["ce_recovered"] == pytest.approx(stock["ce_recovered"], abs=1e-2)


def test_curves_go_down_and_end_at_the_last_step(results):
    curves = figures.read(results / "curves.csv")
    for mine in figures.grouped(curves, "experiment", "architecture", "seed").values():
        assert [r["step"] for r in mine] == sorted(r["step"] for r in mine)
        assert mine[-1]["step"] == 46
        assert mine[-1]["fvu"] < mine[0]["fvu"]
        assert all(
            a["seconds"] < b["seconds"] and a["flops"] < b["flops"] for a, b in zip(mine, mine[1:], strict=False)
        )


def test_a_finished_cell_is_never_computed_again(results):
    files = sorted((results / "cells").glob("*.json"))
    assert len(files) == 5  # sparse_topk and switch with two seeds each, topk; the sweep's cells are among them
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files[1:]}
    missing, table = files[0], (results / "results.csv").read_text()
    missing.unlink()  # as after a kill
    run(results)
    assert missing.exists()
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files[1:]} == before
    again = (results / "results.csv").read_text()
    for old, new in zip(csv.reader(table.splitlines()), csv.reader(again.splitlines()), strict=True):
        assert old[:-1] == new[:-1]  # all but the seconds


def test_pictures_and_page_are_drawn_from_the_csvs_alone(results, tmp_path):
    for name in ("results.csv", "curves.csv"):
        (tmp_path / name).write_bytes((results / name).read_bytes())
    figures.main(["--input", str(tmp_path)])
    assert {p.name for p in tmp_path.glob("*.png")} == {"fixed_width.png", "training.png"}
    assert all(p.stat().st_size > 10_000 for p in tmp_path.glob("*.png"))
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert page.count("<tr>") == 2 + len(figures.read(tmp_path / "results.csv")) + len(
        figures.claims(figures.read(tmp_path / "results.csv"))
    )
    first = {p.name: p.read_bytes() for p in tmp_path.glob("*.png")}
    figures.main(["--input", str(tmp_path)])
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.png")} == first


# What decides


def test_the_best_learning_rate_is_that_of_the_nearest_number_of_experts():
    rows = [
        {"experiment": "learning rate", "architecture": "switch", "n_experts": E, "lr": lr, "fvu": fvu}
        for E, lr, fvu in ((2, 1e-3, 0.3), (2, 3e-3, 0.2), (64, 1e-3, 0.1), (64, 3e-3, 0.4))
    ]
    assert cells.best_lr(rows, "switch", 4) == 3e-3
    assert cells.best_lr(rows, "switch", 32) == 1e-3
    assert cells.best_lr(rows, "gated", 1) == cells.Cell.lr


def test_the_l1_coefficient_for_an_l0_is_interpolated_on_logarithms():
    rows = [
        {"experiment": "L1 coefficient", "architecture": "standard", "l1_coefficient": c, "l0": 100 / c}
        for c in (0.5, 1.0, 4.0)
    ]
    for l0 in (10, 50, 70, 100, 150, 400):
        assert cells.l1_for_l0(rows, "standard", l0) == pytest.approx(100 / l0)


def test_seeds_that_overlap_are_no_ordering():
    assert figures.compared([1.2, 1.3], [1.0, 1.1], 1) == ("+19.0% error (2 against 2 seeds)", "holds")
    assert figures.compared([1.2, 1.3], [1.0, 1.1], -1)[1] == "does not hold"
    assert figures.compared([1.0, 1.2], [1.1, 1.15], 1)[1] == "seeds overlap"


def test_a_cell_is_named_by_all_its_settings_and_those_of_the_run():
    cell = cells.Cell("switch", 4096, 32, 8)
    names = {
        cell.key({"tokens": 1}),
        cell.key({"tokens": 2}),
        cells.Cell("switch", 4096, 32, 8, seed=1).key({"tokens": 1}),
        cells.Cell("switch", 4096, 32, 8, gate="one").key({"tokens": 1}),
    }
    assert len(names) == 4
    assert cells.Cell("switch", 4096, 32, 8).key({"tokens": 1}) in names


@pytest.mark.parametrize("plan", ["default", "full"])
def test_every_planned_cell_can_be_built(plan):
    plan = cells.PLANS[plan]
    rows = [
        {"experiment": "L1 coefficient", "architecture": a, "l1_coefficient": c, "l0": 64 / c}
        for a in plan.baselines
        for c in plan.l1_coefficients[a]
    ]
    for number in range(cells.N_STAGES):
        for _, cell in cells.stage(number, plan, rows):
            assert cell.d_sae % cell.n_experts == 0
            assert cell.d_sae // cell.n_experts >= cell.k
            assert cell.weight(576) > 0
