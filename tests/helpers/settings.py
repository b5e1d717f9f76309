"""Settings that are wrong, and configs that are not."""

from typing import Any

from helpers import D, E, F, K
from sae_lens_switch import SparseSAETrainerConfig

SIZES = {"d_in": D, "d_sae": F, "n_experts": E, "k": K}
LENGTH = {"total_training_samples": 96, "train_batch_size_samples": 8}


def trainer_config(**given: Any) -> SparseSAETrainerConfig:
    return SparseSAETrainerConfig(**(LENGTH | given))
