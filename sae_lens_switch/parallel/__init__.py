"""Training on several processes: the experts divided over them, the data, or both; on torch's distributed package."""

from sae_lens_switch.parallel.ranks import RankLostError, Ranks, start_process_group
from sae_lens_switch.parallel.trainer import ParallelSparseSAETrainer

__all__ = ["ParallelSparseSAETrainer", "RankLostError", "Ranks", "start_process_group"]
