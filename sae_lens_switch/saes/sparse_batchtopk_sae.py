"""SAELens's BatchTopK SAE on sparse kernels: k latents per token on average over the batch."""

from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens_switch_kernels import batch_topk_encode
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.saes.running_thresholds import BeforeStep, ExactThresholds, least_active, move_thresholds_
from sae_lens_switch.saes.sparse_topk_sae import Selection, SparseTopKTrainingSAE
from sae_lens_switch.saes.step import SparseStepInput, SparseStepOutput


class SparseBatchTopKTrainingSAE(ExactThresholds, SparseTopKTrainingSAE, BatchTopKTrainingSAE):
    """A BatchTopK SAE in training (Bussmann et al. 2024), under SAELens's trainer or any loop; saved as ``jumprelu``.

    Equal to SAELens's ``BatchTopKTrainingSAE`` in outputs, losses, gradients and the running threshold. Exactly the
    int(k B) largest of a batch's pre-activations are active, so codes vary in number by token; with gradient
    accumulation each part is a batch. A step that our trainer skips leaves the threshold as it was.
    """

    def __init__(self, cfg: BatchTopKTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self._before_step = BeforeStep()

    @override
    def _encode_rows(self, x_BD: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        return batch_topk_encode(x_BD, self.W_enc.T, self._n_active(len(x_BD)), **options)

    @override
    def _selection(self, n_tokens: int) -> Selection:
        return Selection(self._n_active(n_tokens), over_batch=True)

    def _n_active(self, n_tokens: int) -> int:
        return int(self.cfg.k * n_tokens)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super().training_forward_pass(step_input)
        if isinstance(step_input, SparseStepInput):
            self._before_step.keep(self.topk_threshold)
        self.update_topk_threshold(output.codes.values if isinstance(output, SparseStepOutput) else output.feature_acts)
        output.metrics["topk_threshold"] = self.topk_threshold.clone()
        return output

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        """As SAELens's, in place and without waiting for the device."""
        move_thresholds_(self.topk_threshold, least_active(acts_topk), self.cfg.topk_threshold_lr)

    @override
    @torch.no_grad()
    def settle_step(self, is_finite: Tensor) -> None:
        super().settle_step(is_finite)
        self._before_step.settle_(self.topk_threshold, is_finite)
