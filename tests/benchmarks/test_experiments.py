"""The experiments on a small setting: two SAEs, two seeds, a real language model; what decides between cells; what the
tables say; and that the committed results are those of the committed CSVs."""

import argparse
import csv
import json
import math
import shutil
import signal
from pathlib import Path

import cells
import figures
import matplotlib
import matplotlib.image
import numpy as np
import pytest
import run
import tables
import timing
import torch
from helpers import tiny_tokenizer

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "experiments"

RESULTS = [
    *("l0", "mse", "fvu", "final_loss", "ce_recovered", "dead_latents", "load_max", "load_min"),
    *("flops_per_activation", "steps", "tokens"),
]
SHAPE = ["architecture", "d_sae", "n_experts", "k"]
TIMING = [*SHAPE, "seconds_per_step", "low", "high", "rounds", "threads", "batch"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The whole command, on SmolLM2 and Python's documentation."""
    folder = tmp_path_factory.mktemp("experiments")
    options = ["--plan", "tiny", "--tokens", "6000", "--batch", "128", "--held-out", "512", "--eval-contexts", "1"]
    run.main([*options, "--rounds", "2", "--models", str(ROOT / "runs" / "models"), "--output", str(folder)])
    return folder


@pytest.fixture
def own(own_data, tmp_path):
    """The same arguments and data, with an output folder that no other test has written into."""
    args, data = own_data
    return argparse.Namespace(**vars(args) | {"output": tmp_path / "output"}), data


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """Arguments and data of a run on a model and a dataset given by flags."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=128, n_embd=24, n_layer=2, n_head=2, initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text").mkdir()
    words = np.random.default_rng(0).integers(0, 29, (40, 1300))
    lines = [json.dumps({"text": " ".join(f"w{w}" for w in row)}) for row in words]
    (folder / "text" / "train.jsonl").write_text("\n".join(lines))
    model = ["--model", str(folder / "model"), "--hook-name", "transformer.h.0", "--dataset", str(folder / "text")]
    size = ["--plan", "tiny", "--tokens", "3000", "--batch", "64", "--held-out", "512", "--eval-contexts", "2"]
    args = run.parse_args([*model, *size, "--rounds", "3", "--output", str(folder / "output")])
    return args, run.Data.load(args)


# The run


def test_the_csv_holds_every_cell_with_what_was_measured(results):
    with open(results / "results.csv", newline="") as handle:
        assert next(csv.reader(handle)) == tables.SETTINGS + RESULTS
    rows = tables.read(results / "results.csv")
    fixed = tables.of(rows, "fixed width")
    assert {(r["architecture"], r["seed"]) for r in fixed} == {
        *((a, s) for a in ("topk", "sparse_topk", "switch") for s in (0, 1))
    }
    assert {r["seed"] for r in tables.of(rows, "learning rate")} == {cells.TUNING_SEED}
    variance = json.loads((results / "run.json").read_text())["variance_in_model_units"]
    for r in fixed:
        assert r["l0"] == pytest.approx(r["k"], rel=0.01)
        assert 0 < r["fvu"] < 1.2
        assert r["mse"] == pytest.approx(r["fvu"] * variance, rel=0.3)  # the held-out variance is another one
        assert -0.5 < r["ce_recovered"] < 1
        assert r["flops_per_activation"] == 2 * 576 * r["d_sae"] / r["n_experts"] + (
            2 * 576 * r["n_experts"] if r["architecture"] == "switch" else 0
        )
        assert r["load_min"] <= 1 <= r["load_max"]
        assert r["tokens"] == 46 * 128
    stock, ours = (next(r for r in fixed if r["architecture"] == a and r["seed"] == 0) for a in ("topk", "sparse_topk"))
    assert ours["fvu"] == pytest.approx(stock["fvu"], rel=1e-3)
    assert ours["ce_recovered"] == pytest.approx(stock["ce_recovered"], abs=1e-2)


def test_curves_go_down_and_end_at_the_last_step(results):
    curves = tables.read(results / "curves.csv")
    assert {r["experiment"] for r in curves} == {"fixed width"}
    for mine in tables.grouped(curves, "architecture", "seed").values():
        assert [r["step"] for r in mine] == sorted(r["step"] for r in mine)
        assert mine[-1]["step"] == 46
        assert mine[-1]["fvu"] < mine[0]["fvu"]
        assert all(a["flops"] < b["flops"] for a, b in zip(mine, mine[1:], strict=False))


def test_every_shape_drawn_against_seconds_is_timed(results):
    with open(results / "timing.csv", newline="") as handle:
        assert next(csv.reader(handle)) == TIMING
    timed = tables.read(results / "timing.csv")
    assert {(t["architecture"], t["n_experts"]) for t in timed} == {("sparse_topk", 1), ("switch", 4), ("topk", 1)}
    for t in timed:
        assert 0 < t["low"] <= t["seconds_per_step"] <= t["high"]
        assert (t["rounds"], t["batch"], t["threads"]) == (2, 128, torch.get_num_threads())
    rows = tables.with_seconds(tables.read(results / "results.csv"), timed)
    for r in tables.of(rows, "fixed width"):
        (t,) = (t for t in timed if [t[n] for n in SHAPE] == [r[n] for n in SHAPE])
        assert r["seconds"] == 46 * t["seconds_per_step"]


def test_pictures_tables_and_page_are_made_from_the_csvs_alone(results, tmp_path):
    figures.main(["--input", str(results), "--output", str(tmp_path / "first")])
    figures.main(["--input", str(tmp_path / "first"), "--output", str(tmp_path / "second")])
    for name in ("first", "second"):
        folder = tmp_path / name
        assert {p.name for p in folder.glob("*.png")} == {"fixed_width.png", "training.png"}
        assert {p.name for p in (folder / "tables").iterdir()} == {"claims.csv", "learning_rates.csv"}
        page = (folder / "index.html").read_text()
        assert page.count("<img ") == 2
        written = [folder / "results.csv", *(folder / "tables").iterdir()]
        assert page.count("<tr>") == sum(len(f.read_text().splitlines()) for f in written)  # heads are rows, too
    files = [p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*") if p.is_file()]
    assert len(files) > 8
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


# Any model; interruptions


def test_model_hook_and_dataset_can_be_given(own_data):
    args, data = own_data
    assert data.train.shape == (3000, 24)
    assert data.train.square().sum(1).mean() == pytest.approx(24, rel=1e-4)
    x = (data.hidden[:, run.SKIPPED :].flatten(0, 1) - data.centre) * data.scale
    assert data.facts["ce_model"] == pytest.approx(
        data.model.model(data.tokens, labels=data.tokens).loss.item(), rel=1e-5
    )

    def ce_recovered(reconstruct):
        return data.ce_recovered(reconstruct)

    assert ce_recovered(lambda y: y) == pytest.approx(1, abs=1e-4)
    assert ce_recovered(torch.zeros_like) == pytest.approx(0, abs=1e-4)
    assert ce_recovered(lambda y: y.where(y == x, y + 1)) == pytest.approx(1, abs=1e-4)  # it is given what it is for
    saved = args.output / "activations" / "train.pt"
    before = saved.stat().st_mtime_ns
    again = run.Data.load(args)
    assert saved.stat().st_mtime_ns == before
    assert torch.equal(again.train, data.train)


def test_a_model_unit_cell_sees_the_activations_as_they_are(own):
    args, data = own
    cell = cells.Cell("switch", 256, 8, 4, units="model", load_balance_coefficient=1.0)
    row = run.train(cell, data, args, with_ce=False)["row"]
    same = run.train(cells.Cell("switch", 256, 8, 4, load_balance_coefficient=1.0), data, args, with_ce=False)["row"]
    assert row["ce_recovered"] is None
    for r in (row, same):  # both errors are in the model's units
        held_out = data.held_out / data.scale
        variance = (held_out - held_out.mean(0)).square().sum(1).mean().item()
        assert r["mse"] == pytest.approx(r["fvu"] * variance, rel=1e-3)


def test_a_cell_takes_its_passes_and_its_seed(own):
    args, data = own
    once, twice = (
        run.train(cells.Cell("sparse_topk", 256, 8, passes=n), data, args, with_ce=False)["row"] for n in (1, 2)
    )
    assert (once["steps"], twice["steps"]) == (46, 92)
    assert twice["fvu"] < once["fvu"]
    again = run.train(cells.Cell("sparse_topk", 256, 8), data, args, with_ce=False)["row"]
    other = run.train(cells.Cell("sparse_topk", 256, 8, seed=1), data, args, with_ce=False)["row"]
    assert again == once
    assert other["fvu"] != once["fvu"]


def test_interrupted_it_goes_on_where_it_was(own, monkeypatch):
    args, data = own
    folder = args.output / "cells"

    error = run.error

    def interrupted_in_the_third(sae, x):
        # A timer's signal may come anywhere, within tqdm's lock too, which then stays taken for every other thread.
        if len(list(folder.glob("*.json"))) >= 2:
            signal.raise_signal(signal.SIGINT)
        return error(sae, x)

    monkeypatch.setattr(run.Data, "load", lambda _args: data)
    flags = [
        f"--{n.replace('_', '-')}={v}" for n, v in vars(args).items() if v and n not in ("no_timing", "timing_only")
    ]
    with monkeypatch.context() as patched:
        patched.setattr(run, "error", interrupted_in_the_third)
        with pytest.raises(SystemExit, match="the same command goes on"):
            run.main([*flags, "--no-timing"])
    assert not (args.output / "results.csv").exists()
    finished = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.glob("*.json")}
    assert len(finished) == 2
    run.main([*flags, "--no-timing"])
    assert not (args.output / "timing.csv").exists()
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in finished} == finished
    assert len(list(folder.glob("*.json"))) == 8  # two tuned shapes; two seeds of each and of topk
    # A cell that is gone is made again, the same to the digit, and no other.
    table = (args.output / "results.csv").read_text()
    gone, *others = sorted(folder.glob("*.json"))
    gone.unlink()
    kept = [f.stat().st_mtime_ns for f in others]
    run.train_all(args, data)
    assert gone.exists()
    assert [f.stat().st_mtime_ns for f in others] == kept
    assert (args.output / "results.csv").read_text() == table


def test_finished_rounds_of_timing_are_kept(own):
    args, data = own
    timing.time_all(args, data)
    rounds = sorted((args.output / "timing").iterdir())
    assert len(rounds) == 3
    measured = [json.loads(f.read_text())["seconds"] for f in rounds]
    for row, seconds in zip(tables.read(args.output / "timing.csv"), zip(*measured, strict=True), strict=True):
        assert row["seconds_per_step"] == pytest.approx(sorted(seconds)[1], rel=1e-5)
    rounds[1].unlink()
    kept = [rounds[0].read_bytes(), rounds[2].read_bytes()]
    timing.time_all(args, data)
    assert rounds[1].exists()
    assert [rounds[0].read_bytes(), rounds[2].read_bytes()] == kept
    other = json.loads(rounds[0].read_text()) | {"threads": 99}
    rounds[0].write_text(json.dumps(other))
    timing.time_all(args, data)  # of another setting: measured anew
    assert json.loads(rounds[0].read_text())["threads"] == torch.get_num_threads()
    assert timing.quartiles([3, 1, 2, 5, 4]) == (2, 3, 4)
    assert timing.quartiles([7]) == (7, 7, 7)


# What decides


def swept(architecture: str, E: int, errors: dict[float, float], F: int = 2048, name: str = "fvu") -> list[dict]:
    return [
        {"experiment": "learning rate", "architecture": architecture, "d_sae": F, "n_experts": E, "lr": lr, name: e}
        for lr, e in errors.items()
    ]


def test_the_best_learning_rate_is_that_of_the_nearest_shape():
    rows = swept("switch", 2, {1e-3: 0.3, 3e-3: 0.2}) + swept("switch", 64, {1e-3: 0.1, 3e-3: 0.4})
    rows += swept("switch", 64, {1e-3: 0.3, 9e-3: 0.1}, F=8192)
    rows += swept("standard", 1, {1e-3: 30.0, 3e-3: 20.0}, name="final_loss")
    assert cells.best_lr(rows, "switch", 2048, 4) == 3e-3
    assert cells.best_lr(rows, "switch", 2048, 32) == 1e-3
    assert cells.best_lr(rows, "switch", 2**16, 64) == 9e-3
    assert cells.best_lr(rows, "standard", 2048, 1) == 3e-3
    assert cells.best_lr(rows, "gated", 2048, 1) == cells.Cell.lr


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
    assert cells._extended([1e-3, 2e-3], errors) == expected


def test_a_sweep_does_not_go_on_for_ever():
    errors = {1e-3 * 2**i: -i for i in range(30)}
    assert len(cells._extended([1e-3, 2e-3], errors)) == 2 + cells._EXTENSIONS


def l1_rows(coefficients, l0_times_c: float) -> list[dict]:
    return [
        {"experiment": "L1 coefficient", "architecture": "standard", "l1_coefficient": c, "l0": l0_times_c / c}
        for c in coefficients
    ]


def test_the_l1_coefficient_for_an_l0_is_interpolated_on_logarithms():
    rows = l1_rows((0.5, 1.0, 4.0), 100)
    for l0 in (10, 50, 70, 100, 150, 400):
        assert cells.l1_for_l0(rows, "standard", l0) == pytest.approx(100 / l0)


def test_l1_coefficients_go_on_until_their_l0s_enclose_every_k():
    plan = cells.PLANS["default"]  # k from 8 to 32; coefficients of `standard` 4, 8, 16

    def coefficients(rows):
        return [c.l1_coefficient for _, c in cells._l1_coefficients(plan, rows) if c.architecture == "standard"]

    assert coefficients([]) == [4, 8, 16]
    assert coefficients(l1_rows((4, 8, 16), 128)) == [4, 8, 16]
    assert coefficients(l1_rows((4, 8, 16), 100)) == [2, 4, 8, 16]
    assert coefficients(l1_rows((4, 8, 16), 200)) == [4, 8, 16, 32]


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


@pytest.mark.parametrize("name", ["default", "full"])
def test_every_planned_cell_can_be_built(name):
    plan = cells.PLANS[name]
    planned = [c for stage in cells.stages(plan, []) for c in stage]
    for _, cell in planned:
        assert cell.d_sae % cell.n_experts == 0
        assert cell.d_sae // cell.n_experts >= cell.k
        assert cell.weight(576) > 0
    seeds = tables.defaultdict(set)
    for experiment, cell in planned:
        if experiment in ("fixed width", "matched FLOPs") and cell.architecture in ("sparse_topk", "switch"):
            seeds[experiment, cell.shape].add(cell.seed)
    assert min(map(len, seeds.values())) >= 3
    assert {c.n_experts for e, c in planned if e == "fixed width"} == {1, 2, 4, 8, 16, 32, 64}
    assert {c.d_sae for e, c in planned if e == "scaling"} == {2**i for i in range(11, 17)}
    # Every SAE drawn against seconds has its shape timed.
    timed = set(timing.timed_shapes(plan))
    assert {c.shape for e, c in planned if e == "scaling"} <= timed


# What the tables say


def test_seconds_are_steps_times_the_time_of_one():
    timed = [{"architecture": "switch", "d_sae": 2048, "n_experts": 8, "k": 16, "seconds_per_step": 0.5}]
    shape = {"architecture": "switch", "d_sae": 2048, "n_experts": 8, "k": 16}
    point, row, untimed = tables.with_seconds([shape | {"step": 3}, shape | {"steps": 10}, shape | {"k": 8}], timed)
    assert (point["seconds"], row["seconds"]) == (1.5, 5)
    assert math.isnan(untimed["seconds"])


def result(**fields) -> dict:
    """A row of results.csv."""
    plain = {
        **dict.fromkeys(tables.SETTINGS, 0.0),
        **dict.fromkeys(RESULTS, 1.0),
        **{"experiment": "fixed width", "architecture": "switch", "d_sae": 2048.0, "k": 16.0, "n_experts": 8.0},
        **{"gate": "probability", "load_balance_scale": "variance", "units": "unit variance", "seconds": 1.0},
    }
    return plain | fields


def test_seeds_that_overlap_are_no_ordering():
    assert tables.verdict([1.2, 1.3], [1.0, 1.1], 1) == "holds"
    assert tables.verdict([1.2, 1.3], [1.0, 1.1], -1) == "does not hold"
    assert tables.verdict([1.0, 1.2], [1.1, 1.15], 1) == "seeds overlap"
    assert tables.verdict([1.2], [1.0, 1.1], 1) == "holds (one seed)"
    assert tables.change([1.2, 1.3], [1.0, 1.1]) == "+19.0% (+9.1% to +30.0%)"
    assert tables.span([1.0, 2.0, 3.0], 1) == "2.0 (1.0 to 3.0)"
    assert tables.span([1.0], 2) == "1.00"


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
    slope, error, intercept = tables.fit([1, 10, 100], [2.0, 0.2, 0.02])
    assert (slope, error, math.exp(intercept)) == pytest.approx((-1, 0, 2), abs=1e-9)
    x, y = [1.0, 2.0, 4.0, 8.0, 16.0], [5.0, 4.1, 3.9, 2.8, 2.6]
    slope, error, _ = tables.fit(x, y)
    (expected, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert slope == pytest.approx(expected)
    assert error == pytest.approx(math.sqrt(covariance[0, 0]))
    assert math.isnan(tables.fit([1, 2], [2, 1])[1])


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
        slope, error, _ = tables.fit([1024, 2048, 4096, 8192], [0.8, 0.4, 0.2, 0.3])
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
    figure = figures.experts(rows, [])
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
    assert {p.name for p in COMMITTED.rglob("*.png")} == {f.name for f in written if f.suffix == ".png"}


def test_the_committed_results_are_those_of_the_default_plan():
    rows = tables.read(COMMITTED / "results.csv")
    settings = {(r["experiment"], *(r[n] for n in tables.SETTINGS[1:])) for r in rows}
    assert len(settings) == len(rows)
    planned = [c for stage in cells.stages(cells.PLANS["default"], rows) for c in stage]
    for experiment, cell in planned:  # coefficients in the CSV have six digits
        key = [cell.architecture, cell.d_sae, cell.k, cell.n_experts, cell.seed, cell.gate, cell.passes, cell.units]
        names = ["architecture", "d_sae", "k", "n_experts", "seed", "gate", "passes", "units"]
        assert any(r["experiment"] == experiment and [r[n] for n in names] == key for r in rows), (experiment, cell)
    assert {tuple(t[n] for n in SHAPE) for t in tables.read(COMMITTED / "timing.csv")} == set(
        timing.timed_shapes(cells.PLANS["default"])
    )
