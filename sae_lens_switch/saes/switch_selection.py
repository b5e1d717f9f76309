"""Which latents a Switch SAE selects: k per token, k per token on average over the batch, or all above a threshold.

Letters: N latents that a token may choose from.
"""

from typing import NamedTuple

import torch
from sae_lens_switch_kernels import (
    EncoderPrecision,
    batch_topk_encode,
    matmul_at_indices,
    switch_encode,
    threshold_encode,
)
from torch import Tensor

from sae_lens_switch.saes.config import SwitchSAEConfig, SwitchTrainingSAEConfig
from sae_lens_switch.saes.sparse_codes import SparseCodes


class SwitchSelection(NamedTuple):
    """How latents are selected.

    Attributes:
        cfg: Layout, ``activation`` and k.
        precision: Of the product that selects, unless a threshold does.
        threshold_O: With "jumprelu", what the latents of the shared part, if there is one, and of each expert must
            exceed, gate included.
    """

    cfg: SwitchSAEConfig | SwitchTrainingSAEConfig
    precision: EncoderPrecision
    threshold_O: Tensor | None

    def encode(
        self, x_BD: Tensor, W_FD: Tensor, pre_bias_D: Tensor | None, expert_BA: Tensor, gates_BA: Tensor | None
    ) -> SparseCodes:
        """The codes without their gates."""
        layout, d_sae = self.cfg.layout, self.cfg.d_sae
        E, S = layout.n_experts, layout.shared_width
        if self.threshold_O is not None:
            centered_BD = x_BD if pre_bias_D is None else x_BD - pre_bias_D
            values, indices, offsets = threshold_encode(
                centered_BD, W_FD, self._threshold_F, expert_B=expert_BA, n_experts=E, n_shared=S, gates_B=gates_BA
            )
            if torch.is_grad_enabled():
                values = matmul_at_indices(centered_BD, W_FD, indices, offsets)
            return SparseCodes(values, indices, d_sae, offsets, (len(x_BD),))
        if self.cfg.activation == "batchtopk":
            values, indices, offsets = batch_topk_encode(
                x_BD,
                W_FD,
                self.n_active(len(x_BD)),
                expert_B=expert_BA,
                n_experts=E,
                n_shared=S,
                gates_B=gates_BA,
                pre_bias_D=pre_bias_D,
                encoder_precision=self.precision,
            )
            return SparseCodes(values, indices, d_sae, offsets, (len(x_BD),))
        values, indices = switch_encode(
            x_BD,
            expert_BA,
            W_FD,
            self.cfg.k,
            E,
            n_shared=S,
            gates_B=gates_BA,
            pre_bias_D=pre_bias_D,
            encoder_precision=self.precision,
        )
        return SparseCodes(values, indices, d_sae)

    def n_active(self, n_tokens: int) -> int:
        """What the kernels count: per token, or of all tokens."""
        return self.cfg.k * (n_tokens if self.cfg.activation == "batchtopk" else 1)

    @property
    def ranks_over_tokens(self) -> bool:
        """Whether latents of different tokens, and so with different gates, are ranked with each other."""
        return self.cfg.activation == "batchtopk"

    def of_dense(self, pre_BN: Tensor, ranked_BN: Tensor, latent_BN: Tensor) -> SparseCodes:
        """As ``encode``, of all that each token may choose from, [..., N]; ``ranked`` decides, gate included."""
        d_sae = self.cfg.d_sae
        if self.threshold_O is None and not self.ranks_over_tokens:
            place_BK = ranked_BN.topk(self.cfg.k, dim=-1).indices
            return SparseCodes(pre_BN.gather(-1, place_BK).relu(), latent_BN.gather(-1, place_BK), d_sae)
        if self.threshold_O is not None:
            is_active = ~(ranked_BN <= self._threshold_F[latent_BN])
        else:
            flat = ranked_BN.flatten()
            places = flat.topk(self.n_active(ranked_BN.shape[:-1].numel())).indices
            is_active = torch.zeros_like(flat, dtype=torch.bool).index_fill(0, places, True).view(ranked_BN.shape)
        return SparseCodes(torch.where(is_active, pre_BN.relu(), 0), latent_BN, d_sae)

    @property
    def _threshold_F(self) -> Tensor:
        """What is negative, ReLU removes."""
        assert self.threshold_O is not None
        return self.cfg.layout.per_latent(self.threshold_O.clamp_min(0))
