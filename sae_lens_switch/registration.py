"""Registration with SAELens, which has no entry points: importing the package is what announces it."""

from typing import Any

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAEConfig

from sae_lens_switch.config import SparseTopKTrainingSAEConfig, SwitchSAEConfig, SwitchTrainingSAEConfig
from sae_lens_switch.switch import SwitchSAE, SwitchTrainingSAE
from sae_lens_switch.topk import SparseTopKTrainingSAE


def register() -> None:
    """Register our architectures; a second call does nothing.

    Raises ValueError if another class already holds one of the names.
    """
    # Inference first: a training config looks up its inference config as soon as one is built.
    _register(SAE_CLASS_REGISTRY, register_sae_class, "switch", SwitchSAE, SwitchSAEConfig)
    # What a checkpoint of a sparse_topk run holds is a TopK SAE like any other.
    _register(SAE_CLASS_REGISTRY, register_sae_class, "sparse_topk", TopKSAE, TopKSAEConfig)
    for name, sae_class, config_class in (
        ("switch", SwitchTrainingSAE, SwitchTrainingSAEConfig),
        ("sparse_topk", SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig),
    ):
        _register(SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class, name, sae_class, config_class)


class override_topk:  # noqa: N801, called like a function
    """From now on, SAELens's own ``topk`` trains on sparse kernels: its scripts stay as they are.

    ``with override_topk(): ...`` ends it with the block, ``restore()`` whenever wanted.
    """

    def __init__(self) -> None:
        self._previous = SAE_TRAINING_CLASS_REGISTRY["topk"]
        SAE_TRAINING_CLASS_REGISTRY["topk"] = (SparseTopKTrainingSAE, TopKTrainingSAEConfig)

    def restore(self) -> None:
        SAE_TRAINING_CLASS_REGISTRY["topk"] = self._previous

    def __enter__(self) -> "override_topk":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def _register(registry: dict[str, Any], register: Any, name: str, sae_class: type, config_class: type) -> None:
    if registry.get(name) != (sae_class, config_class):
        register(name, sae_class, config_class)
