"""The tables and figures of the short runs in docs/experiments."""

import math
import shutil

import csv_rows
import figures
import matplotlib
import matplotlib.image
import numpy as np
import pytest
from helpers import ROOT
from short_runs import drawings, learning_rates, scaling, tables

COMMITTED = ROOT / "docs" / "experiments"
SETTINGS = [
    *("experiment", "architecture", "d_sae", "k", "n_experts", "lr", "l1_coefficient", "load_balance_coefficient"),
    *("load_balance_scale", "gate", "units", "passes", "seed"),
]
RESULTS = [
    *("l0", "mse", "fvu", "final_loss", "ce_recovered", "dead_latents", "load_max", "load_min"),
    *("flops_per_activation", "steps", "tokens"),
]

# What the tables say


def test_seconds_are_steps_times_the_time_of_one():
    timed = [{"architecture": "switch", "d_sae": 2048, "n_experts": 8, "k": 16, "seconds_per_step": 0.5}]
    shape = {"architecture": "switch", "d_sae": 2048, "n_experts": 8, "k": 16}
    point, row, untimed = csv_rows.with_seconds([shape | {"step": 3}, shape | {"steps": 10}, shape | {"k": 8}], timed)
    assert (point["seconds"], row["seconds"]) == (1.5, 5)
    assert math.isnan(untimed["seconds"])


def result(**fields) -> dict:
    """A row of results.csv."""
    plain = {
        **dict.fromkeys(SETTINGS, 0.0),
        **dict.fromkeys(RESULTS, 1.0),
        **{"experiment": "fixed width", "architecture": "switch", "d_sae": 2048.0, "k": 16.0, "n_experts": 8.0},
        **{"gate": "probability", "load_balance_scale": "variance", "units": "unit variance", "seconds": 1.0},
    }
    return plain | fields


def test_seeds_that_overlap_are_no_ordering():
    assert csv_rows.verdict([1.2, 1.3], [1.0, 1.1], 1) == "holds"
    assert csv_rows.verdict([1.2, 1.3], [1.0, 1.1], -1) == "does not hold"
    assert csv_rows.verdict([1.0, 1.2], [1.1, 1.15], 1) == "seeds overlap"
    assert csv_rows.verdict([1.2], [1.0, 1.1], 1) == "holds (one seed)"
    assert csv_rows.change([1.2, 1.3], [1.0, 1.1]) == "+19.0% (+9.1% to +30.0%)"
    assert csv_rows.span([1.0, 2.0, 3.0], 1) == "2.0 (1.0 to 3.0)"
    assert csv_rows.span([1.0], 2) == "1.00"


def test_claims_are_set_beside_the_authors():
    topk = [
        result(architecture="sparse_topk", n_experts=1.0, mse=m, dead_latents=512.0, ce_recovered=0.9, seed=float(s))
        for s, m in enumerate((1.0, 1.1))
    ]
    switch = [
        result(n_experts=16.0, mse=m, dead_latents=0.0, ce_recovered=0.89, seed=float(s))
        for s, m in enumerate((1.2, 1.3))
    ]
    wide = [result(experiment="matched FLOPs", n_experts=2.0, d_sae=4096.0, mse=1.05, dead_latents=1024.0)]
    gates = [result(experiment="gate", n_experts=16.0, gate=g, mse=m) for g, m in (("one", 2.0), ("probability", 1.0))]
    coefficient = [
        result(experiment="coefficient", load_balance_coefficient=c, mse=m, load_max=load, seed=s)
        for c, m, load in ((0.0, 1.5, 3.0), (1.0, 1.0, 1.1), (100.0, 1.01, 1.0))
        for s in (0.0, 1.0)
    ]
    longer = [
        result(experiment="passes", architecture=a, n_experts=E, d_sae=F, passes=4.0, mse=m, seed=s)
        for a, E, F, m in (
            ("sparse_topk", 1.0, 2048.0, 1.0),
            ("switch", 4.0, 8192.0, 0.9),
            ("switch", 4.0, 2048.0, 1.2),
        )
        for s in (0.0, 1.0)
    ]
    found = {r["claim"]: r for r in tables.claims(topk + switch + wide + gates + coefficient + longer)}
    first = found["fixed width, k 16: 16 experts have a larger error than TopK"]
    assert first == {
        **{"claim": first["claim"], "authors": "+13.5%", "here": "+19.0% (+9.1% to +30.0%)", "seeds": "2 and 2"},
        "": "holds",
    }
    dead = found["fixed width: 16 experts have a smaller share of dead latents than TopK"]
    assert (dead["here"], dead["authors"]) == ("0.000 (0.000 to 0.000) to 0.250 (0.250 to 0.250)", "0.4% to 4.5%")
    ce = found["fixed width: 16 experts recover less of the CE loss than TopK"]
    assert ce[""] == "holds"
    assert found["matched FLOPs, k 16: 2 experts have a smaller error than TopK"][""] == "seeds overlap"
    assert found["16 experts: a gate of 1 has a larger error than the router's probability"]["here"].startswith("+100")
    assert found["without the load-balance loss the error is larger than with the best coefficient, 1"][""] == "holds"
    assert found["a far too large coefficient, 100, does no harm against 1"][""] == "does not hold"
    four = found["matched FLOPs, 4 passes: 4 experts have a smaller error than TopK"]
    assert (four["here"], four["authors"], four[""]) == ("-10.0% (-10.0% to -10.0%)", "-16.0%", "holds")
    assert found["fixed width, 4 passes: 4 experts have a larger error than TopK"][""] == "holds"


