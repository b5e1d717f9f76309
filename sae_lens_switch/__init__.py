"""Switch SAEs for SAELens, with conditional computation that is real.

Importing this package registers its architectures with SAELens and changes nothing else.
"""

from sae_lens_switch.codes import SparseCodes
from sae_lens_switch.config import (
    LanguageModelSAERunnerConfig,
    SwitchSAEConfig,
    SwitchTrainingSAEConfig,
)
from sae_lens_switch.optim import scaling_law_lr
from sae_lens_switch.registration import register
from sae_lens_switch.runner import LanguageModelSAETrainingRunner
from sae_lens_switch.switch import SwitchSAE, SwitchTrainingSAE

__version__ = "0.1.0"

register()

__all__ = [
    "LanguageModelSAERunnerConfig",
    "LanguageModelSAETrainingRunner",
    "SparseCodes",
    "SwitchSAE",
    "SwitchSAEConfig",
    "SwitchTrainingSAE",
    "SwitchTrainingSAEConfig",
    "scaling_law_lr",
]
