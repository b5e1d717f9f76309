"""The benchmark of inference runs, its table can be published, and what reconstructs something else is not timed."""

import json
import subprocess
import sys

import inference
import publish
import pytest
import torch
from helpers import ROOT

import sae_lens_switch

SMALL = ["--batch", "64", "--d-in", "48", "--d-sae", "384", "--k", "4", "--active", "8", "--rounds", "1"]
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_small_benchmark_measures_time_and_memory_and_fills_its_table(tmp_path, monkeypatch):
    command = [sys.executable, "benchmarks/inference.py", *SMALL, "--output", str(tmp_path / "inference.json")]
    result = subprocess.run([*command, "--architectures", "jumprelu"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    row = json.loads((tmp_path / "inference.json").read_text())["results"]["jumprelu"]
    assert min(row["SAELens_ms"], row["sparse_ms"], row["time_ratio"]) > 0
    assert row["memory_ratio"] is not None
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    assert f"| `jumprelu` | {row['SAELens_ms']:,.0f} ms |" in publish.BLOCKS["inference"]()


@torch.no_grad()
@pytest.mark.parametrize("name", inference.CHANGES)
def test_about_as_many_latents_are_active_as_is_said_and_others_are_not_timed(name, monkeypatch):
    args = inference.parse_args([*SMALL, "--device", "cpu"])
    sae, x = inference.sae_of(args, name), inference.batch(args)
    inference.check(args, name, sae, x)
    n_active = (sae.encode(x) != 0).sum(1).double().mean()
    assert n_active == 4 if "topk" in name else 6 < n_active < 10
    right = sae_lens_switch.decode_sparse
    monkeypatch.setattr(sae_lens_switch, "decode_sparse", lambda sae, codes: 1.1 * right(sae, codes))
    with pytest.raises(SystemExit, match=f"{name}: the sparse reconstruction is off by a ratio of 0.1"):
        inference.check(args, name, sae, x)
