"""SAELens's TopK and AbsTopK SAEs on sparse kernels: the same mathematics, files and statistics, no [B, F] tensor."""

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from sae_lens_switch_kernels import EncoderPrecision, Reconstruction, RowGrads, sparse_autoencode, topk_encode
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_switch.common.torch_private import has_hooks
from sae_lens_switch.saes.config import SPARSE_CONFIGS
from sae_lens_switch.saes.router import Assignment
from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.sparse_sae import SparseSAE, SparseTrainingSAE
from sae_lens_switch.saes.step import DeadLatents, LatentParameters, activation_rows, differentiable


class Selection(NamedTuple):
    """What ``sparse_autoencode`` is told of the selection."""

    k: int
    by_magnitude: bool = False
    over_batch: bool = False
    ends_L: Tensor | None = None


class SparseTopK(SparseSAE):
    """The sparse encoder of TopK SAEs and transcoders, in training and after."""

    b_enc: nn.Parameter
    _by_magnitude: ClassVar[bool] = False

    @override
    def encode_sparse(self, x: Tensor) -> SparseCodes:
        x = self.normalized_input(x)
        scale_F = self._selection_scale()
        values, indices, offsets = self._encode_rows(
            x.reshape(-1, x.shape[-1]),
            pre_bias_D=self.pre_bias,
            bias_F=self.b_enc,
            scale_F=None if scale_F is None else scale_F.detach(),
            encoder_precision=self.encoder_precision,
        )
        values = values if scale_F is None else values * scale_F[indices]
        return SparseCodes(values, indices, self.cfg.d_sae, offsets).view(*x.shape[:-1])

    def _encode_rows(self, x_BD: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values and indices; and offsets, if tokens have differing numbers of latents."""
        return *topk_encode(x_BD, self.W_enc.T, self.cfg.k, by_magnitude=self._by_magnitude, **options), None

    @override
    def _selection_scale(self) -> Tensor | None:
        """||W_dec[f]||, by which SAELens multiplies latents before it selects them."""
        return self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None


class SparseTopKTrainingSAE(SparseTopK, SparseTrainingSAE, TopKTrainingSAE):
    """A TopK SAE in training (Gao et al. 2024), under SAELens's trainer or any loop; saved for inference as ``topk``.

    Equal to SAELens's ``TopKTrainingSAE`` in outputs, losses and gradients, its rescaling by decoder norms and its
    auxiliary loss included. Where the norms rescale, they take part in the selection only: in the reconstruction
    they cancel, and so do their gradients.
    With a hook on the dense latents, a step runs densely, as SAELens's own.
    """

    @override
    def encode(self, x: Tensor) -> Tensor:
        """Dense latents [..., F] of x [..., D]."""
        if has_hooks(self.hook_sae_acts_pre):
            return TopKTrainingSAE.encode(self, differentiable(x))
        return self.hook_sae_acts_post(self.encode_sparse(x).to_dense())

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As SAELens's, dense with use_sparse_activations too, whose products with norms lack gradients on a CPU."""
        acts, pre = super().encode_with_hidden_pre(x)
        return acts.to_dense() if acts.is_sparse else acts, pre

    def _selection(self, n_tokens: int) -> Selection:  # noqa: ARG002, each token has k
        """How many latents a training step selects, and of what."""
        return Selection(self.cfg.k, self._by_magnitude)

    @override
    def _decode_dense(self, feature_acts: Tensor) -> Tensor:
        return TopKTrainingSAE.decode(self, feature_acts)

    @property
    @override
    def encoder_precision(self) -> EncoderPrecision:
        # Under override() the config is SAELens's own, which has no such field.
        return self.cfg.encoder_precision if isinstance(self.cfg, SPARSE_CONFIGS) else "full"

    @override
    def latent_parameters(self) -> LatentParameters:
        return LatentParameters(self.W_enc, self.W_dec, self.b_enc)

    @property
    def _takes_dense_steps(self) -> bool:
        """Whether a step with hooks on dense latents is not SAELens's."""
        return False

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if self._takes_dense_steps or not self.has_dense_hooks:
            return super().training_forward_pass(step_input)
        lead = step_input.sae_in.shape[:-1]
        output = self._dense_step(replace(step_input, sae_in=activation_rows(step_input.sae_in, self.cfg.d_in)))
        output.sae_in = step_input.sae_in
        if len(lead) != 1:
            for name in ("sae_out", "feature_acts", "hidden_pre"):
                t = vars(output)[name]
                setattr(output, name, t.reshape(*lead, t.shape[-1]))
        return output

    def _dense_step(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens's, of rows [B, D]."""
        return TopKTrainingSAE.training_forward_pass(self, step_input)

    @override
    def _autoencode(
        self, inputs_BD: Tensor, assignment: Assignment | None, dead: DeadLatents, row_grads: RowGrads | None
    ) -> tuple[Reconstruction, Tensor]:
        with torch.no_grad():
            scale_F = self._selection_scale()
        selection = self._selection(len(inputs_BD))
        result = sparse_autoencode(
            inputs_BD,
            self.W_enc.T,
            self.W_dec,
            selection.k,
            pre_bias_D=self.pre_bias,
            bias_F=self.b_enc,
            scale_F=scale_F,
            dead_N=dead.indices_N,
            aux_k=dead.aux_k,
            dead_counts=[n for n in dead.counts if n],
            row_grads=row_grads,
            encoder_precision=self.encoder_precision,
            by_magnitude=selection.by_magnitude,
            over_batch=selection.over_batch,
            ends_L=selection.ends_L,
        )
        values = result.values_BK.detach()
        return result, values if scale_F is None else values * scale_F[result.indices_BK]


class SparseAbsTopKTrainingSAE(SparseTopKTrainingSAE, AbsTopKTrainingSAE):
    """An AbsTopK SAE in training (arXiv 2510.00404), under SAELens's trainer or any loop; saved as ``abstopk``.

    Equal to SAELens's ``AbsTopKTrainingSAE``: the k pre-activations farthest from 0 are active, with their signs.
    """

    _by_magnitude = True
