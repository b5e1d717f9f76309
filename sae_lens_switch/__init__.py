"""Switch SAEs for SAELens, with conditional computation that is real; and its TopK SAE on sparse kernels.

Importing this package registers its architectures with SAELens and changes nothing else.
"""

from sae_lens_switch.codes import SparseCodes
from sae_lens_switch.config import (
    LanguageModelSAERunnerConfig,
    SparseTopKTrainingSAEConfig,
    SwitchSAEConfig,
    SwitchTrainingSAEConfig,
)
from sae_lens_switch.optim import scaling_law_lr
from sae_lens_switch.registration import override_topk, register
from sae_lens_switch.runner import LanguageModelSAETrainingRunner
from sae_lens_switch.switch import SwitchSAE, SwitchTrainingSAE
from sae_lens_switch.topk import SparseTopKTrainingSAE

__version__ = "0.1.0"

register()

__all__ = [
    "LanguageModelSAERunnerConfig",
    "LanguageModelSAETrainingRunner",
    "SparseCodes",
    "SparseTopKTrainingSAE",
    "SparseTopKTrainingSAEConfig",
    "SwitchSAE",
    "SwitchSAEConfig",
    "SwitchTrainingSAE",
    "SwitchTrainingSAEConfig",
    "override_topk",
    "scaling_law_lr",
]
