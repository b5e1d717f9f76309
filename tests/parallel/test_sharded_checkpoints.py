"""Checkpoints written by several processes: any number of them resumes, and one command makes them ordinary."""

import json
import os
import signal

import pytest
import torch
from helpers.parallel_runs import BATCH, alone, assert_same_run, config, go_on_together, tokens
from helpers.processes import ended_processes, on_processes
from helpers.resumed import make_sae
from sae_lens import SAE, TrainingSAE
from safetensors.torch import load_file

from sae_lens_switch import CheckpointError, init_from
from sae_lens_switch.common import streamed_safetensors
from sae_lens_switch.converters import sharded_safetensors
from sae_lens_switch.parallel import ParallelSparseSAETrainer
from sae_lens_switch.parallel.__main__ import main
from sae_lens_switch.parallel.sharded_files import shapes
from sae_lens_switch.training import checkpoints

STEPS = 12


def run_on(n: int, folder, steps: int = STEPS, sae: dict | None = None, **fields) -> list[dict]:
    def make():
        return make_sae(**(sae or {}))

    fields = {"expert_parallel": n, **fields}
    return go_on_together(n, folder, (steps, STEPS), make, ParallelSparseSAETrainer, **fields)


@pytest.mark.parametrize(
    ("optimizer", "sae"),
    [
        ("adam", {"aux_loss_coefficient": 0.1}),
        ("row_sparse_adam", {}),
        ("adam", {"dtype": "bfloat16"}),
        ("row_sparse_adam", {"dtype": "bfloat16"}),
        ("adam", {"normalize_activations": "expected_average_only_in"}),
        ("row_sparse_adam", {"normalize_activations": "covariance_whitening"}),
    ],
)
def test_a_run_resumed_on_one_two_and_four_processes_ends_like_one_without_a_stop(optimizer, sae, tmp_path):
    fields = {"optimizer": optimizer, "n_batches_for_norm_estimate": 3}
    expected = alone(STEPS, sae, **fields)
    for n, until in ((2, 3), (4, 6), (1, 9), (2, STEPS)):
        found = run_on(n, tmp_path / "checkpoints", until, sae, **fields)
    loose = {"rtol": 3e-2, "atol": 3e-2} if "dtype" in sae else {"rtol": 2e-3, "atol": 2e-4}
    for one in found:
        assert_same_run(one, expected, **loose)


@pytest.mark.parametrize(
    "fields", [{}, {"moments_dtype": "bfloat16"}, {"moments_dtype": "bfloat16", "optimizer": "row_sparse_adam"}]
)
def test_a_run_resumed_on_as_many_processes_has_the_same_bits(fields, tmp_path):
    whole = run_on(2, tmp_path / "whole", **fields)
    run_on(2, tmp_path / "parts", 5, **fields)
    kept = next((tmp_path / "parts").glob("*/optimizer"))
    dtypes = {dtype for name, (_, dtype) in shapes(kept).items() if name.startswith("W_") and "step" not in name}
    assert (torch.bfloat16 in dtypes) == ("moments_dtype" in fields)
    resumed = run_on(2, tmp_path / "parts", **fields)
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(t, b["weights"][name]) for name, t in a["weights"].items())
        assert a["rows"] == b["rows"]


@pytest.mark.parametrize("sae", [{}, {"normalize_activations": "expected_average_only_in"}])
def test_one_command_makes_an_ordinary_folder_of_a_checkpoint(sae, tmp_path, capsys):
    fields = {"n_checkpoints": 2, "save_final_checkpoint": True, "n_batches_for_norm_estimate": 3}
    (found, _) = run_on(2, tmp_path / "runs", sae=sae, **fields)
    final = tmp_path / "runs" / f"final_{STEPS * BATCH}"
    assert main([str(final), str(tmp_path / "used")]) == 0
    assert main([str(final), str(tmp_path / "trained"), "--for-training"]) == 0
    assert f"saved: {tmp_path / 'used'}" in capsys.readouterr().out
    used, trained = SAE.load_from_disk(tmp_path / "used"), TrainingSAE.load_from_disk(tmp_path / "trained")
    assert (used.cfg.architecture(), used.cfg.d_sae, used.cfg.n_experts) == ("switch", 40, 4)
    for name, weight in found["weights"].items():
        assert torch.equal(used.get_parameter(name), weight)
        assert torch.equal(trained.get_parameter(name), weight)
    assert not trained.is_fresh
    assert used.cfg.normalize_activations == "none"


