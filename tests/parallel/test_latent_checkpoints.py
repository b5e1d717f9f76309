"""Checkpoints of divided latents: any number of processes resumes, and one command makes a plain topk SAE."""

import json

import pytest
import torch
from helpers import D, F, K
from helpers.command_line import arguments, refusal
from helpers.parallel_runs import BATCH, alone, assert_same_run, command_together, config, go_on_together, tokens
from helpers.processes import on_processes
from helpers.resumed import make_sae
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.topk_sae import TopKSAE

from sae_lens_switch import CheckpointError, SparseTopKTrainingSAE
from sae_lens_switch.common import streamed_safetensors
from sae_lens_switch.converters import sharded_safetensors
from sae_lens_switch.parallel import DataParallelSAETrainer, LatentParallelSAETrainer
from sae_lens_switch.parallel.__main__ import main
from sae_lens_switch.parallel.consolidate import consolidate
from sae_lens_switch.parallel.sharded_files import Whole
from sae_lens_switch.train import main as train

STEPS = 12
TOPK = ["--architecture", "topk", "--d-in", str(D), "--d-sae", str(F), "-k", str(K)]


def run_on(n: int, folder, steps: int = STEPS, sae: dict | None = None, **fields) -> list[dict]:
    def make():
        return make_sae("sparse_topk", **(sae or {}))

    fields = {"latent_parallel": n, **fields}
    return go_on_together(n, folder, (steps, STEPS), make, LatentParallelSAETrainer, **fields)


