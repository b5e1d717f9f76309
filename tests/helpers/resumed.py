"""Trainers of a few steps that are resumed."""

import torch
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig

from helpers import D, F, K, activations, training_sae
from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig, SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig

BATCH = 64
SCALED = ["expected_average_only_in", "covariance_whitening"]


def make_sae(architecture: str = "switch", **fields):
    torch.manual_seed(0)
    if architecture == "switch":
        return training_sae(**{"dtype": "float32", **fields})
    if architecture == "standard":
        return StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D, d_sae=F, **fields))
    return SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**{"d_in": D, "d_sae": F, "k": K, **fields}))


def make_trainer(sae, source=None, steps: int = 20, **fields) -> SparseSAETrainer:
    cfg = {"total_training_samples": steps * BATCH, "train_batch_size_samples": BATCH, "lr": 1e-2, **fields}
    return SparseSAETrainer(SparseSAETrainerConfig(**cfg), sae, data() if source is None else source)


def data(n: int = 60, scale: float = 1.0):
    return iter(activations(n, batch=BATCH, scale=scale))
