"""Registration with SAELens, which has no entry points: importing the package is what announces it."""

from typing import Any

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)

from sae_lens_switch.config import SwitchSAEConfig, SwitchTrainingSAEConfig
from sae_lens_switch.switch import SwitchSAE, SwitchTrainingSAE


def register() -> None:
    """Register our architectures; a second call does nothing.

    Raises ValueError if another class already holds one of the names.
    """
    # Inference first: a training config looks up its inference config as soon as one is built.
    _register(SAE_CLASS_REGISTRY, register_sae_class, "switch", SwitchSAE, SwitchSAEConfig)
    _register(
        SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class, "switch", SwitchTrainingSAE, SwitchTrainingSAEConfig
    )


def _register(registry: dict[str, Any], register: Any, name: str, sae_class: type, config_class: type) -> None:
    if registry.get(name) != (sae_class, config_class):
        register(name, sae_class, config_class)
