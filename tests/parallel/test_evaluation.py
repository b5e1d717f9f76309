"""Evaluation while several processes train: of the whole SAE, on each process's own data, while memory suffices."""

import os

import pytest
import torch
from helpers import HOOK, D, F
from helpers.command_line import SWITCH, arguments
from helpers.parallel_runs import as_by_torchrun, config, shared_bits, tokens
from helpers.processes import on_processes
from helpers.resumed import make_sae
from helpers.wandb_runs import history, offline, written
from sae_lens import LoggingConfig

from sae_lens_switch.parallel import DataParallelSAETrainer, LatentParallelSAETrainer, ParallelSparseSAETrainer
from sae_lens_switch.parallel import resumable as resumable_module
from sae_lens_switch.parallel.shard import Shard
from sae_lens_switch.train import main

KINDS = {
    "experts": (ParallelSparseSAETrainer, {"expert_parallel": 2}, "switch"),
    "latents": (LatentParallelSAETrainer, {"latent_parallel": 2}, "sparse_topk"),
    "data": (DataParallelSAETrainer, {}, "sparse_topk"),
}
kinds = pytest.mark.parametrize("kind", KINDS)
STEPS = 8


def trained(kind: str, evaluator=None) -> dict:
    """A run that is evaluated on every fourth step, if at all: what it logs, and the SAE of its end."""
    trainer_class, fields, architecture = KINDS[kind]
    logger = LoggingConfig(wandb_log_frequency=2, eval_every_n_wandb_logs=2)
    cfg = config(STEPS, logger=logger, **fields)
    trainer = trainer_class(cfg, make_sae(architecture), tokens(), evaluator=evaluator)
    trainer._log_train_step = lambda _: None
    logged: dict[int, dict] = {}
    trainer._log = lambda metrics: logged.setdefault(trainer.n_training_steps, {}).update(metrics)
    sae = trainer.fit()
    sae = sae.gathered() if isinstance(sae, Shard) else sae
    weights = {name: p.detach().clone() for name, p in sae.named_parameters()}
    return {"logged": logged, "weights": weights, "buffers": {}, "random": torch.get_rng_state()}


def of_process(sae, _data_provider, _scaler) -> dict:
    rank = torch.distributed.get_rank()
    assert not sae.training
    assert sae.W_dec.shape == (F, D)
    size = sae.W_dec.abs().sum().item()
    return {"ce": {"with_sae": 1.0 + rank, "without": 3.0}, "rank": rank, "size": size, "other": size * (1 + rank)}


@kinds
def test_the_mean_over_all_processes_is_logged_at_saelens_steps(kind, tmp_path):
    first, second = on_processes(2, lambda: trained(kind, of_process), tmp_path)
    with_evaluation = {step: row for step, row in first["logged"].items() if "ce" in row}
    assert sorted(with_evaluation) == [3, 7]
    for step, row in with_evaluation.items():
        assert row["ce"] == {"with_sae": 1.5, "without": 3.0}
        assert row["rank"] == 0.5
        assert row["other"] == pytest.approx(1.5 * row["size"])  # both have the same SAE
        assert "weights/W_dec_norms" in row
        assert second["logged"][step]["ce"] == row["ce"]
    # The last one is that of the end.
    assert with_evaluation[7]["size"] == pytest.approx(first["weights"]["W_dec"].abs().sum().item(), rel=1e-5)


@kinds
def test_a_run_is_the_same_with_and_without_evaluation(kind, tmp_path):
    evaluated = on_processes(2, lambda: trained(kind, of_process), tmp_path / "a")
    alone = on_processes(2, lambda: trained(kind), tmp_path / "b")
    for a, b in zip(evaluated, alone, strict=True):
        assert shared_bits(a) == shared_bits(b)
        assert torch.equal(a["random"], b["random"])
        assert not any("ce" in row for row in b["logged"].values())


def test_a_process_out_of_memory_ends_the_evaluations_and_not_the_run(tmp_path, caplog):
    def run() -> tuple[int, bool, list[str]]:
        calls = []

        def full(*_) -> dict:
            calls.append(1)
            if torch.distributed.get_rank() == 1:
                raise torch.OutOfMemoryError("none left")
            return {"ce": 1.0}

        found = trained("experts", full)
        return len(calls), any("ce" in row for row in found["logged"].values()), caplog.messages

    first, second = on_processes(2, run, tmp_path)
    assert first[:2] == second[:2] == (1, False)
    assert sum("there is no evaluation by the language model" in message for message in first[2]) == 1


def test_an_sae_that_one_process_cannot_hold_is_not_put_together(tmp_path, monkeypatch):
    whole = 2 * 4 * D * F  # W_enc and W_dec

    def run(first: float) -> int:
        free = first if torch.distributed.get_rank() == 0 else 1e12
        monkeypatch.setattr(resumable_module, "free_memory", lambda _: free)
        calls = []
        trained("experts", lambda *_: calls.append(1) or {})
        return len(calls)

    assert on_processes(2, lambda: run(2.0 * whole), tmp_path / "a") == [0, 0]
    assert on_processes(2, lambda: run(2.0 * whole + 1), tmp_path / "b") == [2, 2]


def test_an_sae_for_which_one_process_lacks_memory_after_all_ends_the_evaluations(tmp_path, monkeypatch, caplog):
    new_whole = Shard.new_whole

    def run() -> tuple[int, list[str]]:
        calls, attempts = [], []

        def full_at_first(shard):
            attempts.append(1)
            if torch.distributed.get_rank() == 1 and len(attempts) == 1:
                raise torch.OutOfMemoryError("none left")
            return new_whole(shard)

        monkeypatch.setattr(Shard, "new_whole", full_at_first)
        trained("experts", lambda *_: calls.append(1) or {})
        return len(calls), caplog.messages

    (first, said), (second, _) = on_processes(2, run, tmp_path)
    assert (first, second) == (0, 0)
    assert sum("there is no evaluation by the language model" in message for message in said) == 1


@pytest.mark.parametrize(
    "sae",
    [
        [*SWITCH, "--expert-parallel", "2"],
        ["--architecture", "topk", "--d-in", str(D), "--d-sae", str(F), "--k", "3"],
        [*("--architecture", "switch_transcoder"), *SWITCH[2:], "--hook-name-out", HOOK, "--expert-parallel", "2"],
    ],
    ids=["experts", "data", "experts of a transcoder"],
)
def test_the_command_logs_the_language_models_losses(sae, tmp_path, model, dataset):
    logging = ["--log-to-wandb", "true", "--wandb-log-frequency", "2", "--eval-every-n-wandb-logs", "2"]
    argv = [*sae, *arguments(tmp_path)[:-2], *logging]

    def command() -> int:
        as_by_torchrun()
        folder = tmp_path / f"wandb-{os.environ['RANK']}"
        folder.mkdir()
        with offline(folder):
            return main(argv, override_model=model, override_dataset=dataset)

    assert on_processes(2, command, tmp_path) == [0, 0]
    rows = history(written(tmp_path / "wandb-0"))
    found = {step: row["model_performance_preservation"] for step, row in rows.items() if "shrinkage" in row}
    assert sorted(found) == [3]
    assert 0 < found[3]["ce_loss_with_sae"] < 20
    assert not list((tmp_path / "wandb-1").glob("wandb/offline-run-*"))
