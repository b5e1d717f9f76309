"""TopK and BatchTopK transcoders on sparse kernels."""

from sae_lens.saes.topk_sae import TopKSAE
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.common.torch_private import has_hooks
from sae_lens_switch.saes.router import Assignment
from sae_lens_switch.saes.sparse_batchtopk_sae import SparseBatchTopKTrainingSAE
from sae_lens_switch.saes.sparse_topk_sae import SparseTopK, SparseTopKTrainingSAE
from sae_lens_switch.saes.step import differentiable
from sae_lens_switch.saes.transcoder import TrainingTranscoder, Transcoder


class SparseTopKTranscoder(Transcoder, SparseTopK, TopKSAE):
    """A trained TopK transcoder: SAELens's ``Transcoder`` with TopK for its ReLU; also with a skip connection.

    See ``encode``, ``encode_sparse``, ``decode`` and ``forward``.
    """

    @override
    def encode(self, x: Tensor) -> Tensor:
        if has_hooks(self.hook_sae_acts_pre):
            return TopKSAE.encode(self, differentiable(x))
        return self.hook_sae_acts_post(self.encode_sparse(x).to_dense())

    @override
    def _decode_dense(self, feature_acts: Tensor) -> Tensor:
        return TopKSAE.decode(self, feature_acts)


class SparseTopKTrainingTranscoder(TrainingTranscoder, SparseTopKTrainingSAE):
    """A TopK transcoder in training, saved for inference as ``sparse_topk_transcoder``.

    A batch has rows of d_in + d_out numbers, each token's input and then its target. With a hook on the dense latents,
    AuxK is left out.
    """

    @property
    @override
    def aux_k(self) -> int:
        """d_out / 2, as an SAE's is d_in / 2: half the width of the residual."""
        return self.cfg.output_width // 2

    @property
    @override
    def _takes_dense_steps(self) -> bool:
        return True

    @override
    def _encode_dense(self, inputs_BD: Tensor) -> tuple[Tensor, Tensor, Assignment | None]:
        pre_BF = self.hook_sae_acts_pre(inputs_BD @ self.W_enc + self.b_enc)
        scale_F = self._selection_scale()
        pre_BF = pre_BF if scale_F is None else pre_BF * scale_F
        acts_BF = self.hook_sae_acts_post(self.activation_fn(pre_BF))
        return acts_BF.to_dense() if acts_BF.is_sparse else acts_BF, pre_BF, None


class SparseBatchTopKTrainingTranscoder(SparseTopKTrainingTranscoder, SparseBatchTopKTrainingSAE):
    """A BatchTopK transcoder in training, saved as SAELens's ``jumprelu_transcoder``, or ``jumprelu_skip_transcoder``.

    A batch has rows of d_in + d_out numbers, each token's input and then its target.
    """
