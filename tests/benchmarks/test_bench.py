"""The benchmark runs, says what it compared, and refuses to time what does not compute the same."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

SMALL = ["--batch", "64", "--d-in", "48", "--d-sae", "384", "--k", "4", "--experts", "4", "--rounds", "1"]


def test_a_small_benchmark_measures_every_contestant(tmp_path):
    command = [sys.executable, "benchmarks/bench.py", *SMALL, "--output", str(tmp_path / "bench.json")]
    names = ["SAELens topk", "ours: sparse_topk", "all experts, masked, 4 experts", "ours: switch, 4 experts"]
    names[3:3] = ["all experts, masked, 2 of 4 experts", "ours: switch, 2 of 4 experts"]
    names[5:5] = ["all experts, masked, 4 experts and 1 shared", "ours: switch, 4 experts and 1 shared"]
    result = subprocess.run([*command, "--no-memory", "--only", *names], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads((tmp_path / "bench.json").read_text())
    assert list(report["results"]) == names
    for name, row in report["results"].items():
        assert row["step_ms"] > 0
        assert name in result.stdout
    assert report["width"]["ratio"] > 0
    alone = subprocess.run([*command, "--memory-of", names[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(alone.stdout.splitlines()[-1]) > 0
    assert "no GPU" in report["setting"] or os.path.exists("/dev/nvidia0")


def test_a_contestant_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench
    import contestants
    import measurements

    args = bench.parse_args([*SMALL, "--device", "cpu"])
    names = ["SAELens topk", "ours: sparse_topk"]
    measurements.check_closeness(args, names)
    right = contestants.sparse_topk

    def wrong(args):
        sae = right(args)
        sae.W_dec.data *= 1.1
        return sae

    monkeypatch.setattr(contestants, "sparse_topk", wrong)
    with pytest.raises(SystemExit, match="ours: sparse_topk: .* is off from SAELens topk's by a ratio of"):
        measurements.check_closeness(args, names)


def test_near_ties_of_half_precision_are_no_reason_to_stop(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench
    import measurements

    shape = ["--batch", "512", "--d-in", "128", "--d-sae", "4096", "--k", "16", "--experts", "4"]
    args = bench.parse_args([*shape, "--dtype", "bfloat16", "--device", "cpu"])
    assert measurements.precision(args) == "bfloat16"
    measurements.check_closeness(args, ["all experts, masked, 4 experts", "ours: switch, 4 experts"])


def test_latents_that_fired_are_counted_without_reading_how_many(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench
    import contestants

    args = bench.parse_args([*SMALL, "--device", "cpu"])
    ours = contestants.Ours(args, contestants.switch_sae(args, 4))
    expected = torch.zeros(args.d_sae)
    for _ in range(2):
        ours.step()
        expected += 1
        for value, latent in zip(ours.codes.values.flatten(), ours.codes.indices.flatten(), strict=True):
            if value > 0:
                expected[latent] = 0
    assert torch.equal(ours.since_fired, expected)
    assert 0 < (expected == 0).sum() < args.d_sae