def test_latents_that_were_never_active_are_saved_and_resumed(tmp_path):
    """All of one process's: row-sparse Adam has not stepped them."""

    def make():
        sae = make_sae()
        with torch.no_grad():
            sae.W_router[:, 2:] = -10 * tokens().mean(dim=0).unsqueeze(1)
        return sae

    expected = alone(STEPS, make=make, optimizer="row_sparse_adam")
    fields = {"expert_parallel": 2, "optimizer": "row_sparse_adam"}
    for until in (3, STEPS):
        found = go_on_together(2, tmp_path / "runs", (until, STEPS), make, ParallelSparseSAETrainer, **fields)
    for one in found:
        assert_same_run(one, expected)
    assert (expected["density"][20:] == 0).all()


def test_weights_in_several_files_are_those_in_one(tmp_path, capsys, monkeypatch):
    run_on(2, tmp_path / "runs", 3, sae={"n_active_experts": 2})
    (checkpoint,) = (tmp_path / "runs").iterdir()
    limit = 4 * 40 * 12  # bytes of W_enc, as many as of W_dec
    for flags in ([], ["--for-training"]):
        one, several = (tmp_path / f"{name}{len(flags)}" for name in ("one", "several"))
        assert main([str(checkpoint), str(one), *flags]) == 0
        monkeypatch.setattr(streamed_safetensors, "BLOCK_BYTES", 100)
        assert main([str(checkpoint), str(several), *flags, "--max-file-gb", str(limit / 1e9)]) == 0
        index = json.loads((several / "sae_weights.safetensors.index.json").read_text())
        names = sorted(set(index["weight_map"].values()))
        assert names == [f"sae_weights-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)]
        assert len(names) >= 3
        parts = {name: load_file(several / name) for name in names}
        assert {tensor: name for name, part in parts.items() for tensor in part} == index["weight_map"]
        sizes = [sum(t.nbytes for t in part.values()) for part in parts.values()]
        assert max(sizes) <= limit
        assert sum(sizes) == index["metadata"]["total_size"]
        kind = TrainingSAE if flags else SAE
        whole, found = kind.load_from_disk(one), kind.load_from_disk(several, converter=sharded_safetensors)
        assert found.cfg.to_dict() == whole.cfg.to_dict()
        for name, weight in whole.state_dict().items():
            assert torch.equal(found.state_dict()[name], weight)
    started = init_from(make_sae(n_active_experts=2).cfg, several)
    assert torch.equal(started.W_dec, found.W_dec)

    assert main([str(checkpoint), str(several), "--for-training"]) == 1
    assert "without sae_weights.safetensors.index.json" in capsys.readouterr().err
    assert main([str(checkpoint), str(one), "--max-file-gb", "1e-6"]) == 1
    assert "output must be a folder without sae_weights.safetensors, of" in capsys.readouterr().err
    assert main([str(checkpoint), str(tmp_path / "new"), "--max-file-gb", "0"]) == 1
    assert "max_file_bytes must be positive; got 0.0" in capsys.readouterr().err


def test_a_checkpoint_says_who_wrote_it_and_every_byte_is_checked(tmp_path):
    run_on(2, tmp_path / "runs", 3)
    (checkpoint,) = (tmp_path / "runs").iterdir()
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    files = {f.relative_to(checkpoint).as_posix() for f in checkpoint.rglob("*") if f.is_file()}
    assert manifest["files"].keys() | {"checkpoint.json"} == files
    assert len([name for name in files if name.startswith("weights/")]) == 2
    assert manifest["config"]["sae"]["d_sae"] == 40
    checkpoints.verify(checkpoint)
    shard = sorted((checkpoint / "optimizer").iterdir())[1]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"damaged: optimizer/{shard.name} is not what was written"):
        checkpoints.verify(checkpoint)

    def resume() -> str:
        cfg = config(STEPS, expert_parallel=2, resume=str(checkpoint), checkpoint_path=str(tmp_path / "runs"))
        with pytest.raises(CheckpointError) as error:
            ParallelSparseSAETrainer(cfg, make_sae(), tokens()).fit()
        return str(error.value)

    assert all("SHA-256 differs" in message for message in on_processes(2, resume, tmp_path))


