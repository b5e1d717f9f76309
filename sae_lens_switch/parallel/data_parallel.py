"""DataParallelSAETrainer: any SAE on several processes, each with all of it and its own part of every batch."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import T_TRAINING_SAE, T_TRAINING_SAE_CONFIG, TrainStepOutput
from sae_lens.training.sae_trainer import Evaluator, SaveCheckpointFn
from sae_lens_switch_kernels import RowGrads
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.common.types import Metrics, StateDict
from sae_lens_switch.parallel.batch_of_all import over_batch_of_all
from sae_lens_switch.parallel.checkpoints import RANKS
from sae_lens_switch.parallel.ranked_trainer import RankedTrainer, checkpoint_of, compare_settings, join, require
from sae_lens_switch.parallel.reduction import firings_over_data, sum_gradients_over_data_, sum_together_
from sae_lens_switch.parallel.shard_classes import OVER_BATCH
from sae_lens_switch.parallel.share import Share
from sae_lens_switch.saes.sparse_sae import SparseTrainingSAE
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE
from sae_lens_switch.training.activations import ActivationSource
from sae_lens_switch.training.checkpoints import SHARED, CheckpointError
from sae_lens_switch.training.config import SparseSAETrainerConfig
from sae_lens_switch.training.firing import Firings


class DataParallelSAETrainer(RankedTrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """SparseSAETrainer for SAEs whose data alone is divided, on the processes that torchrun has started.

    Every process has the whole SAE and its optimiser, and takes a part of each batch; gradients, losses, firings and
    the choice of SAELens's BatchTopK SAEs are those of the batch. Buffers are averaged. A step sends as much as the
    weights have numbers, or with row-sparse Adam the rows of the active latents. Checkpoints are those of one process,
    which can resume from them too.

    Args:
        cfg: As in SparseSAETrainer, the same on all processes: counts are of all processes together.
        sae: Of any architecture but ``switch``, which ParallelSparseSAETrainer trains, and sparse BatchTopK ones, which
            LatentParallelSAETrainer does; the first process's weights count.
        data_provider: As in ParallelSparseSAETrainer.
        save_checkpoint_fn: As in ParallelSparseSAETrainer.
        evaluator: As in ParallelSparseSAETrainer.

    Raises:
        ValueError: As SparseSAETrainer; also for settings that differ between the processes, and outside torchrun.
        RankLostError: During ``fit``, once another process has died or not answered for ``rank_timeout`` seconds.
    """

    def __init__(
        self,
        cfg: SparseSAETrainerConfig,
        sae: T_TRAINING_SAE,
        data_provider: ActivationSource,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        evaluator: Evaluator[Any] | None = None,
    ) -> None:
        if isinstance(sae, SwitchTrainingSAE):
            raise ValueError("sae must be of another architecture than switch, which ParallelSparseSAETrainer trains")
        if (architecture := sae.cfg.architecture()) in OVER_BATCH:
            raise ValueError(
                f"sae must be of another architecture than {architecture}, which LatentParallelSAETrainer trains, with "
                "latent_parallel=1 too"
            )
        only = {"expert_parallel": 1, "latent_parallel": 1, "cuda_graph": False}
        require(cfg, only, "for an SAE whose data alone is divided")
        cfg = cfg.resolved(sae.cfg.d_sae)
        ranks = join(cfg)
        cfg = replace(cfg, device=str(ranks.device))
        sae.to(cfg.device)
        compare_settings(ranks, cfg, sae.cfg.to_dict())
        super().__init__(cfg, sae, data_provider, save_checkpoint_fn, ranks, evaluator)
        for t in sae.state_dict().values():
            ranks.broadcast_(t if t.is_contiguous() else t.T, "the weights")
        self._share_of_batch = 1.0

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        mine = batch[..., 0].numel()
        n_tokens = sum(self.ranks.gather_objects(mine))
        self._share_of_batch = mine / n_tokens
        self.n_training_samples += n_tokens - mine
        self.n_frac_active_samples += n_tokens - mine
        return super().step(batch)

    @override
    def _forward(self, x_BD: Tensor, dead_mask: Tensor | None, row_grads: RowGrads | None) -> TrainStepOutput:
        with over_batch_of_all(self.sae, self.ranks):
            return super()._forward(x_BD, dead_mask, row_grads)

    @override
    def _over_ranks(self, output: TrainStepOutput, firings: list[Firings]) -> tuple[TrainStepOutput, list[Firings]]:
        parameters, row_grads = list(self.sae.parameters()), self.optimizer.row_grads
        for t in [*(p.grad for p in parameters), *_tensors(row_grads)]:
            if t is not None:
                t.mul_(self._share_of_batch)
        sparse = self.sae if isinstance(self.sae, SparseTrainingSAE) else None
        like = parameters[0] if sparse is None else sparse.W_dec
        sum_gradients_over_data_(parameters, row_grads, self.ranks, like)
        losses = {name: torch.as_tensor(t).detach().float() * self._share_of_batch for name, t in output.losses.items()}
        losses["of all"] = output.loss.detach().float() * self._share_of_batch
        buffers = [b for b in self.sae.buffers() if b.is_floating_point()]
        for buffer in buffers:
            buffer.mul_(self._share_of_batch)
        sum_together_([*losses.values(), *buffers], self.ranks, "losses")
        output.loss = losses.pop("of all")
        output.losses = {**losses}
        return output, firings_over_data(firings, self.sae.cfg.d_sae, self.ranks)

    @override
    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> Metrics:
        """As SparseSAETrainer's, of all processes, each of which must take part."""
        whole = copy.copy(output)
        whole.sae_in, whole.sae_out = (
            self.ranks.gather_rows(t.detach(), "metrics") for t in (output.sae_in, output.sae_out)
        )
        log = super().build_train_step_log_dict(whole, n_training_samples)
        numbers = torch.tensor([float(value) for value in log.values()], dtype=torch.float64)
        total = self.ranks.sum_((numbers * self._share_of_batch).to(self.ranks.device), "metrics")
        same = {name: value for name, value in log.items() if isinstance(value, int)}  # counts, of the whole batch
        return dict(zip(log, total.tolist(), strict=True)) | same

    # Checkpoints

    @override
    def _verify(self, path: Path) -> None:
        super()._verify(path)
        if (path / SHARED).exists():
            raise CheckpointError(
                f"checkpoint {path} is of a run with divided latents: resume it with latent_parallel above 1, or make "
                "its SAE an ordinary one with python -m sae_lens_switch.parallel"
            )

    @override
    def write_checkpoint(self, folder: Path) -> None:
        self._write_own_state(folder)
        if self.ranks.is_first:
            super().write_checkpoint(folder)

    @override
    def _state_beyond_saelens(self) -> StateDict:
        """Without a place in activations of this process alone: another number of processes would all go there."""
        state = super()._state_beyond_saelens()
        return state if isinstance(self.data_provider, Share) else _without_place(state)

    @override
    def _read_state_beyond_saelens(self, folder: Path) -> StateDict:
        state, path = super()._read_state_beyond_saelens(folder), checkpoint_of(folder)
        own = self._read_own_state(path)
        # Of several processes, the state that one resumes from was the first's.
        return (_without_place(state) if (path / RANKS).is_dir() else state) | own


def _without_place(state: StateDict) -> StateDict:
    return {name: value for name, value in state.items() if name != "data"}


def _tensors(row_grads: RowGrads | None) -> list[Tensor | None]:
    if row_grads is None:
        return []
    return [row_grads.dW_enc_RD, row_grads.dW_dec_RD, row_grads.d_bias_R, row_grads.radial_R]
