"""Weights of less than float32 that others write to between two steps: their masters follow, in the same memory."""

import pytest
import torch
from helpers import activations, training_sae
from helpers.trainers import our_trainer, run
from sae_lens import LoggingConfig
from torch import Tensor, nn

from sae_lens_switch import SparseSAETrainer

BATCHES = activations(8)


def make_trainer(**fields) -> SparseSAETrainer:
    fields = {"lr": 1e-3, "logger": LoggingConfig(log_to_wandb=False), **fields}
    trainer = our_trainer(training_sae(dtype="bfloat16"), [b.bfloat16() for b in BATCHES], **fields)
    run(trainer, [b.bfloat16() for b in BATCHES])
    return trainer


def master_of(trainer: SparseSAETrainer, p: nn.Parameter) -> Tensor:
    if isinstance(trainer.optimizer, torch.optim.Adam):
        return trainer.optimizer._masters.masters[p]
    return trainer.optimizer.state[p]["master"].T  # of W_enc, which is stepped by latents


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_a_write_between_steps_stays_and_other_weights_keep_what_rounding_hides(optimizer):
    trainer = make_trainer(optimizer=optimizer)
    W, before = trainer.sae.W_enc, master_of(trainer, trainer.sae.W_enc).clone()
    assert (before != W).any()
    with torch.no_grad():
        W[:, :7] = 2.0
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-30
    run(trainer, [BATCHES[0].bfloat16()])
    assert (W[:, :7] == 2).all()
    after = master_of(trainer, W)
    assert (after[:, :7] == 2).all()
    assert torch.equal(after[:, 7:], before[:, 7:])


def test_a_captured_step_finds_the_write_in_the_memory_that_it_reads(monkeypatch):
    """A replay runs no Python: masters must be current before it, where they were when the step was captured."""
    monkeypatch.setattr("sae_lens_switch.training.history.History.is_due", lambda *_: False)
    trainer = make_trainer(cuda_graph=True)
    W, found = trainer.sae.W_dec, []
    address, step = master_of(trainer, W).data_ptr(), trainer._graph.step

    def replayed(x_BD: Tensor):
        master = master_of(trainer, W)
        found.append((master.data_ptr(), torch.equal(master.bfloat16(), W)))
        return step(x_BD)

    trainer._graph.step = replayed
    with torch.no_grad():
        W[3:5] = W[7:9].clone()
    run(trainer, [BATCHES[0].bfloat16()])
    assert found == [(address, True)]
    assert master_of(trainer, W).data_ptr() == address
