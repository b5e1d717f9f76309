"""Whole steps under autocast on Triton: the copies that its kernels write are those that its products read."""

from contextlib import nullcontext

import pytest
import torch
from helpers import E, activations, training_sae
from helpers.copies import watch_copies
from helpers.trainers import our_trainer, run, topk
from helpers.triton_checks import DEVICE
from sae_lens import LoggingConfig
from sae_lens_switch_kernels import WorkingCopies, backend, products

from sae_lens_switch import SparseSAETrainer, SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig

pytest.importorskip("triton")

BATCHES = [batch.to(DEVICE) for batch in activations(3, batch=9)]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """Without the kernels' self-checks, which take longer than the steps: none gives way to its plain form."""
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "triton")
    monkeypatch.setattr(products, "_DENSE_UP_TO", {DEVICE: 10**9})
    monkeypatch.setattr(backend, "_proven", lambda *_: True)


def make_trainer(architecture: str, optimizer: str) -> SparseSAETrainer:
    if architecture == "switch":
        sae = training_sae(dtype="float32", device=DEVICE, n_experts=E)
    else:
        fields = {"aux_loss_coefficient": 0.0, "device": DEVICE}
        sae = topk(SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, **fields)
    options = {"autocast": True, "device": DEVICE, "logger": LoggingConfig(log_to_wandb=False)}
    return our_trainer(sae, BATCHES, optimizer=optimizer, **options)


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
@pytest.mark.parametrize("architecture", ["switch", "sparse_topk"])
def test_losses_are_those_of_casts_and_every_copy_is_written_by_a_kernel(architecture, optimizer, monkeypatch):
    asked = watch_copies(monkeypatch)
    ours, plain = (make_trainer(architecture, optimizer) for _ in range(2))
    losses = [o.loss for o in run(ours, BATCHES)]
    assert asked
    current = [copy.is_current for copy in ours.optimizer.copies._copies if copy.numbers is not None]
    assert current
    assert all(current)
    monkeypatch.setattr(WorkingCopies, "offered", lambda _: nullcontext())
    assert losses == [o.loss for o in run(plain, BATCHES)]
    for p, q in zip(ours.sae.parameters(), plain.sae.parameters(), strict=True):
        assert torch.equal(p, q)
