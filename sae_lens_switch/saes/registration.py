"""Registration with SAELens, which has no entry points: importing the package is what announces it."""

import threading
from typing import Any, ClassVar, Self

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig, AbsTopKTrainingSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAEConfig

from sae_lens_switch.saes.config import (
    SparseAbsTopKTrainingSAEConfig,
    SparseBatchTopKTrainingSAEConfig,
    SparseMatryoshkaBatchTopKTrainingSAEConfig,
    SparseTopKTrainingSAEConfig,
    SwitchSAEConfig,
    SwitchTrainingSAEConfig,
)
from sae_lens_switch.saes.sparse_batchtopk_sae import SparseBatchTopKTrainingSAE
from sae_lens_switch.saes.sparse_matryoshka_sae import SparseMatryoshkaBatchTopKTrainingSAE
from sae_lens_switch.saes.sparse_topk_sae import SparseAbsTopKTrainingSAE, SparseTopKTrainingSAE
from sae_lens_switch.saes.sparse_topk_transcoder import (
    SparseBatchTopKTrainingTranscoder,
    SparseTopKTrainingTranscoder,
    SparseTopKTranscoder,
)
from sae_lens_switch.saes.switch_sae import SwitchSAE
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE
from sae_lens_switch.saes.switch_transcoder import SwitchTrainingTranscoder, SwitchTranscoder
from sae_lens_switch.saes.transcoder_config import (
    SparseBatchTopKTrainingTranscoderConfig,
    SparseTopKTrainingTranscoderConfig,
    SparseTopKTranscoderConfig,
    SwitchTrainingTranscoderConfig,
    SwitchTranscoderConfig,
)


def register() -> None:
    """Register our architectures; a second call does nothing.

    Raises ValueError if another class already holds one of the names.
    """
    # Inference first: a training config looks up its inference config as soon as one is built.
    _register(SAE_CLASS_REGISTRY, register_sae_class, "switch", SwitchSAE, SwitchSAEConfig)
    # What a checkpoint of such a run holds is a TopK SAE like any other.
    _register(SAE_CLASS_REGISTRY, register_sae_class, "sparse_topk", TopKSAE, TopKSAEConfig)
    _register(SAE_CLASS_REGISTRY, register_sae_class, "sparse_abstopk", AbsTopKSAE, AbsTopKSAEConfig)
    transcoders: list[tuple[str, type, type]] = [
        ("switch_transcoder", SwitchTranscoder, SwitchTranscoderConfig),
        ("sparse_topk_transcoder", SparseTopKTranscoder, SparseTopKTranscoderConfig),
    ]
    for name, sae_class, config_class in transcoders:
        _register(SAE_CLASS_REGISTRY, register_sae_class, name, sae_class, config_class)
    for name, sae_class, config_class in (
        ("switch", SwitchTrainingSAE, SwitchTrainingSAEConfig),
        ("sparse_topk", SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig),
        ("sparse_abstopk", SparseAbsTopKTrainingSAE, SparseAbsTopKTrainingSAEConfig),
        ("sparse_batchtopk", SparseBatchTopKTrainingSAE, SparseBatchTopKTrainingSAEConfig),
        (
            "sparse_matryoshka_batchtopk",
            SparseMatryoshkaBatchTopKTrainingSAE,
            SparseMatryoshkaBatchTopKTrainingSAEConfig,
        ),
        ("switch_transcoder", SwitchTrainingTranscoder, SwitchTrainingTranscoderConfig),
        ("sparse_topk_transcoder", SparseTopKTrainingTranscoder, SparseTopKTrainingTranscoderConfig),
        ("sparse_batchtopk_transcoder", SparseBatchTopKTrainingTranscoder, SparseBatchTopKTrainingTranscoderConfig),
    ):
        _register(SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class, name, sae_class, config_class)


# SAELens's architectures that train on sparse kernels by an override, under SAELens's own configs.
_ON_SPARSE_KERNELS: dict[str, Any] = {
    "topk": (SparseTopKTrainingSAE, TopKTrainingSAEConfig),
    "abstopk": (SparseAbsTopKTrainingSAE, AbsTopKTrainingSAEConfig),
    "batchtopk": (SparseBatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "matryoshka_batchtopk": (SparseMatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
}
OVERRIDABLE = tuple(_ON_SPARSE_KERNELS)


class override:  # noqa: N801, called like a function
    """From now on, SAELens's own architectures of these names train on sparse kernels: its scripts stay as they are.

    ``with override("batchtopk"): ...`` ends it with the block, ``restore()`` whenever wanted. It holds for the whole
    process, since SAELens has one table of classes for all threads; of several that overlap, until the last has ended.

    Args:
        *architectures: "topk", "abstopk", "batchtopk", "matryoshka_batchtopk". None: all of them.

    Raises:
        ValueError: For another name.
    """

    _lock = threading.Lock()
    _active: ClassVar[dict[str, set["override"]]] = {}
    _stock: ClassVar[dict[str, Any]] = {}

    def __init__(self, *architectures: str) -> None:
        for name in architectures:
            if name not in OVERRIDABLE:
                raise ValueError(f"architectures must be among {', '.join(OVERRIDABLE)}; got {name!r}")
        self.architectures = architectures or OVERRIDABLE
        self._begin()

    def _begin(self) -> None:
        with self._lock:
            for name in self.architectures:
                active = self._active.setdefault(name, set())
                if not active:
                    self._stock[name] = SAE_TRAINING_CLASS_REGISTRY[name]
                active.add(self)
                SAE_TRAINING_CLASS_REGISTRY[name] = _ON_SPARSE_KERNELS[name]

    def restore(self) -> None:
        """End this one; a second call does nothing."""
        with self._lock:
            for name in self.architectures:
                active = self._active[name]
                ends = self in active
                active.discard(self)
                # What others have registered since is theirs.
                if ends and not active and SAE_TRAINING_CLASS_REGISTRY[name] == _ON_SPARSE_KERNELS[name]:
                    SAE_TRAINING_CLASS_REGISTRY[name] = self._stock[name]

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


class override_topk(override):  # noqa: N801
    """``override("topk")``."""

    def __init__(self) -> None:
        super().__init__("topk")


def _register(registry: dict[str, Any], register: Any, name: str, sae_class: type, config_class: type) -> None:
    if registry.get(name) != (sae_class, config_class):
        register(name, sae_class, config_class)
