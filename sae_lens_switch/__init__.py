"""Switch SAEs for SAELens, with conditional computation that is real; and its TopK SAE on sparse kernels.

Importing this package registers its architectures with SAELens and changes nothing else.
"""

from sae_lens_switch.activations import activation_batches
from sae_lens_switch.checkpoints import CheckpointError
from sae_lens_switch.codes import SparseCodes
from sae_lens_switch.config import (
    LanguageModelSAERunnerConfig,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAEConfig,
    SwitchSAEConfig,
    SwitchTrainingSAEConfig,
    TrainerOptions,
)
from sae_lens_switch.hub import upload_saes_to_huggingface, verified_loader
from sae_lens_switch.optim import scaling_law_lr
from sae_lens_switch.registration import override_topk, register
from sae_lens_switch.runner import (
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
)
from sae_lens_switch.switch import SwitchSAE, SwitchTrainingSAE
from sae_lens_switch.topk import SparseTopKTrainingSAE
from sae_lens_switch.trainer import SparseSAETrainer, TrainingDivergedError

__version__ = "0.1.0"

register()

__all__ = [
    "CheckpointError",
    "LanguageModelSAERunnerConfig",
    "LanguageModelSAETrainingRunner",
    "MultiSAETrainingRunner",
    "SparseCodes",
    "SparseSAETrainer",
    "SparseSAETrainerConfig",
    "SparseTopKTrainingSAE",
    "SparseTopKTrainingSAEConfig",
    "SwitchSAE",
    "SwitchSAEConfig",
    "SwitchTrainingSAE",
    "SwitchTrainingSAEConfig",
    "TrainerOptions",
    "TrainingDivergedError",
    "activation_batches",
    "override_topk",
    "scaling_law_lr",
    "upload_saes_to_huggingface",
    "verified_loader",
]
