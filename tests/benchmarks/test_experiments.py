"""The experiments on a small setting, from text to page: two SAEs, two seeds, a tiny language model; kills; a queue."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import cells
import claiming
import csv_rows
import figures
import measuring
import plans
import pytest
import run
import torch
import training
import worker
from helpers import experiments, kills
from helpers.experiments import PLAN

MEASURED = [
    *("l0", "mse", "fvu", "fvu_other", "final_loss", "ce_recovered", "dead_latents", "load_max", "load_min"),
    *("duplicates", "flops_per_activation", "steps", "step_ms"),
]


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    """What one worker finds when it is left alone."""
    results = experiments.results_of(tmp_path_factory.mktemp("uninterrupted"))
    worker.work(PLAN, cache, results)
    return results


def measured(results: worker.Results) -> list[dict]:
    """Every row without what is timed."""
    rows, curves = results.rows_and_curves(results.planned(PLAN))
    return [{n: v for n, v in row.items() if n != "step_ms"} for row in rows] + curves


@pytest.fixture(scope="module")
def command(folder, tmp_path_factory):
    """The whole command, with two workers."""
    output = tmp_path_factory.mktemp("command")
    source = ["--text", str(folder / "text"), "--model", str(folder / "model"), "--hook-name", experiments.HOOK]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "_POLL_SECONDS", 0.1)
        run.main(["--plan", "tiny", *source, "--output", str(output)])
    return output


# The command


def test_the_csv_holds_every_cell_at_every_budget_with_what_was_measured(command):
    rows = csv_rows.read(command / "results.csv")
    settings = list(cells.Cell("", "switch", 1).settings)
    assert list(rows[0]) == [*settings, "tokens", *MEASURED]
    compared = [r for r in rows if r["experiment"] == "matched FLOPs"]
    assert Counter((r["architecture"], r["seed"]) for r in compared) == {
        (a, s): 2 for a in ("sparse_topk", "switch") for s in (0, 1)
    }
    assert {r["seed"] for r in rows if r["experiment"] == plans.SWEEP} == {cells.TUNING_SEED}
    for r in compared:
        assert (r["l0"], r["steps"]) == (4, r["tokens"] // 64)
        assert 0 < r["fvu"] < 1.2
        assert r["load_min"] <= 1 <= r["load_max"]
        assert r["flops_per_activation"] == 2 * 24 * 32 + (2 * 24 * 2 if r["architecture"] == "switch" else 0)
        assert (r["ce_recovered"] == r["ce_recovered"]) == (r["tokens"] == 4096)  # not nan
    facts = json.loads((command / "run.json").read_text())
    assert facts["kept_out"] == "plays"  # the kind with the least text
    assert facts["texts"]["plays"]["contexts train"] == 0


def test_pictures_tables_and_page_are_made_from_the_csvs_alone(command, tmp_path):
    figures.main(["--input", str(command), "--output", str(tmp_path / "first")])
    figures.main(["--input", str(tmp_path / "first"), "--output", str(tmp_path / "second")])
    first, second = (experiments.files(tmp_path / name) for name in ("first", "second"))
    assert first == second
    assert {name for name in first if name.endswith(".png")} == {"gain.png", "training.png", "experts.png"}
    tables = {
        f"tables/{n}.csv" for n in ("claims", "tokens", "fits", "efficiency", "everything", "learning_rates", "texts")
    }
    assert tables < first.keys()
    page = first["index.html"].decode()
    assert page.count("<img ") == 3
    assert page.count("<tr>") == sum(first[n].decode().count("\n") for n in (*tables, "results.csv"))  # heads, too


def test_the_same_command_again_does_nothing_again(command, folder):
    before = experiments.files(command / "cells") | experiments.files(command / "activations")
    source = ["--text", str(folder / "text"), "--model", str(folder / "model"), "--hook-name", experiments.HOOK]
    args = run.parse_args(["--plan", "tiny", *source, "--output", str(command)])
    cache, of_run = run.prepared(args, plans.PLANS["tiny"])
    assert cache.missing() == []
    results = worker.Results(command / "cells", of_run)
    worker.work(plans.PLANS["tiny"], cache, results)
    assert experiments.files(command / "cells") | experiments.files(command / "activations") == before
    assert "0/" not in run._progress(args, plans.PLANS["tiny"], cache, results)
    assert run._progress(args, plans.PLANS["tiny"], cache, results).endswith("about 0 min left")


def test_a_worker_that_fails_is_told_of_and_takes_the_others_with_it(command, folder, monkeypatch):
    programs = iter(["raise ValueError('no such hook')", "import time; time.sleep(60)"])
    started = []

    def start(_args, log):
        with open(log, "wb") as handle:
            started.append(subprocess.Popen([sys.executable, "-S", "-c", next(programs)], stderr=handle))
        return started[-1]

    monkeypatch.setattr(run, "_started", start)
    monkeypatch.setattr(run, "_POLL_SECONDS", 0.05)
    source = ["--text", str(folder / "text"), "--model", str(folder / "model"), "--hook-name", experiments.HOOK]
    with pytest.raises(SystemExit, match=r"a worker failed(.|\n)*ValueError: no such hook"):
        run.main(["--plan", "tiny", *source, "--output", str(command)])
    assert all(worker.poll() is not None for worker in started)


# The queue


def test_two_workers_take_each_cell_once(cache, uninterrupted, tmp_path, monkeypatch):
    results = experiments.results_of(tmp_path)
    train = training.train

    def noted(cell, layer, folder, *args):
        experiments.say_who(tmp_path / "who", folder.name)
        time.sleep(0.05)  # as long as the other one needs to see that this cell is taken
        train(cell, layer, folder, *args)

    monkeypatch.setattr(training, "train", noted)
    children = [kills.started(lambda: worker.work(PLAN, cache, results)) for _ in range(2)]
    assert [kills.ended(child) for child in children] == [0, 0]
    taken = [p.read_text().split() for p in (tmp_path / "who").iterdir()]
    assert len(taken) == 2
    everything = [name for mine in taken for name in mine]
    assert sorted(everything) == sorted({results.of(c).name for c in results.planned(PLAN)})
    assert measured(results) == measured(uninterrupted)


@pytest.mark.parametrize("save_seconds", [120.0, 0.2])
def test_killed_anywhere_it_goes_on_to_the_same_results(cache, uninterrupted, tmp_path, monkeypatch, save_seconds):
    monkeypatch.setattr(training, "_SAVE_SECONDS", save_seconds)
    results = experiments.results_of(tmp_path)
    n_killed, kept = 0, {}
    for at in (40, 90, 140, 190, 300, 420):
        n_killed += kills.killed(lambda: worker.work(PLAN, cache, results), at=at)
        now = {n: data for n, data in experiments.files(results.folder).items() if re.search(r"/\d+\.json$", n)}
        assert kept.items() <= now.items()  # what was finished is not made again
        kept = now
    assert n_killed > 3
    worker.work(PLAN, cache, results)
    now = experiments.files(results.folder)
    assert kept.items() <= now.items()
    assert measured(results) == measured(uninterrupted)
    assert not [name for name in now if not re.search(r"/\d+\.json$", name)]  # nothing half-made is left


def test_what_a_worker_leaves_that_is_killed_after_its_last_result_is_removed(cache, uninterrupted, tmp_path):
    results = experiments.results_of(tmp_path)
    shutil.copytree(uninterrupted.folder, results.folder)
    whole = experiments.files(results.folder)
    cell = next(results.folder.iterdir())
    (cell / "trunk-12").mkdir()
    for left in ("trunk-12/trainer_state.pt", "curve-12.json"):
        (cell / left).touch()
    assert experiments.files(results.folder) != whole
    worker.work(PLAN, cache, results)
    assert experiments.files(results.folder) == whole


def test_a_result_whose_writing_was_killed_leaves_nothing_once_it_is_written(tmp_path):
    file, n_killed = tmp_path / "cell" / "640.json", 0
    for at in range(6):
        n_killed += kills.killed(lambda at=at: claiming.write(file, {"n": at}), at=at)
    assert n_killed > 2
    claiming.write(file, {"n": 6})
    assert json.loads(file.read_text()) == {"n": 6}
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_claim_is_one_processs_and_ends_with_it(tmp_path):
    def hold():
        with claiming.claimed(tmp_path / "locks", "cell") as mine:
            assert mine
            (tmp_path / "held").touch()
            time.sleep(60)

    child = kills.started(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with claiming.claimed(tmp_path / "locks", "cell") as mine:
        assert not mine
    os.kill(child, 9)
    kills.ended(child)
    with claiming.claimed(tmp_path / "locks", "cell") as mine:
        assert mine


def test_a_worker_ends_when_the_command_that_started_it_is_gone(cache, tmp_path):
    with pytest.raises(SystemExit, match="is gone"):
        worker.work(PLAN, cache, experiments.results_of(tmp_path), parent=1)
    assert not (tmp_path / "cells").exists()


# A cell


@pytest.mark.parametrize("architecture", ["sparse_topk", "switch"])
def test_budgets_trained_together_are_runs_of_their_own(layer, tmp_path, architecture):
    E = 2 if architecture == "switch" else 1
    cell = cells.Cell("", architecture, 32 * E, 4, E, 0, (640, 1280, 1920), lr=2e-3, batch=32)
    training.train(cell, layer, tmp_path / "together")
    together = training.finished(cell, tmp_path / "together")
    assert [f["took"]["steps"] for f in together] == [20, 40 - 16, 60 - 32]  # the shared part is trained once
    assert sum(f["took"]["steps"] for f in together) == cell.steps_trained
    for found in together:
        alone = replace(cell, budgets=(found["tokens"],))
        training.train(alone, layer, tmp_path / f"{found['tokens']}")
        (apart,) = training.finished(alone, tmp_path / f"{found['tokens']}")
        for name in MEASURED[:-1]:
            assert found["row"][name] == apart["row"][name] or name in ("ce_recovered", "duplicates"), name
    steps = [(p["step"], p["falling"]) for f in together for p in f["curve"]]
    assert [s for s, falling in steps if falling] == [20, 40, 60]
    trunk = [s for s, falling in steps if not falling]
    assert trunk == list(range(3, 49, 3))
    assert not list((tmp_path / "together").glob("trunk-*"))


def test_a_cell_takes_its_settings(layer, tmp_path):
    plain = cells.Cell("", "switch", 64, 4, 2, 0, (640,), lr=2e-3, batch=32)
    settings = [{}, {"seed": 1}, {"lr": 1e-3}, {"k": 5}, {"batch": 64}, {"load_balance_coefficient": 3.0}]
    settings += [{"load_balance_warm_up": 0.5}, {"router_start_std": 4.0}, {"router_lr": 9.0}, {"lr_warm_up": 0.2}]
    settings += [{"start": "copies"}, {"start": "shared"}, {"start": "split"}, {"load_balancing": "bias"}]
    settings += [{"n_active_experts": 2}, {"n_active_experts": 2, "gate": "one"}, {"n_shared_experts": 2}]
    settings += [{"router_z_loss_coefficient": 9.0}, {"expert_overlap_coefficient": 9.0}]
    errors = {}
    for i, change in enumerate(settings):
        cell = replace(plain, **change)
        training.train(cell, layer, tmp_path / f"{i}")
        (found,) = training.finished(cell, tmp_path / f"{i}")
        errors[found["row"]["fvu"]] = change
    assert len(errors) == len(settings)
    assert len({replace(plain, **change).key({}) for change in settings}) == len(settings)
    assert replace(plain, experiment="x", budgets=(320, 640)).key({}) == plain.key({})
    assert plain.key({"text": 1}) != plain.key({})


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("standard", {"l1_coefficient": 1.0}),
        ("gated", {"l1_coefficient": 1.0}),
        ("switch", {"n_experts": 2, "d_sae": 64, "aux_loss_coefficient": 0.25}),
    ],
)
def test_baselines_and_auxk_are_trained(layer, tmp_path, monkeypatch, architecture, change):
    monkeypatch.setattr(training, "_DEAD_WINDOW", 3)
    cell = replace(cells.Cell("", architecture, 32, 4, 1, 0, (640, 1280), lr=2e-3, batch=32), **change)
    weaker = replace(cell, **{n: v / 4 for n, v in change.items() if isinstance(v, float)})
    found = []
    for i, one in enumerate((cell, weaker)):
        training.train(one, layer, tmp_path / f"{i}")
        found.append([f["row"] for f in training.finished(one, tmp_path / f"{i}")])
    assert [r["steps"] for r in found[0]] == [20, 40]
    assert found[0][1]["fvu"] < found[0][0]["fvu"] < 1.5
    assert found[0][1]["fvu"] != found[1][1]["fvu"]
    if architecture != "switch":
        assert found[0][1]["l0"] < found[1][1]["l0"]


def test_the_router_has_its_own_learning_rate_until_the_end(layer):
    cell = cells.Cell("", "switch", 64, 4, 2, 0, (640,), lr=2e-3, batch=32, router_lr=4.0)
    trainer = training.make_trainer(cell, layer, 640)
    rates = []
    for _ in range(20):
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
    assert rates[0] == pytest.approx([2e-3, 8e-3])
    assert rates[-2][0] > 0
    assert all(b == pytest.approx(4 * a) for a, b in rates)
    names = {id(p): n for n, p in trainer.sae.named_parameters()}
    of_groups = [{names[id(p)] for p in group["params"]} for group in trainer.optimizer.param_groups]
    assert of_groups[1] == {"W_router", "b_router"}
    assert of_groups[0] | of_groups[1] == set(names.values())


def test_the_ce_loss_recovered_is_1_without_error_and_0_for_the_mean(layer):
    loss = measuring.LanguageModelLoss(layer, 4)
    assert loss.clean == pytest.approx(loss.model.model(loss.tokens, labels=loss.tokens).loss.item(), rel=1e-5)
    assert loss.recovered(lambda x: x) == pytest.approx(1, abs=1e-4)
    assert loss.recovered(torch.zeros_like) == pytest.approx(0, abs=1e-4)
    assert 0 < loss.recovered(lambda x: x / 2) < 1


def test_massive_activations_keep_their_place_when_the_ce_loss_is_measured(layer):
    norms = layer.cache.rows(0, "held_out").float().norm(dim=1)
    few = replace(layer, largest_norm=norms.quantile(0.9).item())
    loss, seen = measuring.LanguageModelLoss(few, 4), []
    assert loss.recovered(lambda x: seen.append(x) or x) == pytest.approx(1, abs=1e-4)
    assert loss.recovered(torch.zeros_like) == pytest.approx(0, abs=1e-4)
    (x,) = seen
    n = loss.tokens.numel() - 2 * len(loss.tokens)
    assert 0.8 * n < len(x) < n
    assert not few.is_massive(x / few.scale + few.centre).any()


def test_the_error_is_that_of_the_dense_latents(layer):
    cell = cells.Cell("", "switch", 64, 4, 2, 0, (640,), lr=2e-3, batch=32)
    sae = training.make_trainer(cell, layer, 640).sae
    x = layer.held_out
    found = measuring.error(sae, x)
    with torch.no_grad():
        latents = sae.encode(x)
        residual = (sae.decode(latents) - x).square().sum()
    assert found["fvu"] == pytest.approx((residual / (x - x.mean(0)).square().sum()).item(), rel=1e-4)
    assert found["l0"] == pytest.approx((latents != 0).sum(1).float().mean().item())
