"""Training on several processes: experts, latents or data divided over them; on torch's distributed package."""

from sae_lens_switch.parallel.consolidate import consolidate
from sae_lens_switch.parallel.data_parallel import DataParallelSAETrainer
from sae_lens_switch.parallel.latent_trainer import LatentParallelSAETrainer
from sae_lens_switch.parallel.multi_runner import ParallelMultiSAETrainingRunner
from sae_lens_switch.parallel.ranks import RankLostError
from sae_lens_switch.parallel.trainer import ParallelSparseSAETrainer

__all__ = [
    "DataParallelSAETrainer",
    "LatentParallelSAETrainer",
    "ParallelMultiSAETrainingRunner",
    "ParallelSparseSAETrainer",
    "RankLostError",
    "consolidate",
]
