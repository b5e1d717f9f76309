"""ParallelSparseSAETrainer: a run on several processes, with the experts of its Switch SAE divided over them."""

from typing import Any

from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import Evaluator, SaveCheckpointFn
from sae_lens_switch_kernels import RowGrads
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.common.types import Metrics
from sae_lens_switch.parallel.expert_shard import ExpertShard
from sae_lens_switch.parallel.reduction import complete_step_
from sae_lens_switch.parallel.reseeding import DividedPlacement
from sae_lens_switch.parallel.resumable import ShardedTrainer, divided
from sae_lens_switch.parallel.shard_classes import expert_shard_class
from sae_lens_switch.parallel.step_log import routing_log
from sae_lens_switch.saes.step import SparseStepOutput
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE
from sae_lens_switch.training.activations import ActivationSource
from sae_lens_switch.training.config import SparseSAETrainerConfig
from sae_lens_switch.training.firing import Firings


class ParallelSparseSAETrainer(ShardedTrainer[ExpertShard]):
    """SparseSAETrainer on the processes that torchrun has started, each with its own experts and its own activations.

    A step sends every token to the process that owns its expert, or to those that own all its experts, and sums what is
    shared: the gradients of ``b_dec`` and the router, losses, load, and the norm to clip. What is sent does not depend
    on the width of the dictionary. Weights and losses are those of one process on the same batches, but for rounding.

    Args:
        cfg: As in SparseSAETrainer, the same on all processes: ``train_batch_size_samples`` and all other counts are of
            all processes together. ``expert_parallel`` processes hold the experts once; where there are more, they
            divide the data.
        sae: A Switch SAE or transcoder; each process keeps its own part of it.
        data_provider: A tensor or folder that every process has, of which each takes its part of every batch; or an
            iterator of this process's own batches.
        save_checkpoint_fn: As in SparseSAETrainer, called on every process with a folder of its own.
        evaluator: As in SparseSAETrainer, called on every process, each on its own part of the data; the mean of all is
            logged. It gets the whole SAE, as long as each process has memory for it.

    Raises:
        ValueError: As SparseSAETrainer; also for what only one process can do, for settings that differ between the
            processes, and outside torchrun.
        RankLostError: During ``fit``, once another process has died or not answered for ``rank_timeout`` seconds.
    """

    def __init__(
        self,
        cfg: SparseSAETrainerConfig,
        sae: SwitchTrainingSAE,
        data_provider: ActivationSource,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        evaluator: Evaluator[Any] | None = None,
    ) -> None:
        if not isinstance(sae, SwitchTrainingSAE):
            raise ValueError(
                "sae must be of architecture switch, since DataParallelSAETrainer or LatentParallelSAETrainer trains "
                f"others; got {sae.cfg.architecture()}"
            )
        whole = sae.whole if isinstance(sae, ExpertShard) else sae.cfg
        cfg, shard = divided(cfg, sae, expert_shard_class(whole), "experts")
        super().__init__(cfg, shard, data_provider, save_checkpoint_fn, evaluator)
        self.collapse.placement = DividedPlacement(shard.ranks)

    # The step

    @override
    def _forward(self, x_BD: Tensor, dead_mask: Tensor | None, row_grads: RowGrads | None) -> TrainStepOutput:
        shard = self.sae
        if shard.is_fresh:
            shard.start(self.ranks.gather_rows(x_BD, "the first batch"))
        mine_BD = shard.receive(x_BD)
        self._count_others(shard.n_tokens, len(x_BD))
        return super()._forward(mine_BD, dead_mask, row_grads)

    @override
    def _over_ranks(self, output: TrainStepOutput, firings: list[Firings]) -> tuple[TrainStepOutput, list[Firings]]:
        assert isinstance(output, SparseStepOutput)
        balance = output.metrics["load_balance"]
        assert isinstance(balance, Tensor)
        complete_step_(output, self.sae, "gradients of the router and losses", load_balance=balance.detach())
        return super()._over_ranks(output, firings)

    @override
    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> Metrics:
        """As SparseSAETrainer's, of all processes; each must take part."""
        assert isinstance(output, SparseStepOutput)
        assert self.routing is not None
        log = self._log_of(output, self.sae.batch.mean_D, n_training_samples)
        log |= routing_log(output, self.sae) | {"routing/interventions": self.n_interventions}
        return log | self.routing.metrics()
