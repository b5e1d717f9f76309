"""What is read of a source of activations, and trainers over it."""

import itertools

import torch
from torch import Tensor

from helpers import D, training_sae
from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig

exactly = {"rtol": 0, "atol": 0}


def take(n: int, batches) -> list[Tensor]:
    return list(itertools.islice(batches, n))


def rows(n: int) -> Tensor:
    """Row i is i in every entry."""
    return torch.arange(float(n))[:, None].expand(n, D)


def numbers(batches: list[Tensor]) -> list[int]:
    x_ND = torch.cat(batches)
    assert (x_ND == x_ND[:, :1]).all()
    return x_ND[:, 0].int().tolist()


def our_trainer(source, sae=None, n_steps: int = 8, batch: int = 64, **fields) -> SparseSAETrainer:
    fields = {"total_training_samples": n_steps * batch, "train_batch_size_samples": batch, "lr": 1e-2, **fields}
    return SparseSAETrainer(SparseSAETrainerConfig(**fields), sae or training_sae(), source)


def losses(the_trainer) -> list[float]:
    """Of the steps of ``fit``."""
    step, seen = the_trainer.step, []

    def remember(batch):
        output = step(batch)
        seen.append(output.losses["mse_loss"].item())
        return output

    the_trainer.step = remember
    the_trainer.fit()
    return seen
