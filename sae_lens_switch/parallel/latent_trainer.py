"""LatentParallelSAETrainer: a run on several processes, with the dictionary of its SAE divided over them."""

from typing import Any

from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import Evaluator, SaveCheckpointFn
from sae_lens_switch_kernels import RowGrads
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.common.types import Metrics
from sae_lens_switch.parallel.latent_shard import LatentShard
from sae_lens_switch.parallel.reduction import complete_step_
from sae_lens_switch.parallel.resumable import ShardedTrainer, divided
from sae_lens_switch.parallel.shard_classes import LATENT_SHARDS
from sae_lens_switch.saes.sparse_topk_sae import SparseTopKTrainingSAE
from sae_lens_switch.saes.step import SparseStepOutput
from sae_lens_switch.training.activations import ActivationSource
from sae_lens_switch.training.config import SparseSAETrainerConfig
from sae_lens_switch.training.firing import Firings


class LatentParallelSAETrainer(ShardedTrainer[LatentShard]):
    """SparseSAETrainer on the processes that torchrun has started, each with its own latents of a TopK SAE.

    A step shows every token to all processes, finds the k best latents among those of all, AuxK's dead ones too, and
    sums what these reconstruct. What is sent does not depend on the width of the dictionary. Weights and losses are
    those of one process on the same batches, but for rounding.

    Args:
        cfg: As in SparseSAETrainer, the same on all processes: ``train_batch_size_samples`` and all other counts are of
            all processes together. ``latent_parallel`` processes hold the dictionary once; where there are more, they
            divide the data.
        sae: Of architecture ``sparse_topk``, ``sparse_batchtopk`` or ``sparse_matryoshka_batchtopk``, or a transcoder
            like one of the first two; each process keeps its own part of it.
        data_provider: As in ParallelSparseSAETrainer.
        save_checkpoint_fn: As in ParallelSparseSAETrainer.
        evaluator: As in ParallelSparseSAETrainer.

    Raises:
        ValueError: As SparseSAETrainer; also for what only one process can do, for settings that differ between the
            processes, and outside torchrun.
        RankLostError: During ``fit``, once another process has died or not answered for ``rank_timeout`` seconds.
    """

    def __init__(
        self,
        cfg: SparseSAETrainerConfig,
        sae: SparseTopKTrainingSAE,
        data_provider: ActivationSource,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        evaluator: Evaluator[Any] | None = None,
    ) -> None:
        shard_class = LATENT_SHARDS.get(sae.cfg.architecture())
        if shard_class is None:
            raise ValueError(f"sae must be of architecture {', '.join(LATENT_SHARDS)}; got {sae.cfg.architecture()}")
        cfg, shard = divided(cfg, sae, shard_class, "latents")
        super().__init__(cfg, shard, data_provider, save_checkpoint_fn, evaluator)

    @override
    def _forward(self, x_BD: Tensor, dead_mask: Tensor | None, row_grads: RowGrads | None) -> TrainStepOutput:
        shard = self.sae
        shard.begin(len(x_BD), dead_mask)
        self._count_others(shard.n_tokens, len(x_BD))
        return super()._forward(x_BD, dead_mask, row_grads)

    @override
    def _over_ranks(self, output: TrainStepOutput, firings: list[Firings]) -> tuple[TrainStepOutput, list[Firings]]:
        assert isinstance(output, SparseStepOutput)
        complete_step_(output, self.sae, "gradients of b_dec and losses")
        return super()._over_ranks(output, firings)

    @override
    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> Metrics:
        """As SparseSAETrainer's, of all processes; each must take part."""
        assert isinstance(output, SparseStepOutput)
        sum_D = self.ranks.sum_(output.sae_in.double().sum(dim=0), "metrics")
        log = self._log_of(output, sum_D / self.sae.n_tokens, n_training_samples)
        return log | {f"metrics/{name}": float(t) for name, t in output.metrics.items() if isinstance(t, Tensor)}
