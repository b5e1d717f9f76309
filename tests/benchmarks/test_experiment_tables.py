"""What the tables and figures of the experiments say."""

import math

import claims
import csv_rows
import drawings
import gains
import numpy as np
import pandas as pd
import published
import pytest
import tables
from helpers.experiments import measured, swept


def run(architecture: str, E: int, seed: int, errors: dict[float, float], **fields) -> list[dict]:
    """One SAE at several budgets."""
    shape = {"architecture": architecture, "n_experts": E, "d_sae": 2048 * E, "seed": seed}
    return [measured(**shape, tokens=t, mse=e, fvu=e, steps=t / 512, **fields) for t, e in errors.items()]


TOKENS = (250e3, 500e3, 1e6, 2e6, 3e6)


@pytest.fixture
def rows() -> list[dict]:
    """TopK at a power of the tokens, Switch at a steeper one; three seeds with noise."""
    random = np.random.default_rng(0)
    found = []
    for seed in range(3):
        for E, power in ((1, 0.2), (2, 0.25), (4, 0.3)):
            noise = 1 + 0.01 * random.standard_normal(5)
            errors = {t: 0.2 * (t / 4e5) ** -power * n for t, n in zip(TOKENS, noise, strict=True)}
            flops = {"flops_per_activation": 2e6 * (1 + E / 100), "step_ms": 40.0 + 10 * E}
            found += run("sparse_topk" if E == 1 else "switch", E, seed, errors, **flops)
    return found


def test_the_change_at_every_budget_is_what_pandas_says(rows):
    frame = pd.DataFrame(rows)
    means = frame.pivot_table(index="tokens", columns="n_experts", values="mse", aggfunc=["mean", "min", "max"])
    found = {(r["experts"], r["tokens"]): r for r in gains.against_tokens(rows)}
    assert len(found) == 10
    for E in (2.0, 4.0):
        for t in TOKENS:
            at = means.loc[t]
            change = at["mean", E] / at["mean", 1.0] - 1
            low, high = at["min", E] / at["max", 1.0] - 1, at["max", E] / at["min", 1.0] - 1
            row = found[f"{E:.0f}", f"{t:.0f}"]
            assert row["change of the error"] == f"{change:+.1%} ({low:+.1%} to {high:+.1%})"
            apart = at["max", E] < at["min", 1.0] or at["min", E] > at["max", 1.0]
            assert row["smaller than TopK's"] == (
                "seeds overlap" if not apart else "holds" if change < 0 else "does not hold"
            )
            assert row["TopK's FVU"].startswith(f"{at['mean', 1.0]:.4f}")


def test_every_sae_over_its_seeds_is_what_pandas_says(rows):
    frame = pd.DataFrame(rows)
    groups = frame.groupby(["n_experts", "tokens"])["fvu"].agg(["mean", "min", "max"])
    found = tables.everything(rows, [])
    assert len(found) == len(groups)
    for row in found:
        E = float(row["SAE"].split()[-1]) if row["SAE"].startswith("switch") else 1.0
        at = groups.loc[(E, float(row["tokens"]))]
        assert row["FVU"] == f"{at['mean']:.4f} ({at['min']:.4f} to {at['max']:.4f})"


def test_fits_find_the_line_that_the_gain_was_made_of():
    exact = []
    for seed in range(3):
        for E, slope in ((1, 0.0), (8, -0.05)):
            errors = {t: 0.1 * math.exp(slope * math.log10(t / 5e5)) for t in TOKENS}
            exact += run("sparse_topk" if E == 1 else "switch", E, seed, errors)
    (row,) = gains.fits(exact)
    assert row["gain begins at"] == "5e+05"
    assert row["expected at 1e8, line"] == f"{math.exp(-0.05 * math.log10(200)) - 1:+.1%} ± 0.0%"
    assert row["change per tenfold tokens"] == f"{math.exp(-0.05) - 1:+.1%} ± 0.0%"
    assert (row["authors at 8.19e8"], row["greatest misfit of the line"]) == ("-20.9%", "0.0%")


def test_where_a_gain_begins_is_not_extrapolated():
    falling = [(0.5, -0.1), (0.7, -0.1)]  # equal at 1e5 and 1e7
    assert gains.begins(falling, 1e4) == "1e+05 to 1e+07"
    assert gains.begins(falling, 2e5) == "before 2e+05 to 1e+07"
    assert gains.begins([(0.5, -0.1), (0.7, 0.1)], 1e4) == "no gain that grows"


def test_fits_find_the_limit_that_is_approached_as_a_power():
    ratio = [math.exp(-0.2 + 0.1 * (t / 1e6) ** -0.5) for t in TOKENS]
    assert gains.saturating(TOKENS, ratio) == pytest.approx((-0.2, 0.1, 0.5), abs=1e-6)
    slope, intercept = np.polyfit(np.log10(TOKENS), np.log(ratio), 1)
    assert gains.line(TOKENS, ratio) == pytest.approx((intercept, slope))
    assert gains.with_error([0.1, 0.2, 0.3]) == f"+20.0% ± {0.1 / math.sqrt(3):.1%}"


