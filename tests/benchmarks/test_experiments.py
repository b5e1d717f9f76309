"""The experiments on a small setting: two SAEs, two seeds, a real language model; interruptions; what is committed."""

import argparse
import csv
import json
import shutil
import signal
from pathlib import Path

import cells
import csv_rows
import figures
import matplotlib
import matplotlib.image
import numpy as np
import pytest
import run
import timing
import torch
import train_cells
from helpers import ROOT, tiny_tokenizer
from helpers.experiments import RESULTS

COMMITTED = ROOT / "docs" / "experiments"
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
    return args, train_cells.Data.load(args)


# The run


def test_the_csv_holds_every_cell_with_what_was_measured(results):
    with open(results / "results.csv", newline="") as handle:
        assert next(csv.reader(handle)) == csv_rows.SETTINGS + RESULTS
    rows = csv_rows.read(results / "results.csv")
    fixed = csv_rows.of(rows, "fixed width")
    assert {(r["architecture"], r["seed"]) for r in fixed} == {
        *((a, s) for a in ("topk", "sparse_topk", "switch") for s in (0, 1))
    }
    assert {r["seed"] for r in csv_rows.of(rows, "learning rate")} == {cells.TUNING_SEED}
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
    curves = csv_rows.read(results / "curves.csv")
    assert {r["experiment"] for r in curves} == {"fixed width"}
    for mine in csv_rows.grouped(curves, "architecture", "seed").values():
        assert [r["step"] for r in mine] == sorted(r["step"] for r in mine)
        assert mine[-1]["step"] == 46
        assert mine[-1]["fvu"] < mine[0]["fvu"]
        assert all(a["flops"] < b["flops"] for a, b in zip(mine, mine[1:], strict=False))


def test_every_shape_drawn_against_seconds_is_timed(results):
    with open(results / "timing.csv", newline="") as handle:
        assert next(csv.reader(handle)) == TIMING
    timed = csv_rows.read(results / "timing.csv")
    assert {(t["architecture"], t["n_experts"]) for t in timed} == {("sparse_topk", 1), ("switch", 4), ("topk", 1)}
    for t in timed:
        assert 0 < t["low"] <= t["seconds_per_step"] <= t["high"]
        assert (t["rounds"], t["batch"], t["threads"]) == (2, 128, torch.get_num_threads())
    rows = csv_rows.with_seconds(csv_rows.read(results / "results.csv"), timed)
    for r in csv_rows.of(rows, "fixed width"):
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
    x = (data.hidden[:, train_cells.SKIPPED :].flatten(0, 1) - data.centre) * data.scale
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
    again = train_cells.Data.load(args)
    assert saved.stat().st_mtime_ns == before
    assert torch.equal(again.train, data.train)


def test_a_model_unit_cell_sees_the_activations_as_they_are(own):
    args, data = own
    cell = cells.Cell("switch", 256, 8, 4, units="model", load_balance_coefficient=1.0)
    row = train_cells.train(cell, data, args, with_ce=False)["row"]
    same = train_cells.train(cells.Cell("switch", 256, 8, 4, load_balance_coefficient=1.0), data, args, with_ce=False)[
        "row"
    ]
    assert row["ce_recovered"] is None
    for r in (row, same):  # both errors are in the model's units
        held_out = data.held_out / data.scale
        variance = (held_out - held_out.mean(0)).square().sum(1).mean().item()
        assert r["mse"] == pytest.approx(r["fvu"] * variance, rel=1e-3)


def test_a_cell_takes_its_passes_and_its_seed(own):
    args, data = own
    once, twice = (
        train_cells.train(cells.Cell("sparse_topk", 256, 8, passes=n), data, args, with_ce=False)["row"] for n in (1, 2)
    )
    assert (once["steps"], twice["steps"]) == (46, 92)
    assert twice["fvu"] < once["fvu"]
    again = train_cells.train(cells.Cell("sparse_topk", 256, 8), data, args, with_ce=False)["row"]
    other = train_cells.train(cells.Cell("sparse_topk", 256, 8, seed=1), data, args, with_ce=False)["row"]
    assert again == once
    assert other["fvu"] != once["fvu"]


def test_interrupted_it_goes_on_where_it_was(own, monkeypatch):
    args, data = own
    folder = args.output / "cells"

    error = train_cells.error

    def interrupted_in_the_third(sae, x):
        # A timer's signal may come anywhere, within tqdm's lock too, which then stays taken for every other thread.
        if len(list(folder.glob("*.json"))) >= 2:
            signal.raise_signal(signal.SIGINT)
        return error(sae, x)

    monkeypatch.setattr(train_cells.Data, "load", lambda _args: data)
    flags = [
        f"--{n.replace('_', '-')}={v}" for n, v in vars(args).items() if v and n not in ("no_timing", "timing_only")
    ]
    with monkeypatch.context() as patched:
        patched.setattr(train_cells, "error", interrupted_in_the_third)
        with pytest.raises(SystemExit, match="the same command resumes"):
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
    train_cells.train_all(args, data)
    assert gone.exists()
    assert [f.stat().st_mtime_ns for f in others] == kept
    assert (args.output / "results.csv").read_text() == table


def test_finished_rounds_of_timing_are_kept(own):
    args, data = own
    timing.time_all(args, data)
    rounds = sorted((args.output / "timing").iterdir())
    assert len(rounds) == 3
    measured = [json.loads(f.read_text())["seconds"] for f in rounds]
    for row, seconds in zip(csv_rows.read(args.output / "timing.csv"), zip(*measured, strict=True), strict=True):
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
    rows = csv_rows.read(COMMITTED / "results.csv")
    settings = {(r["experiment"], *(r[n] for n in csv_rows.SETTINGS[1:])) for r in rows}
    assert len(settings) == len(rows)
    planned = [c for stage in cells.stages(cells.PLANS["default"], rows) for c in stage]
    for experiment, cell in planned:  # coefficients in the CSV have six digits
        key = [cell.architecture, cell.d_sae, cell.k, cell.n_experts, cell.seed, cell.gate, cell.passes, cell.units]
        names = ["architecture", "d_sae", "k", "n_experts", "seed", "gate", "passes", "units"]
        assert any(r["experiment"] == experiment and [r[n] for n in names] == key for r in rows), (experiment, cell)
    assert {tuple(t[n] for n in SHAPE) for t in csv_rows.read(COMMITTED / "timing.csv")} == set(
        timing.timed_shapes(cells.PLANS["default"])
    )
