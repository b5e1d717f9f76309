"""SparseSAETrainer over given batches."""

from itertools import cycle

import torch
from torch import Tensor

from helpers import D, F, K
from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig

FAR = 10**6  # samples: further than any test goes


def our_trainer(sae, batches: list[Tensor], **fields) -> SparseSAETrainer:
    fields = {"total_training_samples": FAR, "train_batch_size_samples": len(batches[0]), "lr": 1e-2, **fields}
    return SparseSAETrainer(SparseSAETrainerConfig(**fields), sae, cycle(batches))


def run(trainer_, batches: list[Tensor]) -> list:
    outputs = []
    for batch in batches:
        outputs.append(trainer_.step(batch))
        trainer_.n_training_steps += 1
    return outputs


def topk(sae_class, config_class, dtype: str = "float32", **fields):
    torch.manual_seed(0)
    return sae_class(config_class(**{"d_in": D, "d_sae": F, "k": K, "dtype": dtype, **fields}))
