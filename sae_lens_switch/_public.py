"""The public names of ``sae_lens_switch``; importing them registers its architectures with SAELens."""

from sae_lens_switch.hub import upload_saes_to_huggingface, verified_loader
from sae_lens_switch.interop.sparse_inference import decode_sparse, encode_sparse
from sae_lens_switch.saes.config import (
    SparseAbsTopKTrainingSAEConfig,
    SparseBatchTopKTrainingSAEConfig,
    SparseMatryoshkaBatchTopKTrainingSAEConfig,
    SparseTopKTrainingSAEConfig,
    SwitchSAEConfig,
    SwitchTrainingSAEConfig,
)
from sae_lens_switch.saes.init_from import init_from
from sae_lens_switch.saes.registration import override, override_topk, register
from sae_lens_switch.saes.sparse_batchtopk_sae import SparseBatchTopKTrainingSAE
from sae_lens_switch.saes.sparse_codes import SparseCodes
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
from sae_lens_switch.training.activations import activation_batches
from sae_lens_switch.training.checkpoints import CheckpointError
from sae_lens_switch.training.config import SparseSAETrainerConfig, TrainerOptions, scaling_law_lr
from sae_lens_switch.training.runner_config import LanguageModelSAERunnerConfig
from sae_lens_switch.training.runners import (
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
)
from sae_lens_switch.training.skipped_steps import TrainingDivergedError
from sae_lens_switch.training.trainer import SparseSAETrainer
from sae_lens_switch.training.transcoder_evals import run_transcoder_evals
from sae_lens_switch.upgrade import grow, split_topk

register()

__all__ = [
    "CheckpointError",
    "LanguageModelSAERunnerConfig",
    "LanguageModelSAETrainingRunner",
    "MultiSAETrainingRunner",
    "SparseAbsTopKTrainingSAE",
    "SparseAbsTopKTrainingSAEConfig",
    "SparseBatchTopKTrainingSAE",
    "SparseBatchTopKTrainingSAEConfig",
    "SparseBatchTopKTrainingTranscoder",
    "SparseBatchTopKTrainingTranscoderConfig",
    "SparseCodes",
    "SparseMatryoshkaBatchTopKTrainingSAE",
    "SparseMatryoshkaBatchTopKTrainingSAEConfig",
    "SparseSAETrainer",
    "SparseSAETrainerConfig",
    "SparseTopKTrainingSAE",
    "SparseTopKTrainingSAEConfig",
    "SparseTopKTrainingTranscoder",
    "SparseTopKTrainingTranscoderConfig",
    "SparseTopKTranscoder",
    "SparseTopKTranscoderConfig",
    "SwitchSAE",
    "SwitchSAEConfig",
    "SwitchTrainingSAE",
    "SwitchTrainingSAEConfig",
    "SwitchTrainingTranscoder",
    "SwitchTrainingTranscoderConfig",
    "SwitchTranscoder",
    "SwitchTranscoderConfig",
    "TrainerOptions",
    "TrainingDivergedError",
    "activation_batches",
    "decode_sparse",
    "encode_sparse",
    "grow",
    "init_from",
    "override",
    "override_topk",
    "run_transcoder_evals",
    "scaling_law_lr",
    "split_topk",
    "upload_saes_to_huggingface",
    "verified_loader",
]
