"""The latents of one process of a Matryoshka BatchTopK SAE, whose levels may begin and end on any process."""

import warnings
from typing import Any

import torch
from sae_lens_switch_kernels import Reconstruction, RowGrads
from sae_lens_switch_kernels.chosen import Codes, Dead
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.common.types import Options
from sae_lens_switch.parallel.batch_latent_shard import BatchLatentShard
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.saes.config import SparseMatryoshkaBatchTopKTrainingSAEConfig
from sae_lens_switch.saes.levels import decoded
from sae_lens_switch.saes.router import Assignment
from sae_lens_switch.saes.sparse_matryoshka_sae import SparseMatryoshkaBatchTopKTrainingSAE
from sae_lens_switch.saes.sparse_topk_sae import SparseTopKTrainingSAE
from sae_lens_switch.saes.step import DeadLatents


class MatryoshkaLatentShard(BatchLatentShard, SparseMatryoshkaBatchTopKTrainingSAE):
    """As ``BatchLatentShard``, with the losses of all widths: each process's part of every level goes home."""

    def __init__(self, whole: SparseMatryoshkaBatchTopKTrainingSAEConfig, ranks: Ranks) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a part has one level
            super().__init__(whole, ranks)
        widths, F = self.whole.matryoshka_widths, self.whole.d_sae
        self._widths = [*widths] if widths[-1] == F else [*widths, F]  # as SAELens completes them
        ends = [min(max(width - self.first_latent, 0), self.cfg.d_sae) for width in self._widths]
        self._sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        self._own_ends = ends
        self._own_ends_L: Tensor | None = None  # these, where the weights are

    @classmethod
    @override
    def _fields_of(cls, whole: Any, width: int) -> Options:
        return super()._fields_of(whole, width) | {"matryoshka_widths": [width]}

    @override
    def _new_block(self) -> SparseTopKTrainingSAE:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super()._new_block()

    # The step

    @override
    def _autoencode(
        self, inputs_BD: Tensor, assignment: Assignment | None, dead: DeadLatents, row_grads: RowGrads | None
    ) -> tuple[Reconstruction, Tensor]:
        result, acts_S = super()._autoencode(inputs_BD, assignment, dead, row_grads)
        L, D = len(self._widths), self.cfg.d_in
        aux_out_BD, offsets_Q1 = result.aux_out_BD, result.offsets_B1
        assert offsets_Q1 is not None
        if aux_out_BD is not None and dead.counts:
            aux_out_BD = aux_out_BD.unflatten(1, (-1, D))
        out_BD = result.out_BD.unflatten(1, (L, D))
        return result._replace(out_BD=out_BD, aux_out_BD=aux_out_BD, offsets_B1=offsets_Q1[::L]), acts_S

    @override
    def _choose(self, x_BD: Tensor, scale_F: Tensor | None, dead: DeadLatents) -> tuple[Codes, Dead | None]:
        codes, dead_codes = super()._choose(x_BD, scale_F, dead)
        if self._own_ends_L is None or self._own_ends_L.device != self.W_dec.device:
            self._own_ends_L = torch.tensor(self._own_ends, device=self.W_dec.device)
        return codes.in_levels(self._own_ends_L, self.cfg.d_sae), dead_codes

    @override
    def _decoded(self, result: Reconstruction, target_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        product_BD, losses = decoded(self, result.out_BD, self._widths, target_BD)
        share = self._batch_share(target_BD)
        return product_BD, {name: share * loss for name, loss in losses.items()}

    # AuxK, of each level apart

    @override
    def _by_level(self, t_F: Tensor) -> tuple[Tensor, ...]:
        return t_F.split(self._sizes) if self.cfg.use_matryoshka_aux_loss else (t_F,)

    @override
    def _choose_dead(self, x_BD: Tensor, scale_F: Tensor | None, dead: DeadLatents, dead_N: Tensor) -> Dead:
        if not dead.counts:
            return super()._choose_dead(x_BD, scale_F, dead, dead_N)
        mine = self.batch.n_dead[self.ranks.row_rank]
        found, ranked, ks, first = [], [], [], 0
        for level, (n, n_of_all) in enumerate(zip(mine, dead.counts, strict=True)):
            if n_of_all:
                k = min(self.aux_k, n_of_all)
                best, ranked_BC = self._best_dead(x_BD, scale_F, dead_N[first : first + n], k, level)
                found.append(best._replace(indices_BC=best.indices_BC + first))
                ranked.append(ranked_BC)
                ks.append(k)
            first += n
        chosen = self.batch.choose(ranked, ks)
        levels = [best.chosen(t[:, : best.ranked_BC.shape[1]]) for best, t in zip(found, chosen, strict=True)]
        return Dead(dead_N, Codes.of_levels(levels))
