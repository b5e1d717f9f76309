"""Sparse or dense inside an expert: the one decision of speed, taken here for all products of codes."""

from types import ModuleType

import torch
from torch import Tensor

from sae_lens_switch_kernels import torch_backend
from sae_lens_switch_kernels.backend import SelfChecked
from sae_lens_switch_kernels.indexing import ExpertGroups, active_latent_index, latent_index

# Dense if the expert has at most this many latents per active one: the matrix product then beats the gather.
# Measured on a CPU (kernels/README.md); on a GPU predicted from its bandwidth and matrix rate.
_DENSE_UP_TO = {"cpu": 2}
_DENSE_UP_TO_ON_GPU = 128


class CodeProducts:
    """The products of codes whose indices are fixed: sparse, or dense within each expert where experts are small.

    Args:
        p: The primitives of a backend.
        indices_BK: Active latents, rows sorted by expert.
        n_latents: Latents that the indices count over, F.
        groups: The tokens of each expert.
        dtype: Dtype of dense products.
        active_only: Whether ``weight_grads`` returns the rows of active latents alone, which is always sparse.
    """

    def __init__(
        self,
        p: ModuleType | SelfChecked,
        indices_BK: Tensor,
        n_latents: int,
        groups: ExpertGroups,
        dtype: torch.dtype,
        active_only: bool = False,
    ) -> None:
        self.p, self.indices_BK, self.n_latents, self.dense_options = p, indices_BK, n_latents, (groups, dtype)
        self.active_only = active_only
        M, K = n_latents // (len(groups.offsets_E1) - 1), indices_BK.shape[1]
        self.dense = not active_only and K * _DENSE_UP_TO.get(indices_BK.device.type, _DENSE_UP_TO_ON_GPU) >= M

    def decode(self, values_BK: Tensor, W_FD: Tensor) -> Tensor:
        if self.dense:
            return self.p.grouped_decode(values_BK, self.indices_BK, W_FD, *self.dense_options)
        return self.p.sparse_decode(values_BK, self.indices_BK, W_FD)

    def matmul_at_indices(self, g_BD: Tensor, W_FD: Tensor) -> Tensor:
        if self.dense:
            return self.p.grouped_matmul_at_indices(g_BD, W_FD, self.indices_BK, *self.dense_options)
        return self.p.matmul_at_indices(g_BD, W_FD, self.indices_BK)

    def weight_grads(
        self, values_BK: Tensor, g_BD: Tensor, d_pre_BK: Tensor, x_BD: Tensor, radial_BK: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Gradients per latent.

        Returns:
            The latents that have a row, None for all; and dW_dec, dW_enc, d_bias and, if ``radial_BK`` is given, its
            sum per latent.
        """
        if self.dense:
            dW_dec_FD, dW_enc_FD = (
                self.p.grouped_weight_grad(v_BK, self.indices_BK, y_BD, self.n_latents, *self.dense_options)
                for v_BK, y_BD in ((values_BK, g_BD), (d_pre_BK, x_BD))
            )
            sums = [self._dense_sums(t_BK) for t_BK in (d_pre_BK, radial_BK) if t_BK is not None]
            return None, (dW_dec_FD, dW_enc_FD, *sums)
        if self.active_only:
            rows_R, index = active_latent_index(self.indices_BK)
        else:
            rows_R, index = None, latent_index(self.indices_BK, self.n_latents)
        grads = self.p.latent_weight_grads(index, values_BK, g_BD, d_pre_BK, x_BD)
        return rows_R, grads if radial_BK is None else (*grads, index.sums(radial_BK.flatten()[index.order_S]))

    def _dense_sums(self, t_BK: Tensor) -> Tensor:
        """Each latent's sum, [F], in a fixed order: on a GPU index_add_ has none, and sums in t's dtype."""
        if t_BK.device.type == "cpu" and self.p is torch_backend:
            return t_BK.new_zeros(self.n_latents).index_add_(0, self.indices_BK.flatten(), t_BK.flatten())
        ones_B1 = t_BK.new_ones(len(t_BK), 1)
        sums_F1 = self.p.grouped_weight_grad(t_BK, self.indices_BK, ones_B1, self.n_latents, *self.dense_options)
        return sums_F1.squeeze(1)
