"""SAELens's Matryoshka BatchTopK SAE on sparse kernels: the losses of all widths from one decoding."""

from itertools import pairwise

import torch
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens_switch_kernels import Reconstruction
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.saes.levels import decoded, reconstructions
from sae_lens_switch.saes.sparse_batchtopk_sae import SparseBatchTopKTrainingSAE
from sae_lens_switch.saes.sparse_topk_sae import Selection
from sae_lens_switch.saes.step import DeadLatents


class SparseMatryoshkaBatchTopKTrainingSAE(SparseBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE):
    """A Matryoshka BatchTopK SAE in training (arXiv 2503.17547), under SAELens's trainer or any loop.

    Equal to SAELens's ``MatryoshkaBatchTopKTrainingSAE``, and saved as ``jumprelu`` like it. The reconstruction at each
    width is that of the width before plus the latents in between, so all together cost one decoding.
    """

    def __init__(self, cfg: MatryoshkaBatchTopKTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self._ends_L: Tensor | None = None  # of cfg.matryoshka_widths, which SAELens may have completed

    @override
    def _selection(self, n_tokens: int) -> Selection:
        if self._ends_L is None or self._ends_L.device != self.W_dec.device:
            self._ends_L = torch.tensor(self.cfg.matryoshka_widths, device=self.W_dec.device)
        return super()._selection(n_tokens)._replace(ends_L=self._ends_L)

    @override
    def _decoded(self, result: Reconstruction, target_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return decoded(self, result.out_BD, self.cfg.matryoshka_widths, target_BD)

    # AuxK of each level apart: its dead latents reconstruct the residual at its own width

    @override
    def _dead_latents(self, dead_F: Tensor | None) -> DeadLatents:
        dead = super()._dead_latents(dead_F)
        if dead_F is None or dead.indices_N is None or not self.cfg.use_matryoshka_aux_loss:
            return dead
        widths = self.cfg.matryoshka_widths
        sizes = [end - start for start, end in pairwise([0, *widths])]
        return dead._replace(counts=tuple(int(level.sum()) for level in dead_F.split(sizes)))

    @property
    @override
    def can_mask_dead(self) -> bool:
        return super().can_mask_dead and not self.cfg.use_matryoshka_aux_loss

    @override
    def _aux_loss(
        self, x_BD: Tensor, sae_out_BD: Tensor, result: Reconstruction, dead: DeadLatents, n_dead: Tensor | int
    ) -> Tensor:
        if not dead.counts:
            return super()._aux_loss(x_BD, sae_out_BD, result, dead, n_dead)
        assert result.aux_out_BD is not None
        aux_outs, losses = iter(result.aux_out_BD.unbind(1)), []
        for n, out_BD in zip(dead.counts, reconstructions(self, result.out_BD.detach()), strict=True):
            if n:
                residual_BD = (x_BD - out_BD).detach()
                loss = (next(aux_outs) - residual_BD).pow(2).sum(dim=-1).mean()
                losses.append(min(n / self.aux_k, 1.0) * loss)
        return self.cfg.aux_loss_coefficient * torch.stack(losses).sum()

    @override
    def _dense_step(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super()._dense_step(step_input)
        for width, sae_out in self._iterable_decode(output.feature_acts):
            loss = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
            output.losses[f"inner_mse_loss_{width}"] = loss
            output.loss = output.loss + loss
        return output