def test_the_fit_is_least_squares_of_logarithms():
    slope, error, intercept = scaling.fit([1, 10, 100], [2.0, 0.2, 0.02])
    assert (slope, error, math.exp(intercept)) == pytest.approx((-1, 0, 2), abs=1e-9)
    x, y = [1.0, 2.0, 4.0, 8.0, 16.0], [5.0, 4.1, 3.9, 2.8, 2.6]
    slope, error, _ = scaling.fit(x, y)
    (expected, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert slope == pytest.approx(expected)
    assert error == pytest.approx(math.sqrt(covariance[0, 0]))
    assert math.isnan(scaling.fit([1, 2], [2, 1])[1])


def scaling_rows() -> list[dict]:
    """TopK halves its error with every doubling of width, up to 4,096; Switch is a width behind, at a quarter the
    seconds and an eighth of the FLOPs."""
    rows = []
    for i, F in enumerate((1024, 2048, 4096, 8192)):
        error = 0.8 * 0.5**i if F < 8192 else 0.3
        rows.append(
            result(
                **{"experiment": "scaling", "architecture": "sparse_topk", "d_sae": float(F), "n_experts": 1.0},
                **{"fvu": error, "seconds": float(F), "flops_per_activation": float(F)},
            )
        )
        rows.append(
            result(experiment="scaling", d_sae=float(F), fvu=2 * error, seconds=F / 4, flops_per_activation=F / 8)
        )
    return rows


def test_slopes_over_all_widths_and_up_to_the_best():
    found = {(r["family"], r["FVU against"], r["widths"]): r for r in tables.slopes(scaling_rows())}
    for x in ("flops", "seconds"):
        up_to_best = found["TopK", x, "1024 to 4096"]
        assert (up_to_best["slope"], up_to_best["points"], up_to_best["least FVU at width"]) == ("-1", 3, "4096")
        everything = found["TopK", x, "1024 to 8192"]
        slope, error, _ = scaling.fit([1024, 2048, 4096, 8192], [0.8, 0.4, 0.2, 0.3])
        assert (everything["slope"], everything["standard error"]) == (f"{slope:.3g}", f"{error:.3g}")
    untimed = tables.slopes([{**r, "seconds": math.nan} for r in scaling_rows()])
    assert {r["slope"] == "" for r in untimed if r["FVU against"] == "seconds"} == {True}


def test_who_wins_in_seconds_at_equal_error():
    found = {(r["TopK width"], r["family"]): r for r in tables.crossover(scaling_rows())}
    row = found["1024", "Switch, 8 experts"]
    assert (row["width, least seconds"], row["seconds, Switch over TopK"]) == ("2048", "0.5")
    assert (row["width, least FLOPs"], row["FLOPs, Switch over TopK"]) == ("2048", "0.25")
    assert (row["seconds at equal width"], row["FVU at equal width"]) == ("0.25", "2")
    assert found["4096", "Switch, 8 experts"]["width, least seconds"] == "none reaches it"


def test_settings_that_cannot_be_told_from_the_best_are_said():
    rows = [
        result(experiment="coefficient", load_balance_coefficient=c, fvu=e)
        for c, errors in ((0.0, (0.5, 0.6)), (0.3, (0.30, 0.32)), (1.0, (0.31, 0.33)))
        for e in errors
    ]
    (row,) = tables.defaults(rows)
    assert (row["best"], row["not told from it"], row["seeds"]) == ("0.3", "1", 2)
    assert "0: 0.5500 (0.5000 to 0.6000)" in row["FVU of each"]


def test_passes_are_set_beside_the_first_and_beside_topk():
    rows = [
        result(experiment="passes", architecture=a, n_experts=E, passes=n, fvu=e)
        for a, E, n, e in (
            *(("sparse_topk", 1.0, 1.0, 0.4), ("sparse_topk", 1.0, 4.0, 0.2)),
            *(("switch", 8.0, 1.0, 0.5), ("switch", 8.0, 4.0, 0.1)),
        )
    ]
    row = tables.passes(rows)[-1]
    assert (row["SAE"], row["passes"], row["FVU"]) == ("switch, 8", "4", "0.1000")
    assert row["against the fewest passes"].startswith("-80.0%")
    assert row["against TopK, as many passes"].startswith("-50.0%")


def test_the_l0s_reached_are_said():
    rows = [result(architecture="gated", l1_coefficient=3.0, l0=l0, fvu=0.2) for l0 in (14.0, 15.0)]
    (row,) = tables.l0_reached(rows + [result()])
    assert (row["L0 wanted"], row["L0 reached"], row["L1 coefficient"]) == ("16", "14.5 (14.0 to 15.0)", "3")


def swept(architecture: str, E: int, errors: dict[float, float], F: int = 2048, name: str = "fvu") -> list[dict]:
    return [
        {"experiment": "learning rate", "architecture": architecture, "d_sae": F, "n_experts": E, "lr": lr, name: e}
        for lr, e in errors.items()
    ]


def test_the_best_learning_rate_is_that_of_the_nearest_shape():
    rows = swept("switch", 2, {1e-3: 0.3, 3e-3: 0.2}) + swept("switch", 64, {1e-3: 0.1, 3e-3: 0.4})
    rows += swept("switch", 64, {1e-3: 0.3, 9e-3: 0.1}, F=8192)
    rows += swept("standard", 1, {1e-3: 30.0, 3e-3: 20.0}, name="final_loss")
    assert learning_rates.best_lr(rows, "switch", 2048, 4) == 3e-3
    assert learning_rates.best_lr(rows, "switch", 2048, 32) == 1e-3
    assert learning_rates.best_lr(rows, "switch", 2**16, 64) == 9e-3
    assert learning_rates.best_lr(rows, "standard", 2048, 1) == 3e-3


def test_learning_rates_are_multiples_of_the_papers_law():
    rows = [result(**r) for r in swept("switch", 16, {1e-3: 0.3, 2e-3: 0.2, 4e-3: 0.3}, F=16384)]
    (row,) = tables.learning_rates(rows)
    assert row["best"] == "0.002"
    assert row["times 2e-4 / sqrt(F / 2^14)"] == "10.0"
    assert row["times 2e-4 / sqrt(M / 2^14)"] == "2.5"
    assert row["at the edge"] == "no"


def test_what_is_drawn_is_the_mean_and_the_range_of_seeds():
    rows = [
        result(n_experts=float(E), fvu=E / 100 + s / 1000, load_max=E, seed=s, dead_latents=E)
        for E in (2, 4, 8)
        for s in (0.0, 3.0)
    ]
    figure = drawings.experts(rows, [])
    (line,) = (c for c in figure.axes[0].containers)
    points, _, (bars,) = line.lines
    np.testing.assert_allclose(points.get_xydata(), [[2, 0.0215], [4, 0.0415], [8, 0.0815]])
    np.testing.assert_allclose(bars.get_segments()[1], [[4, 0.04], [4, 0.043]])


# What is committed


def test_the_committed_csvs_make_the_committed_tables_and_pictures(tmp_path):
    for name in (*figures.CSVS, "run.json"):
        shutil.copyfile(COMMITTED / name, tmp_path / name)
    figures.main(["--input", str(tmp_path)])
    written = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    assert len(written) > 15
    for file in written - {f for f in written if f.suffix == ".png"}:
        assert (tmp_path / file).read_text() == (COMMITTED / file).read_text(), file
    for file in (f for f in written if f.suffix == ".png"):
        new, old = (matplotlib.image.imread(folder / file) for folder in (tmp_path, COMMITTED))
        assert new.shape == old.shape
        # Other versions of matplotlib and other fonts move a few pixels; a changed point or line is not that few.
        assert np.abs(new - old).mean() < 0.01, file
    assert {p.name for p in COMMITTED.glob("*.png")} == {f.name for f in written if f.suffix == ".png"}
