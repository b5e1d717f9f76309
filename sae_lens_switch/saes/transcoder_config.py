"""The configs of transcoders, each like those of an SAE."""

from dataclasses import dataclass

from sae_lens.saes.sae import SAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig
from sae_lens.saes.transcoder import JumpReLUSkipTranscoderConfig, JumpReLUTranscoderConfig
from typing_extensions import override

from sae_lens_switch.saes.config import (
    SparseBatchTopKTrainingSAEConfig,
    SparseTopKTrainingSAEConfig,
    SwitchSAEConfig,
    SwitchTrainingSAEConfig,
)
from sae_lens_switch.saes.transcoder_fields import TrainingTranscoderFields, TranscoderFields


@dataclass
class SwitchTranscoderConfig(TranscoderFields, SwitchSAEConfig):
    """Config of a Switch transcoder for inference: SwitchSAEConfig, and the fields of all transcoders."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "switch_transcoder"


@dataclass
class SwitchTrainingTranscoderConfig(TrainingTranscoderFields, SwitchTrainingSAEConfig):
    """Config of a Switch transcoder for training: SwitchTrainingSAEConfig, and the fields of all transcoders.

    On the first batch the biases start inside the inputs (b_in, b_router) and the targets (b_dec), and W_enc is scaled
    by the ratio of their spreads, so that latents begin at the size of what they reconstruct.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "switch_transcoder"


@dataclass
class SparseTopKTranscoderConfig(TranscoderFields, TopKSAEConfig):
    """Config of a TopK transcoder for inference: SAELens's TopKSAEConfig, and the fields of all transcoders."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "sparse_topk_transcoder"


@dataclass
class SparseTopKTrainingTranscoderConfig(TrainingTranscoderFields, SparseTopKTrainingSAEConfig):
    """Config of a TopK transcoder for training: SparseTopKTrainingSAEConfig, and the fields of all transcoders.

    SAELens has no TopK transcoder, so the trained one is saved as "sparse_topk_transcoder", which this package loads.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "sparse_topk_transcoder"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return SparseTopKTranscoderConfig


@dataclass
class SparseBatchTopKTrainingTranscoderConfig(TrainingTranscoderFields, SparseBatchTopKTrainingSAEConfig):
    """Config of a BatchTopK transcoder: SparseBatchTopKTrainingSAEConfig, and the fields of all transcoders.

    The trained one is saved as SAELens's "jumprelu_transcoder", or "jumprelu_skip_transcoder" with a skip connection,
    which load without this package.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "sparse_batchtopk_transcoder"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSkipTranscoderConfig if self.skip_connection else JumpReLUTranscoderConfig