def test_the_tokens_at_which_an_error_is_reached_are_interpolated_on_logarithms():
    errors = [0.4 * (t / 1e5) ** -0.5 for t in (1e5, 4e5, 1.6e6)]
    assert gains.reaching([1e5, 4e5, 1.6e6], errors, 0.3) == pytest.approx(1e5 * (0.4 / 0.3) ** 2)
    assert gains.reaching([1e5, 4e5, 1.6e6], errors, 0.5) == 1e5
    assert gains.reaching([1e5, 4e5, 1.6e6], errors, errors[1]) == 4e5
    assert math.isnan(gains.reaching([1e5, 4e5], errors[:2], 0.1))


def test_sample_efficiency_is_in_tokens_flops_and_seconds_of_whole_runs_and_while_training():
    topk, switch = {1e6: 0.2, 2e6: 0.1}, {1e6: 0.1, 2e6: 0.05}
    found = run("sparse_topk", 1, 0, topk, step_ms=10.0) + run(
        "switch", 8, 0, switch, flops_per_activation=1.5, step_ms=30.0
    )
    curves = [
        r | {"tokens_seen": t, "step": t / 512, "falling": 0.0, "fvu": e}
        for r, errors in ((found[0], {4e5: 0.5, 1.6e6: 0.2}), (found[2], {4e5: 0.2, 1.6e6: 0.1}))
        for t, e in errors.items()
    ] + [found[2] | {"tokens_seen": 1e5, "step": 1.0, "falling": 1.0, "fvu": 0.01}]
    whole, training = gains.efficiency(found, curves)
    parts = [whole[f"part of TopK's {name}"] for name in ("tokens", "FLOPs", "seconds")]
    assert parts == ["0.500", "0.750", "1.500"]
    assert whole["note"].startswith("the fewest tokens measured")
    assert [training[f"part of TopK's {name}"] for name in ("tokens", "FLOPs", "seconds")] == [
        "0.250",
        "0.375",
        "0.750",
    ]
    (claim,) = [r for r in claims.claims(found, curves) if r["topic"] == "sample efficiency"]
    assert claim["holds here"] == "not in a fifth, in 0.500"
    last = [r for r in found if r["tokens"] == 2e6]
    (of_one_length,) = gains.efficiency(last, curves)  # whose end says nothing of fewer tokens
    assert of_one_length["read off"] == "while training"
    (claim,) = [r for r in claims.claims(last, curves) if r["topic"] == "sample efficiency"]
    assert "8 experts reach TopK's error before the learning rate falls in a fifth" in claim["claim"]
    assert claim["holds here"] == "not in a fifth, in 0.250"
    worse = [r | ({"fvu": 0.3} if r["n_experts"] > 1 else {}) for r in found]
    (never, _) = gains.efficiency(worse, curves)
    assert (never["part of TopK's tokens"], never["not reached by"]) == ("not reached", "1 of 1 seeds")
    (claim,) = [r for r in claims.claims(worse, curves) if r["topic"] == "sample efficiency"]
    assert claim["holds here"] == "does not hold: not reached by 1 of 1 seeds"
    assert claim["here"] == "not reached"


def test_claims_stand_beside_the_authors_with_their_tokens(rows):
    rows = rows + [
        r | {"experiment": "fixed width", "d_sae": 2048.0, "mse": 3.0}
        for r in rows
        if r["tokens"] == 1e6 and r["n_experts"] == 4
    ]
    found = {r["claim"]: r for r in claims.claims(rows, [])}
    two = found["matched FLOPs, k 32: 2 experts have a smaller error than TopK"]
    assert (two["authors"], two["tokens"], two["seeds"], two["holds here"]) == (
        "-9.8%",
        "3,000,000",
        "3 and 3",
        "holds",
    )
    frame = pd.DataFrame(rows).query("tokens == 3e6").groupby("n_experts")["mse"].mean()
    assert two["here"].startswith(f"{frame[2.0] / frame[1.0] - 1:+.1%}")
    fixed = found["fixed width, k 32: 4 experts have a larger error than TopK"]
    assert (fixed["tokens"], fixed["holds here"]) == ("1,000,000", "holds")
    assert (
        found["matched FLOPs, k 32: 4 experts have a larger share of dead latents than TopK"]["holds here"]
        == "seeds overlap"
    )


