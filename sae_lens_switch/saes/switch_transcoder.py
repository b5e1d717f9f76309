"""The Switch transcoder: a router sends each input to one of E small TopK transcoders."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_switch.saes.data_dependent_init import Spread, Start, bias_from_batch
from sae_lens_switch.saes.switch_sae import SwitchBase
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE
from sae_lens_switch.saes.transcoder import TrainingTranscoder, Transcoder


class SwitchTranscoderBase(Transcoder, SwitchBase):
    """As a Switch SAE's, with ``b_in`` [d_in] for what b_dec is to an SAE's encoder.

    Router   as in a Switch SAE
    Encoder  z = TopK_K(relu((x - b_in) @ W_enc[:, block e])), f = p_e z
    Output   y_hat = f @ W_dec + b_dec, and W_skip x with a skip connection
    """

    b_in: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_in = nn.Parameter(torch.zeros(self.cfg.d_in, dtype=self.dtype, device=self.device))

    @property
    @override
    def pre_bias(self) -> Tensor:
        return self.b_in


class SwitchTranscoder(SwitchTranscoderBase):
    """A trained Switch transcoder. See ``encode``, ``encode_sparse``, ``decode`` and ``forward``."""


class SwitchTrainingTranscoder(TrainingTranscoder, SwitchTranscoderBase, SwitchTrainingSAE):
    """A Switch transcoder in training: the loss of a Switch SAE, with the target for what an SAE reconstructs.

    A batch has rows of d_in + d_out numbers, each token's input and then its target.
    """

    @property
    @override
    def _input_bias(self) -> Tensor:
        return self.b_in

    @override
    def _start_of(self, inputs_BD: Tensor, target_BD: Tensor) -> Start | None:
        """Also W_enc, scaled so that latents begin at the size of what they reconstruct."""
        found = super()._start_of(inputs_BD, target_BD)
        if found is None or not torch.isfinite(target_BD).all():
            return None
        target_BD = target_BD.to(self.dtype)
        starts = {**found.values, "b_in": found.values["b_dec"]}
        with torch.autocast(target_BD.device.type, enabled=False):
            starts["b_dec"] = bias_from_batch(target_BD, self.cfg.bias_start)
        of_inputs, of_targets = Spread.of(inputs_BD), Spread.of(target_BD)
        if not (of_inputs.is_none or of_targets.is_none):
            starts["W_enc"] = self.W_enc * (of_targets.spread / of_inputs.spread)
        return found._replace(values=starts, description=f"{found.description}; targets are {of_targets}")
