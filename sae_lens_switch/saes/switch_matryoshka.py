"""The widths inside the experts of a Switch SAE, at each of which its first latents reconstruct by themselves."""

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens_switch_kernels import Reconstruction
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.saes.config import SwitchTrainingSAEConfig
from sae_lens_switch.saes.levels import decoded, dense_parts, inner_losses
from sae_lens_switch.saes.losses import of_share
from sae_lens_switch.saes.router import Assignment
from sae_lens_switch.saes.switch_batchtopk import ThresholdedSwitch


class MatryoshkaSwitch(ThresholdedSwitch):
    """With ``matryoshka_widths`` the loss adds the squared error of the reconstruction at each width but the last.

    At a width, that is from latents whose position inside their expert is smaller, and from all shared ones. All widths
    together cost one decoding.
    """

    def __init__(self, cfg: SwitchTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self._ends: Tensor | None = None  # of cfg.matryoshka_widths, on the SAE's device
        self._parts_BLD: Tensor | None = None  # of a step with dense latents, where one asks for them
        self._wants_parts = False

    @property
    def _ends_L(self) -> Tensor | None:
        if self.cfg.matryoshka_widths is not None and (self._ends is None or self._ends.device != self.W_dec.device):
            self._ends = torch.tensor(self.cfg.matryoshka_widths, device=self.W_dec.device)
        return self._ends

    @override
    def _decoded(self, result: Reconstruction, target_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        widths = self.cfg.matryoshka_widths
        if widths is None:
            return result.out_BD, {}
        product_BD, inner = decoded(self, result.out_BD, widths, target_BD)
        return product_BD, of_share(inner, self._batch_share(target_BD))

    # With hooks on dense latents

    @override
    def _encode_dense(self, inputs_BD: Tensor) -> tuple[Tensor, Tensor, Assignment]:
        found = super()._encode_dense(inputs_BD)
        ends_L = self._ends_L
        if self._wants_parts and ends_L is not None:
            position_F = self.cfg.layout.positions(self.W_dec.device)
            level_F = torch.searchsorted(ends_L, position_F, right=True)
            self._parts_BLD = dense_parts(found[0], level_F, len(ends_L), self.W_dec)
        return found

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self._wants_parts = True
        try:
            output = super().training_forward_pass(step_input)
        finally:
            self._wants_parts = False
        parts_BLD, self._parts_BLD = self._parts_BLD, None
        if parts_BLD is not None and self.cfg.matryoshka_widths is not None:
            _, target_BD = self._inputs_and_targets(step_input.sae_in)
            inner = inner_losses(self, parts_BLD, self.cfg.matryoshka_widths, target_BD)
            inner = of_share(inner, self._batch_share(target_BD))
            output.losses |= inner
            output.loss = sum(inner.values(), start=output.loss)
        return output
