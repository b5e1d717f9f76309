"""The train command on several processes: what they read, leave, say, and resume from."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import E, K, activations
from helpers.command_line import SWITCH, arguments
from helpers.parallel_runs import as_by_torchrun, command_together
from helpers.processes import PATIENCE, on_processes
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.topk_sae import TopKSAE
from safetensors.torch import load_file

from sae_lens_switch import SwitchSAE
from sae_lens_switch.parallel import LatentParallelSAETrainer
from sae_lens_switch.parallel import runner as runner_module
from sae_lens_switch.parallel.trainer import ParallelSparseSAETrainer
from sae_lens_switch.train import main
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.trainer import SparseSAETrainer


@pytest.mark.parametrize(("n", "expert_parallel"), [(2, 2), (4, 2)])
def test_a_switch_sae_is_trained_by_several_and_saved_as_an_ordinary_one(n, expert_parallel, tmp_path, model, dataset):
    argv = [*SWITCH, *arguments(tmp_path, n_checkpoints=1), "--expert-parallel", str(expert_parallel)]
    assert command_together(n, tmp_path, argv, model, dataset) == [0] * n
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*/checkpoint.json")
    checkpoints.verify(checkpoint.parent)
    sae = SAE.load_from_disk(tmp_path / "output")
    assert isinstance(sae, SwitchSAE)
    assert (sae.cfg.n_experts, sae.cfg.k, sae.cfg.metadata.model_name) == (E, K, "tiny")
    assert sae.cfg.metadata.training_architecture_details["bias_start"] == "geometric_median"
    assert len(load_file(tmp_path / "output" / "sparsity.safetensors")["sparsity"]) == sae.cfg.d_sae
    assert json.loads((tmp_path / "output" / "runner_cfg.json").read_text())["expert_parallel"] == expert_parallel
    rows = [json.loads(line) for line in (tmp_path / "output" / "history.jsonl").read_text().splitlines()]
    assert [row["details/n_training_samples"] for row in rows] == [64 * (i + 1) for i in range(6)]
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_any_other_sae_is_trained_by_several_that_divide_the_data(tmp_path, model, dataset):
    argv = ["--architecture", "topk", "--d-in", "12", "--d-sae", "40", "-k", "3", *arguments(tmp_path)]
    assert command_together(2, tmp_path, argv, model, dataset) == [0, 0]
    assert isinstance(SAE.load_from_disk(tmp_path / "output"), TopKSAE)


def test_a_batchtopk_sae_is_trained_on_the_batch_of_all_processes(tmp_path, model, dataset):
    argv = ["--architecture", "batchtopk", "--d-in", "12", "--d-sae", "40", "-k", "3", *arguments(tmp_path)]
    sent = []

    def command() -> set[str]:
        as_by_torchrun()
        fit = LatentParallelSAETrainer.fit

        def watched(trainer):
            trained = fit(trainer)
            sent.extend(what for what, n_bytes in trainer.ranks.bytes_sent.items() if n_bytes)
            return trained

        LatentParallelSAETrainer.fit = watched
        assert main(argv, override_model=model, override_dataset=dataset) == 0
        return set(sent)

    for found in on_processes(2, command, tmp_path):
        assert found >= {"candidates", "the least active latent"}
        assert "tokens" not in found  # which stay where they are
    assert isinstance(SAE.load_from_disk(tmp_path / "output"), JumpReLUSAE)


def test_each_process_reads_its_own_part_of_the_dataset(tmp_path, model, dataset, monkeypatch):
    forward, seen = ParallelSparseSAETrainer._forward, []

    def noting(self, x_BD, *rest):
        seen.append(x_BD.clone())
        if len(seen) == 6:
            torch.save(torch.cat(seen), tmp_path / f"seen-{self.ranks.rank}.pt")
        return forward(self, x_BD, *rest)

    monkeypatch.setattr(ParallelSparseSAETrainer, "_forward", noting)
    command_together(2, tmp_path, [*SWITCH, *arguments(tmp_path), "--expert-parallel", "2"], model, dataset)
    first, second = (torch.load(tmp_path / f"seen-{rank}.pt") for rank in range(2))
    assert len(first) == len(second) == 6 * 32
    assert (torch.cdist(first, second) < 1e-4).any(dim=1).float().mean() < 0.5


def test_a_run_that_is_interrupted_on_one_process_resumes_on_both(tmp_path, model, dataset, monkeypatch):
    step = SparseSAETrainer._train_step

    def interrupting(self, **kwargs):
        if self.n_training_steps == 2 and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, **kwargs)

    argv = [*SWITCH, *arguments(tmp_path), "--expert-parallel", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(SparseSAETrainer, "_train_step", interrupting)
        assert command_together(2, tmp_path, argv, model, dataset) == [130, 130]
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*/checkpoint.json")
    assert json.loads(checkpoint.read_text())["n_training_samples"] == 4 * 64
    assert command_together(2, tmp_path, [*argv, "--resume", "latest"], model, dataset) == [0, 0]
    rows = [json.loads(line) for line in (tmp_path / "output" / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))


def test_a_run_resumes_on_another_number_of_processes_beyond_what_was_read(tmp_path, model, dataset, monkeypatch):
    argv = [*SWITCH, *arguments(tmp_path, n_checkpoints=1)]
    assert command_together(4, tmp_path, [*argv, "--expert-parallel", "4"], model, dataset) == [0] * 4
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*/checkpoint.json")
    read = [
        int(load_file(file)["n_dataset_processed"])
        for file in checkpoint.parent.glob("ranks/*/activations_store_state.safetensors")
    ]
    returned = runner_module.return_to_place

    def noting(store, path, ranks):
        returned(store, path, ranks)
        torch.save(store.n_dataset_processed, tmp_path / f"place-{ranks.rank}.pt")

    monkeypatch.setattr(runner_module, "return_to_place", noting)
    argv += ["--expert-parallel", "2", "--resume", str(checkpoint.parent)]
    assert command_together(2, tmp_path, argv, model, dataset) == [0, 0]
    assert len(read) == 4
    assert [torch.load(tmp_path / f"place-{rank}.pt") for rank in range(2)] == [sum(read) // 2] * 2


def test_one_process_is_told_to_use_torchrun(tmp_path, capsys, model, dataset, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    argv = [*SWITCH, *arguments(tmp_path), "--expert-parallel", "2"]
    assert main(argv, override_model=model, override_dataset=dataset) == 1
    assert "must be started by torchrun" in capsys.readouterr().err


def test_torchrun_restarts_a_run_of_which_a_process_was_killed(tmp_path):
    torch.save(torch.cat(activations(5)), tmp_path / "activations.pt")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, torch
            from sae_lens_switch import SparseSAETrainerConfig, SwitchTrainingSAE, SwitchTrainingSAEConfig
            from sae_lens_switch.parallel import ParallelSparseSAETrainer

            torch.manual_seed(0)
            sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=12, d_sae=40, n_experts=4, k=3))
            cfg = SparseSAETrainerConfig(
                total_training_samples=12 * 64, train_batch_size_samples=64, expert_parallel=2, resume="latest",
                checkpoint_path="checkpoints", n_checkpoints=3, save_final_checkpoint=True, device="cpu",
            )
            trainer = ParallelSparseSAETrainer(cfg, sae, torch.load("activations.pt"))
            receive = trainer.sae.receive

            def killed_once(x_BD):
                if trainer.n_training_steps == 8 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                    if trainer.ranks.rank == 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                return receive(x_BD)

            trainer.sae.receive = killed_once
            trainer.fit()
            if trainer.ranks.is_first:
                print("restarts", os.environ["TORCHELASTIC_RESTART_COUNT"], "steps", trainer.n_training_steps)
            torch.distributed.destroy_process_group()
            """
        )
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "restarts 1 steps 12" in done.stdout
    assert "resumed from checkpoints/" in done.stderr or (tmp_path / "checkpoints" / "final_768").is_dir()
