"""The main job on the real language model, as a user runs it. The full run is marked slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from sae_lens import SAE

from sae_lens_switch import SwitchSAE

NUMBERS = {
    "explained_variance",
    "mse",
    "l0",
    "ce_loss_without_sae",
    "ce_loss_with_sae",
    "ce_loss_with_ablation",
    "ce_loss_recovered",
    "dead_latents",
    "tokens_per_second",
    "seconds",
}


def run_quickstart(output: Path, *options: str) -> tuple[dict, str]:
    """metrics.json and what was printed, of a run in a process of its own, with all cores."""
    command = [sys.executable, "examples/quickstart.py", "--output", str(output), *options]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((output / "metrics.json").read_text()), result.stdout


def assert_complete(output: Path, metrics: dict, printed: str) -> None:
    assert metrics.keys() == NUMBERS | {"expert_load"}
    assert all(isinstance(metrics[name], (int, float)) for name in NUMBERS)
    assert sum(metrics["expert_load"]) == pytest.approx(1)
    assert {p.name for p in output.iterdir()} == {"sae", "held_out", "summary.png", "metrics.json"}
    assert not list(output.parent.glob(f".{output.name}-*"))  # the working folder is gone
    assert (output / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(SAE.load_from_disk(output / "sae"), SwitchSAE)
    assert f"{metrics['explained_variance']:.4f}" in printed
    assert "fires on" in printed


def test_a_short_run_learns_shares_the_load_and_leaves_everything(tmp_path):
    output = tmp_path / "run"
    metrics, printed = run_quickstart(output, "--tokens", "12800", "--held-out-contexts", "8")
    assert_complete(output, metrics, printed)
    assert len(metrics["expert_load"]) == 8
    assert max(metrics["expert_load"]) < 3 / 8
    assert min(metrics["expert_load"]) > 0
    assert 0 < metrics["l0"] <= 32
    assert metrics["explained_variance"] > 0.3  # 0 at the start: biases in the centre, and no latents that help
    assert metrics["ce_loss_recovered"] > 0.5


@pytest.mark.slow
def test_the_full_run_explains_the_activations_and_recovers_the_loss(tmp_path):
    output = tmp_path / "run"
    metrics, printed = run_quickstart(output)
    assert_complete(output, metrics, printed)
    assert metrics["explained_variance"] >= 0.8
    assert metrics["ce_loss_recovered"] >= 0.95


def test_settings_that_cannot_be_leave_no_files(tmp_path):
    command = [sys.executable, "examples/quickstart.py", "--n-experts", "7", "--output", str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "ValueError: d_sae must be a multiple of n_experts=7; got d_sae=4608" in result.stderr
    assert not list(tmp_path.iterdir())