def test_what_the_long_runs_have_measured_takes_the_place_of_the_short_runs(rows, tmp_path):
    none = tmp_path / "none"
    before = published.all_claims(none, rest=none)
    assert {r["tokens"] for r in before} == {"100,000", "4 x 100,000"}
    csv_rows.write_csv(tmp_path / "results.csv", rows)
    (tmp_path / "run.json").write_text('{"plan": "default"}')
    after = published.all_claims(tmp_path, rest=none)
    by_topic = {
        t: {r["command"] for r in after if r["topic"] == t} for t in ("error", "CE loss", "gate", "fixed width")
    }
    long, short = {"`make experiments`"}, {"[short runs](#the-short-runs)"}
    assert by_topic == {"error": long, "CE loss": long, "gate": short, "fixed width": short}
    assert [r for r in after if r["command"] in short] == [
        r for r in before if r["topic"] not in ("error", "CE loss", "dead latents")
    ]


def test_of_runs_that_are_not_over_what_has_all_seeds_is_published(rows, tmp_path):
    some = [r for r in rows if r["n_experts"] != 4 or r["seed"] < 2]
    csv_rows.write_csv(tmp_path / "results.csv", some)
    (tmp_path / "run.json").write_text('{"plan": "rest", "settings": {"seeds": [0, 1, 2]}}')
    found = [r for r in published.all_claims(tmp_path / "none", rest=tmp_path) if "--plan rest" in r["command"]]
    assert {r["claim"].split(" experts")[0] for r in found} == {"matched FLOPs, k 32: 2"}
    assert {r["topic"] for r in found} >= {"error", "CE loss", "dead latents"}


def test_ablations_are_set_beside_the_defaults_of_the_same_seeds():
    plain = [measured(experiment="ablation: AuxK", seed=s, mse=1.0 + s / 100) for s in (0, 1)]
    other = [measured(experiment="ablation: AuxK", seed=s, mse=0.8, aux_loss_coefficient=0.25) for s in (0, 1)]
    (row,) = tables.ablations(plain + other, [])
    assert (row["setting"], row["value"], row["smaller error"]) == ("AuxK", "aux_loss_coefficient 0.25", "holds")
    assert row["change of the error"].startswith("-20.4%")
    assert tables.ablations(other, []) == []  # nothing to set them beside
    assert drawings.settings(other, []) is None


def test_learning_rates_are_set_beside_the_one_that_the_sweep_found():
    plain = [measured(experiment="ablation: learning rate", seed=s, mse=1.0, lr=2e-3) for s in (0, 1)]
    other = [measured(experiment="ablation: learning rate", seed=s, mse=0.9, lr=1e-3) for s in (0, 1)]
    one = plain[0]
    found_by = swept(one["architecture"], one["n_experts"], {1e-3: 0.3, 2e-3: 0.2}, one["d_sae"])
    (row,) = tables.ablations(other + plain + found_by, [])
    assert (row["value"], row["smaller error"]) == ("lr 0.001", "holds")
    assert row["change of the error"].startswith("-10.0%")


def test_the_figure_of_settings_shows_each_change_by_seed():
    plain = [measured(experiment="ablation: AuxK", seed=s, mse=1.0, dead_latents=8.0 + s) for s in (0, 1)]
    changed = [
        measured(experiment="ablation: AuxK", seed=s, mse=mse, dead_latents=2.0, aux_loss_coefficient=0.25)
        for s, mse in enumerate((0.8, 0.9))
    ]
    figure = drawings.settings(plain + changed, [])
    error, dead, _ = figure.axes
    assert [t.get_text() for t in error.get_yticklabels()] == ["AuxK: aux_loss_coefficient 0.25"]
    (mean,) = [line.get_xdata()[0] for line in error.lines if line.get_marker() == "o"]
    assert mean == pytest.approx(-0.15)
    (ends,) = error.collections[0].get_segments()
    assert ends[:, 0].tolist() == pytest.approx([-0.2, -0.1])
    F = plain[0]["d_sae"]
    shown = [line.get_xdata()[0] for line in dead.lines if line.get_marker() == "o"]
    assert shown == pytest.approx([8.5 / F, 2 / F])


def test_what_is_drawn_is_the_mean_and_the_range_of_seeds(rows):
    figure = drawings.gain(rows, [])
    lines = {c.get_label(): c for c in figure.axes[0].containers}
    assert set(lines) == {"sparse_topk", "switch, 2", "switch, 4"}
    points, _, (bars,) = lines["switch, 4"].lines
    frame = pd.DataFrame(rows).query("n_experts == 4").groupby("tokens")["fvu"].agg(["mean", "min", "max"])
    np.testing.assert_allclose(points.get_xydata(), frame["mean"].reset_index().to_numpy())
    np.testing.assert_allclose([s[:, 1] for s in bars.get_segments()], frame[["min", "max"]].to_numpy())
    changes = {c.get_label(): c for c in figure.axes[1].containers}
    assert set(changes) == {"switch, 2", "switch, 4"}
