"""Sparse or dense inside an expert: the one decision of speed, taken here for all products of codes."""

from types import ModuleType

import torch
from torch import Tensor

from sae_lens_switch_kernels.backend import SelfChecked
from sae_lens_switch_kernels.indexing import CodeRows, ExpertGroups, active_latent_index, n_rows
from sae_lens_switch_kernels.several_experts import OwnGates
from sae_lens_switch_kernels.torch_codes import latent_sums

# Dense if the expert has at most this many latents per active one: the matrix product then beats the gather.
# Measured on a CPU (kernels/README.md). On a GPU from the products measured on an H200 (docs/gpu): the lines of decode,
# dots and both weight gradients cross at 31 (D 768) and 43 (D 2,304) in bfloat16, at 7 and 11 in float32, and at 15 and
# below 6 where float32 is multiplied as TF32, whose weight gradients are slow.
_DENSE_UP_TO = {"cpu": 2}
_DENSE_UP_TO_ON_GPU = {2: 32, 4: 8}  # by the bytes of a number


def is_dense(n_latents: int, K: int, groups: ExpertGroups, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products within an expert are dense, by its latents per active one and the dtype of products.

    A rule, not a measurement at first use: a run that is resumed, or repeated, must take the same route.
    """
    up_to = _DENSE_UP_TO.get(device.type, _DENSE_UP_TO_ON_GPU[2 if dtype.itemsize <= 2 else 4])
    return K * up_to >= n_latents // (len(groups.offsets_E1) - 1)


class CodeProducts:
    """The products of codes whose indices are fixed: sparse, or dense within each expert where experts are small.

    Args:
        p: The primitives of a backend.
        indices_BK: Active latents, rows sorted by expert.
        n_latents: Latents that the indices count over, F.
        groups: The tokens of each expert.
        dtype: Dtype of dense products.
        active_only: Whether ``weight_grads`` returns the rows of active latents alone, which is always sparse.
        rows: Of codes [S] whose number varies by row: always sparse.
    """

    def __init__(
        self,
        p: ModuleType | SelfChecked,
        indices_BK: Tensor,
        n_latents: int,
        groups: ExpertGroups,
        dtype: torch.dtype,
        active_only: bool = False,
        rows: CodeRows | None = None,
    ) -> None:
        self.p, self.indices_BK, self.n_latents, self.groups = p, indices_BK, n_latents, groups
        self.active_only, self.dense_options = active_only, (groups, dtype)
        self.rows = rows
        is_sparse = active_only or rows is not None
        self.dense = not is_sparse and is_dense(n_latents, indices_BK.shape[1], groups, indices_BK.device, dtype)

    @property
    def is_empty(self) -> bool:
        """Whether there are no codes at all, of which neither compressed products nor kernels can be asked."""
        return self.indices_BK.numel() == 0

    @property
    def _offsets_Q1(self) -> Tensor | None:
        return None if self.rows is None else self.rows.offsets_Q1

    def decode_gated(
        self, gating: ModuleType | SelfChecked | OwnGates, values_BK: Tensor, gates_B: Tensor | None, W_FD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values times gates, decoded; them; values and indices. All in the order of the tokens; values are sorted."""
        if self.dense and gating is self.p:
            return self.p.gated_decode(values_BK, self.indices_BK, gates_B, W_FD, *self.dense_options)
        found = gating.unsorted_codes(values_BK, self.indices_BK, gates_B, self.groups)
        sorted_acts_BK, acts_BK, values_BK, indices_BK = found
        return self.decode(sorted_acts_BK, W_FD), acts_BK, values_BK, indices_BK

    def decode(self, values_BK: Tensor, W_FD: Tensor) -> Tensor:
        """In the order of the tokens, a vector per level of each."""
        if self.is_empty:
            return W_FD.new_zeros(n_rows(self.indices_BK, self._offsets_Q1), W_FD.shape[1])
        if self.dense:
            return self.p.grouped_decode(values_BK, self.indices_BK, W_FD, *self.dense_options)
        return self.groups.unsorted(self.p.sparse_decode(values_BK, self.indices_BK, W_FD, self._offsets_Q1))

    def decode_tokens(self, values_BK: Tensor, W_FD: Tensor) -> Tensor:
        """As ``decode``, a vector per token."""
        if self.rows is None:
            return self.decode(values_BK, W_FD)
        return self.p.sparse_decode(values_BK, self.indices_BK, W_FD, self.rows.offsets_B1.contiguous())

    def matmul_at_indices(self, g_BD: Tensor, W_FD: Tensor) -> Tensor:
        if self.is_empty:
            return g_BD.new_empty(self.indices_BK.shape)
        if self.dense:
            return self.p.grouped_matmul_at_indices(g_BD, W_FD, self.indices_BK, *self.dense_options)
        return self.p.matmul_at_indices(g_BD, W_FD, self.indices_BK, self._offsets_Q1)

    def weight_grads(
        self, values_BK: Tensor, g_BD: Tensor, d_pre_BK: Tensor, x_BD: Tensor, radial_BK: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Gradients per latent.

        Returns:
            The latents that have a row, None for all; and dW_dec, dW_enc, d_bias and, if ``radial_BK`` is given, its
            sum per latent.
        """
        if self.is_empty:
            rows_R = self.indices_BK.new_empty(0, dtype=torch.long) if self.active_only else None
            n, shapes = 0 if self.active_only else self.n_latents, (g_BD.shape[1:], x_BD.shape[1:], (), ())
            return rows_R, tuple(g_BD.new_zeros(n, *shape) for shape in shapes[: 3 if radial_BK is None else 4])
        if self.dense:
            grads = self.p.grouped_weight_grads(
                values_BK, self.indices_BK, g_BD, d_pre_BK, x_BD, self.n_latents, *self.dense_options
            )
            return None, grads if radial_BK is None else (
                *grads,
                latent_sums(radial_BK, self.indices_BK, self.n_latents),
            )
        if self.active_only:
            rows_R, index = active_latent_index(self.indices_BK)
        else:
            rows_R, index = None, self.p.latent_index(self.indices_BK, self.n_latents)
        grads = self.p.latent_weight_grads(index, values_BK, g_BD, d_pre_BK, x_BD, self.rows)
        return rows_R, grads if radial_BK is None else (*grads, index.sums(radial_BK.flatten()[index.order_S]))