def test_another_configuration_is_refused_on_every_process(tmp_path):
    run_on(2, tmp_path / "runs", 3)

    def resume() -> str:
        cfg = config(STEPS, expert_parallel=2, resume="latest", checkpoint_path=str(tmp_path / "runs"))
        with pytest.raises(CheckpointError) as error:
            ParallelSparseSAETrainer(cfg, make_sae(k=2), tokens()).fit()
        return str(error.value)

    for message in on_processes(2, resume, tmp_path):
        assert "of another configuration" in message
        assert "k was 3, is 2" in message


def test_a_checkpoint_of_one_process_is_refused_with_what_to_do(tmp_path):
    alone(STEPS, checkpoint_path=str(tmp_path / "runs"), n_checkpoints=1)
    (checkpoint,) = (tmp_path / "runs").iterdir()
    assert main([str(checkpoint), str(tmp_path / "out")]) == 1

    def resume() -> str:
        cfg = config(STEPS, expert_parallel=2, resume="latest", checkpoint_path=str(tmp_path / "runs"))
        with pytest.raises(CheckpointError) as error:
            ParallelSparseSAETrainer(cfg, make_sae(), tokens()).fit()
        return str(error.value)

    assert all("is not of a run with divided experts" in message for message in on_processes(2, resume, tmp_path))


def test_one_process_without_torchrun_is_told_what_a_checkpoint_of_several_needs(tmp_path):
    run_on(2, tmp_path / "runs", 3)
    with pytest.raises(CheckpointError, match="is of several processes: resume it under torchrun"):
        alone(STEPS, checkpoint_path=str(tmp_path / "runs"), resume="latest")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before_whole(victim, tmp_path):
    runs = tmp_path / "runs"
    run_on(2, runs, 3)

    def run() -> None:
        cfg = config(STEPS, expert_parallel=2, resume="latest", checkpoint_path=str(runs), n_checkpoints=2)
        trainer = ParallelSparseSAETrainer(cfg, make_sae(), tokens())
        write = trainer._state_beyond_saelens

        def killed() -> dict:
            if trainer.ranks.rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            return write()

        trainer._state_beyond_saelens = killed
        trainer.fit()

    outcomes = ended_processes(2, run, tmp_path)
    assert outcomes[victim] is None
    assert "RankLostError" in outcomes[1 - victim]
    assert checkpoints.latest(runs) == runs / str(3 * BATCH)
    expected = alone(STEPS)
    for found in run_on(4, runs):
        assert_same_run(found, expected, rtol=2e-3, atol=2e-4)


def test_a_disk_that_is_full_for_one_process_ends_no_run(tmp_path):
    def run() -> tuple[int, list[str]]:
        cfg = config(STEPS, expert_parallel=2, checkpoint_path=str(tmp_path / "runs"), n_checkpoints=2)
        trainer = ParallelSparseSAETrainer(cfg, make_sae(), tokens())
        state = trainer._state_beyond_saelens

        def full() -> dict:
            if trainer.ranks.rank == 1 and trainer.n_training_steps < 6:
                raise OSError(28, "No space left on device")
            return state()

        trainer._state_beyond_saelens = full
        trainer.fit()
        return trainer.n_training_steps, sorted(f.name for f in (tmp_path / "runs").iterdir())

    assert on_processes(2, run, tmp_path) == [(STEPS, ["576"])] * 2


def test_routers_that_have_grown_apart_are_found_before_they_are_saved(tmp_path):
    def run() -> str:
        cfg = config(STEPS, expert_parallel=2, checkpoint_path=str(tmp_path / "runs"))
        trainer = ParallelSparseSAETrainer(cfg, make_sae(), tokens())
        trainer.step(next(trainer.data_provider))
        with torch.no_grad():
            trainer.sae.b_router[0] += trainer.ranks.rank * 1e-6
        with pytest.raises(RuntimeError) as error:
            trainer.save_checkpoint("apart")
        return str(error.value)

    assert all("those of rank 1 differ from rank 0's" in message for message in on_processes(2, run, tmp_path))
