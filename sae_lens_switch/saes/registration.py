"""Registration with SAELens, which has no entry points: importing the package is what announces it."""

import threading
from typing import Any, ClassVar

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAEConfig

from sae_lens_switch.saes.config import SparseTopKTrainingSAEConfig, SwitchSAEConfig, SwitchTrainingSAEConfig
from sae_lens_switch.saes.sparse_topk_sae import SparseTopKTrainingSAE
from sae_lens_switch.saes.switch_sae import SwitchSAE
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE


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


_OVERRIDE: Any = (SparseTopKTrainingSAE, TopKTrainingSAEConfig)


class override_topk:  # noqa: N801, called like a function
    """From now on, SAELens's own ``topk`` trains on sparse kernels: its scripts stay as they are.

    ``with override_topk(): ...`` ends it with the block, ``restore()`` whenever wanted. It holds for the whole process,
    since SAELens has one table of classes for all threads; of several that overlap, until the last has ended.
    """

    _lock = threading.Lock()
    _active: ClassVar[set["override_topk"]] = set()
    _stock: ClassVar[Any] = None

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        with self._lock:
            if not self._active:
                type(self)._stock = SAE_TRAINING_CLASS_REGISTRY["topk"]
            self._active.add(self)
            SAE_TRAINING_CLASS_REGISTRY["topk"] = _OVERRIDE

    def restore(self) -> None:
        """End this one; a second call does nothing."""
        with self._lock:
            ends = self in self._active
            self._active.discard(self)
            # What others have registered since is theirs.
            if ends and not self._active and SAE_TRAINING_CLASS_REGISTRY["topk"] == _OVERRIDE:
                SAE_TRAINING_CLASS_REGISTRY["topk"] = self._stock

    def __enter__(self) -> "override_topk":
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def _register(registry: dict[str, Any], register: Any, name: str, sae_class: type, config_class: type) -> None:
    if registry.get(name) != (sae_class, config_class):
        register(name, sae_class, config_class)
