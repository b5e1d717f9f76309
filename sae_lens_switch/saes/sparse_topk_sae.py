"""SAELens's TopK SAE on sparse kernels: the same mathematics, files and statistics, without any [B, F] tensor."""

from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from sae_lens_switch_kernels import RowGrads, sparse_autoencode, sparse_decode, topk_encode
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_switch.common.atomic import replace_files
from sae_lens_switch.common.machine import check_sae_fits
from sae_lens_switch.saes.serialization import latent_major
from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.sparse_sae import (
    SparseStepOutput,
    activation_rows,
    aux_loss,
    dead_latents,
    differentiable,
    finish_decoding,
    has_hooks,
    normalized_input,
    pre_bias,
    reconstruction_error,
)
from sae_lens_switch.training.config import SparseTopKTrainingSAEConfig, check_sae


class SparseTopKTrainingSAE(TopKTrainingSAE):
    """A TopK SAE in training (Gao et al. 2024), under SAELens's trainer or any loop; saved for inference as ``topk``.

    Equal to SAELens's ``TopKTrainingSAE`` in outputs, losses and gradients, its rescaling by decoder norms and its
    auxiliary loss included. Where the norms rescale, they take part in the selection only: in the reconstruction
    they cancel, and so do their gradients.
    A hook on the dense latents makes a step run as SAELens's own, densely.
    """

    row_grads: RowGrads | None = None  # what an optimiser wants of a backward pass

    def __init__(self, cfg: SparseTopKTrainingSAEConfig, use_error_term: bool = False) -> None:
        check_sae(cfg)
        check_sae_fits(cfg)
        super().__init__(cfg, use_error_term)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc = nn.Parameter(latent_major(self.W_enc.data))

    @override
    def encode(self, x: Tensor) -> Tensor:
        """Dense latents [..., F] of x [..., D]."""
        if has_hooks(self.hook_sae_acts_pre):
            return super().encode(differentiable(x))
        return self.hook_sae_acts_post(self.encode_sparse(x).to_dense())

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """The same latents as ``encode``, without a tensor of width F. Hooks on dense latents do not fire."""
        x = normalized_input(self, x)
        scale_F = self._selection_scale()
        values, indices = topk_encode(
            x.reshape(-1, x.shape[-1]),
            self.W_enc.T,
            self.cfg.k,
            pre_bias_D=pre_bias(self),
            bias_F=self.b_enc,
            scale_F=None if scale_F is None else scale_F.detach(),
        )
        values = values if scale_F is None else values * scale_F[indices]
        shape = (*x.shape[:-1], self.cfg.k)
        return SparseCodes(values.view(shape), indices.view(shape), self.cfg.d_sae)

    @override
    def decode(self, feature_acts: Tensor | SparseCodes) -> Tensor:
        """x_hat [..., D] of latents [..., F], dense or COO, or of SparseCodes."""
        if not isinstance(feature_acts, SparseCodes):
            return super().decode(differentiable(feature_acts))
        values, indices = differentiable(feature_acts.values), differentiable(feature_acts.indices)
        scale_F = self._selection_scale()
        if scale_F is not None:
            values = values / scale_F[indices]
        K = values.shape[-1]
        out = sparse_decode(values.reshape(-1, K), indices.reshape(-1, K), self.W_dec)
        return finish_decoding(self, out.view(*values.shape[:-1], self.W_dec.shape[-1]) + self.b_dec)

    def _selection_scale(self) -> Tensor | None:
        """||W_dec[f]||, by which SAELens multiplies latents before it selects them."""
        return self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's loss and its parts, of ``sae_in`` [..., d_in]; ``hidden_pre``, [..., K], is what was selected.

        Raises ValueError if the activations are not of width d_in, or if there are none.
        """
        given = step_input.sae_in
        rows_BD = activation_rows(given, self.cfg.d_in)
        if has_hooks(self.hook_sae_acts_pre) or has_hooks(self.hook_sae_acts_post):
            return super().training_forward_pass(step_input)
        x = normalized_input(self, rows_BD)
        with torch.no_grad():
            scale_F = self._selection_scale()
        dead_N, aux_k = dead_latents(self, step_input.dead_neuron_mask)
        result = sparse_autoencode(
            x,
            self.W_enc.T,
            self.W_dec,
            self.cfg.k,
            pre_bias_D=pre_bias(self),
            bias_F=self.b_enc,
            scale_F=scale_F,
            dead_N=dead_N,
            aux_k=aux_k,
            row_grads=self.row_grads,
        )
        sae_out = finish_decoding(self, result.out_BD + self.b_dec)
        values = result.values_BK.detach()
        if scale_F is not None:
            values = values * scale_F[result.indices_BK]
        mse_loss = reconstruction_error(self, sae_out, rows_BD)
        aux = sae_out.new_zeros(())
        if dead_N is not None and result.aux_out_BD is not None:
            aux = aux_loss(self, rows_BD, sae_out, result.aux_out_BD, len(dead_N))
        return SparseStepOutput(
            codes=SparseCodes(values, result.indices_BK, self.cfg.d_sae).view(*given.shape[:-1]),
            sae_in=given,
            sae_out=sae_out.view(given.shape),
            hidden_pre=values.view(*given.shape[:-1], self.cfg.k),
            loss=mse_loss + aux,
            losses={"mse_loss": mse_loss, "auxiliary_reconstruction_loss": aux},
        )

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = latent_major(state_dict["W_enc"])

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """As SAELens's, but each file appears whole or not at all."""
        return replace_files(path, super().save_model)

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        return replace_files(path, super().save_inference_model)
