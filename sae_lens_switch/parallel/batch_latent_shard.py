"""The latents of one process of a BatchTopK SAE: k per token on average over the whole batch, of all processes."""

import torch
from sae_lens_switch_kernels.chosen import Codes, Dead
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.parallel.latent_shard import LatentShard, chosen_dead
from sae_lens_switch.saes.running_thresholds import least_active, move_thresholds_
from sae_lens_switch.saes.sparse_batchtopk_sae import SparseBatchTopKTrainingSAE
from sae_lens_switch.saes.step import DeadLatents


class BatchLatentShard(LatentShard, SparseBatchTopKTrainingSAE):
    """As ``LatentShard``, of a BatchTopK SAE: its batch is that of all processes, of all rows."""

    @override
    def _choose(self, x_BD: Tensor, scale_F: Tensor | None, dead: DeadLatents) -> tuple[Codes, Dead | None]:
        k = int(self.whole.k * self.n_tokens)
        best = self._best(x_BD, scale_F, min(k, len(x_BD) * self.cfg.d_sae), over_batch=True)
        codes = best.chosen(self.batch.choose_of_batch(best.ranked_BC, k)).after_relu()
        return codes, None if dead.indices_N is None else self._choose_dead(x_BD, scale_F, dead, dead.indices_N)

    def _choose_dead(self, x_BD: Tensor, scale_F: Tensor | None, dead: DeadLatents, dead_N: Tensor) -> Dead:
        """Which of these dead latents are among the aux_k best dead ones."""
        best, ranked_BC = self._best_dead(x_BD, scale_F, dead_N, dead.aux_k)
        (is_chosen_BC,) = self.batch.choose([ranked_BC], [dead.aux_k])
        return chosen_dead(dead_N, best, is_chosen_BC)

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        """By the least active latent of all processes."""
        least = self.ranks.gather(least_active(acts_topk), "the least active latent").amin()
        move_thresholds_(self.topk_threshold, least, self.cfg.topk_threshold_lr)
