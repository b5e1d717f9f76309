"""Folds that are seen by whoever keeps something that follows from the weights."""

from typing import Any

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor
from typing_extensions import override


class CountedFolds(SAE[Any]):
    """SAELens folds by writes through ``.data``, which torch does not count; here they are counted."""

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self._count_writes()

    @override
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        self._count_writes()

    @override
    def fold_and_get_W_dec_norm(self) -> Tensor:
        norms_F = super().fold_and_get_W_dec_norm()
        self._count_writes()
        return norms_F

    def _count_writes(self) -> None:
        torch.autograd.graph.increment_version([p for p in self.parameters() if not p.is_inference()])