@pytest.mark.parametrize(
    ("optimizer", "sae"),
    [
        ("adam", {}),
        ("row_sparse_adam", {"normalize_activations": "expected_average_only_in"}),
        pytest.param("row_sparse_adam", {}, marks=pytest.mark.slow),
        pytest.param("adam", {"normalize_activations": "covariance_whitening"}, marks=pytest.mark.slow),
        pytest.param("adam", {"dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumed_on_one_two_and_four_processes_ends_like_one_without_a_stop(optimizer, sae, tmp_path):
    fields = {"optimizer": optimizer, "n_batches_for_norm_estimate": 3}
    expected = alone(STEPS, make=lambda: make_sae("sparse_topk", **sae), **fields)
    for n, until in ((2, 3), (4, 6), (1, 9), (2, STEPS)):
        found = run_on(n, tmp_path / "checkpoints", until, sae, **fields)
    loose = {"rtol": 5e-2, "atol": 5e-2} if "dtype" in sae else {"rtol": 2e-3, "atol": 2e-3}
    for one in found:
        assert_same_run(one, expected, **loose)


def test_a_run_resumed_on_as_many_processes_has_the_same_bits(tmp_path):
    whole = run_on(2, tmp_path / "whole")
    run_on(2, tmp_path / "parts", 5)
    for a, b in zip(whole, run_on(2, tmp_path / "parts"), strict=True):
        assert all(torch.equal(t, b["weights"][name]) for name, t in a["weights"].items())
        assert a["rows"] == b["rows"]


@pytest.mark.parametrize("sae", [{}, {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": False}])
def test_one_command_makes_a_plain_topk_sae_of_a_checkpoint(sae, tmp_path, capsys):
    fields = {"n_checkpoints": 2, "save_final_checkpoint": True, "n_batches_for_norm_estimate": 3}
    (found, _) = run_on(2, tmp_path / "runs", sae=sae, **fields)
    final = tmp_path / "runs" / f"final_{STEPS * BATCH}"
    assert main([str(final), str(tmp_path / "used")]) == 0
    assert main([str(final), str(tmp_path / "trained"), "--for-training"]) == 0
    assert f"saved: {tmp_path / 'used'}" in capsys.readouterr().out
    used, trained = SAE.load_from_disk(tmp_path / "used"), TrainingSAE.load_from_disk(tmp_path / "trained")
    assert isinstance(used, TopKSAE)
    assert isinstance(trained, SparseTopKTrainingSAE)
    assert (used.cfg.architecture(), used.cfg.d_sae, used.cfg.k) == ("topk", F, K)
    assert used.cfg.normalize_activations == trained.cfg.normalize_activations == "none"
    for name, weight in found["weights"].items():
        assert torch.equal(trained.get_parameter(name), weight)
    x = tokens()[:50]
    torch.testing.assert_close(used.encode(x), trained.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(used(x), trained(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "latent_parallel", "sae"),
    [(4, 2, {}), (4, 4, {"dtype": "bfloat16"}), (2, 2, {"rescale_acts_by_decoder_norm": False})],
    ids=str,
)
def test_weights_for_use_are_those_saelens_makes_of_the_whole_sae(n, latent_parallel, sae, tmp_path, monkeypatch):
    """Of rows of processes, which all have the same latents, each writes a part of them."""
    blocks = []
    read = Whole.read

    def watched(whole, name, box):
        blocks.append(read(whole, name, box))
        return blocks[-1]

    monkeypatch.setattr(Whole, "read", watched)

    def make():
        made = make_sae("sparse_topk", **sae)
        with torch.no_grad():
            made.W_dec.mul_(torch.linspace(0.1, 3, F).unsqueeze(1))
            made.W_dec[5] = 0  # which SAELens divides by 1e-8
        return made

    fields = {"latent_parallel": latent_parallel}
    go_on_together(n, tmp_path / "runs", (2, STEPS), make, LatentParallelSAETrainer, **fields)
    (checkpoint,) = (tmp_path / "runs").iterdir()
    trained = TrainingSAE.load_from_disk(consolidate(checkpoint, tmp_path / "trained", for_training=True))
    trained.save_inference_model(tmp_path / "by SAELens")
    expected = SAE.load_from_disk(tmp_path / "by SAELens")
    one = SAE.load_from_disk(consolidate(checkpoint, tmp_path / "one"))
    monkeypatch.setattr(streamed_safetensors, "BLOCK_BYTES", 4 * (D + 1))
    blocks.clear()
    consolidate(checkpoint, tmp_path / "several", max_file_bytes=4 * D * F)
    assert max(block.nbytes for block in blocks) <= 4 * (D + 1) < 4 * F
    assert len(list((tmp_path / "several").glob("*.safetensors"))) >= 2
    several = SAE.load_from_disk(tmp_path / "several", converter=sharded_safetensors)
    for found in (one, several):
        assert found.cfg.to_dict() == expected.cfg.to_dict()
        for name, weight in expected.state_dict().items():
            assert torch.equal(found.get_parameter(name), weight), name
    assert {f.name for f in (tmp_path / "one").iterdir()} >= {"cfg.json", "sae_weights.safetensors"}
    assert not [f for f in (tmp_path / "one").iterdir() if f.is_dir()]


def test_checkpoints_of_undivided_latents_and_of_divided_ones_are_not_confused(tmp_path):
    run_on(2, tmp_path / "divided", 3)

    def resume(trainer_class, folder: str, **fields) -> str:
        cfg = config(STEPS, resume="latest", checkpoint_path=str(tmp_path / folder), **fields)
        with pytest.raises(CheckpointError) as error:
            trainer_class(cfg, make_sae("sparse_topk"), tokens()).fit()
        return str(error.value)

    for message in on_processes(2, lambda: resume(DataParallelSAETrainer, "divided"), tmp_path):
        assert "is of a run with divided latents: resume it with latent_parallel above 1" in message
    alone(STEPS, make=lambda: make_sae("sparse_topk"), checkpoint_path=str(tmp_path / "one"), n_checkpoints=1)
    for message in on_processes(2, lambda: resume(LatentParallelSAETrainer, "one", latent_parallel=2), tmp_path):
        assert "is not of a run with divided experts or latents" in message


# The command


def test_a_topk_sae_is_trained_by_several_resumed_by_others_and_saved_as_an_ordinary_one(tmp_path, model, dataset):
    argv = [*TOPK, *arguments(tmp_path, n_checkpoints=1)]
    assert command_together(2, tmp_path, [*argv, "--latent-parallel", "2"], model, dataset) == [0, 0]
    sae = SAE.load_from_disk(tmp_path / "output")
    assert isinstance(sae, TopKSAE)
    assert (sae.cfg.d_sae, sae.cfg.k, sae.cfg.metadata.model_name) == (F, K, "tiny")
    assert json.loads((tmp_path / "output" / "runner_cfg.json").read_text())["latent_parallel"] == 2
    rows = [json.loads(line) for line in (tmp_path / "output" / "history.jsonl").read_text().splitlines()]
    assert [row["details/n_training_samples"] for row in rows] == [64 * (i + 1) for i in range(6)]
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*/checkpoint.json")
    argv += ["--latent-parallel", "4", "--resume", str(checkpoint.parent)]
    assert command_together(4, tmp_path, argv, model, dataset) == [0] * 4
    rows = [json.loads(line) for line in (tmp_path / "output" / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))


def test_a_command_that_divides_latents_of_another_architecture_is_refused(tmp_path, model, dataset, capsys):
    argv = ["--architecture", "standard", "--d-in", str(D), "--d-sae", str(F), *arguments(tmp_path)]
    assert train([*argv, "--latent-parallel", "2"], override_model=model, override_dataset=dataset) == 1
    assert (
        "latent_parallel must be 1 for a standard SAE, as it divides sparse_topk and sparse_batchtopk"
        in capsys.readouterr().err
    )
    assert "latent_parallel must be" in refusal(capsys, *TOPK, *arguments(tmp_path), "--latent-parallel", "0")
