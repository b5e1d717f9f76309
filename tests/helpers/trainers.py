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


def assert_only_finite_steps_move_thresholds(sae, batches: list[Tensor]) -> None:
    """Of four batches."""
    the_trainer = our_trainer(sae, batches)
    run(the_trainer, batches[:2])
    before = sae.topk_threshold.clone()
    bad = batches[2].clone()
    bad[3, 1] = torch.inf
    run(the_trainer, [bad])
    assert the_trainer.n_skipped_steps == 1
    assert torch.equal(sae.topk_threshold, before)
    run(the_trainer, batches[3:])
    assert not torch.equal(sae.topk_threshold, before)


def topk(sae_class, config_class, dtype: str = "float32", **fields):
    torch.manual_seed(0)
    return sae_class(config_class(**{"d_in": D, "d_sae": F, "k": K, "dtype": dtype, **fields}))
