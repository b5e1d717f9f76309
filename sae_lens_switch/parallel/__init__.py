"""Training on several processes: the experts divided over them, the data, or both; on torch's distributed package."""

from sae_lens_switch.parallel.consolidate import consolidate
from sae_lens_switch.parallel.data_parallel import DataParallelSAETrainer
from sae_lens_switch.parallel.ranks import RankLostError
from sae_lens_switch.parallel.trainer import ParallelSparseSAETrainer

__all__ = ["DataParallelSAETrainer", "ParallelSparseSAETrainer", "RankLostError", "consolidate"]
