"""What a Switch SAE keeps in training for a time without batches: a threshold per expert."""

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.common.types import StateDict
from sae_lens_switch.saes.config import SwitchTrainingSAEConfig
from sae_lens_switch.saes.running_thresholds import BeforeStep, ExactThresholds, least_active_of, move_thresholds_
from sae_lens_switch.saes.serialization import thresholds_after_training
from sae_lens_switch.saes.sparse_sae import SparseTrainingSAE
from sae_lens_switch.saes.step import SparseStepInput, SparseStepOutput
from sae_lens_switch.saes.switch_sae import SwitchBase


class ThresholdedSwitch(ExactThresholds, SwitchBase, SparseTrainingSAE):
    """With activation="batchtopk" every step moves ``topk_threshold`` towards each expert's least active latent.

    It is of latents with their gates. Experts without an active latent keep theirs; shared experts have the first entry
    together. In float64, as in SAELens's ``BatchTopKTrainingSAE``; saved for inference as the ``threshold`` of
    activation="jumprelu". A step that our trainer skips leaves it as it was.
    """

    topk_threshold: Tensor | None

    def __init__(self, cfg: SwitchTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self._before_step = BeforeStep()

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        has_threshold = self.cfg.activation == "batchtopk"
        threshold_O = torch.zeros(self.cfg.layout.n_owners, dtype=torch.float64, device=self.device)
        self.register_buffer("topk_threshold", threshold_O if has_threshold else None)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super().training_forward_pass(step_input)
        if self.topk_threshold is not None:
            if isinstance(step_input, SparseStepInput):
                self._before_step.keep(self.topk_threshold)
            move_thresholds_(self.topk_threshold, self._least_active(output), self.cfg.topk_threshold_lr)
            threshold_O = self.topk_threshold.clone()
            output.metrics["topk_threshold"] = lambda: threshold_O.mean()
        return output

    @torch.no_grad()
    def _least_active(self, output: TrainStepOutput) -> Tensor:
        """Of each expert, and of the shared ones."""
        if isinstance(output, SparseStepOutput):
            acts, latents = output.codes.values, output.codes.indices
        else:  # dense, for hooks
            acts = output.feature_acts.reshape(-1, self.cfg.d_sae)
            latents = torch.arange(self.cfg.d_sae, device=acts.device).expand_as(acts)
        layout = self.cfg.layout
        return least_active_of(acts.flatten(), layout.owners_of(latents).flatten(), layout.n_owners)

    @override
    @torch.no_grad()
    def settle_step(self, is_finite: Tensor) -> None:
        super().settle_step(is_finite)
        if self.topk_threshold is not None:
            self._before_step.settle_(self.topk_threshold, is_finite)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: StateDict) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        thresholds_after_training(state_dict)
