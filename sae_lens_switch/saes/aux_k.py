"""AuxK (Gao et al. 2024, A.2): dead latents reconstruct what the active ones leave."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from sae_lens_switch_kernels import Reconstruction
from torch import Tensor

from sae_lens_switch.saes.expert_layout import ExpertLayout
from sae_lens_switch.saes.router import Assignment
from sae_lens_switch.saes.step import DeadLatents


class AuxKTrainingSAE(TrainingSAE[Any], ABC):
    """The part of a sparse SAE that says which latents AuxK may use, and what its loss is."""

    @property
    @abstractmethod
    def expert_layout(self) -> ExpertLayout | None:
        """None without a router."""

    @property
    def aux_k(self) -> int:
        """Number of dead latents that reconstruct each token's residual: d_in / 2, as in SAELens."""
        return self.cfg.d_in // 2

    @property
    def _reports_aux_loss(self) -> bool:
        return True

    def _most_dead(self, dead_F: Tensor, n_dead: int) -> int:  # noqa: ARG002, there is one expert
        """The number of dead latents of the expert that has most."""
        return n_dead

    def _n_dead(
        self,
        dead_N: Tensor,
        dead_F: Tensor | None,  # noqa: ARG002
        assignment: Assignment | None,  # noqa: ARG002
    ) -> Tensor | int:
        """Number of dead latents available to each token: one number, or [B]."""
        return dead_N.sum() if dead_N.dtype == torch.bool else len(dead_N)

    def _dead_latents(self, dead_F: Tensor | None) -> DeadLatents:
        """Waits for the device, where there is an auxiliary loss."""
        if dead_F is None or self.cfg.aux_loss_coefficient == 0:
            return DeadLatents(None, 0)
        dead_N = dead_F.nonzero().flatten()
        aux_k = min(self.aux_k, self._most_dead(dead_F, len(dead_N)))
        if aux_k == 0:
            return DeadLatents(None, 0)
        self._check_residual()
        return DeadLatents(dead_N, aux_k)

    def _masked_dead(self, dead_F: Tensor | None) -> DeadLatents:
        """The same latents as ``_dead_latents``, at the price of encoding all, without waiting for the device."""
        if dead_F is None or self.cfg.aux_loss_coefficient == 0:
            return DeadLatents(None, 0)
        self._check_residual()
        return DeadLatents(dead_F, self.aux_k)

    @property
    def can_mask_dead(self) -> bool:
        """Whether a step can do without the number of dead latents."""
        layout = self.expert_layout
        return self.aux_k <= (self.cfg.d_sae if layout is None else layout.expert_width)

    def _check_residual(self) -> None:
        if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise ValueError(
                "aux_loss_coefficient must be 0 with normalize_activations="
                f"{self.cfg.normalize_activations!r}: dead latents would reconstruct a normalised residual"
            )

    def _aux_loss(
        self,
        x_BD: Tensor,
        sae_out_BD: Tensor,
        result: Reconstruction,
        dead: DeadLatents,  # noqa: ARG002
        n_dead: Tensor | int,
    ) -> Tensor:
        """coefficient * min(1, n_dead / aux_k) * mean_B ||aux_out - (x - sae_out)||^2; n_dead in all, or per token."""
        aux_out_BD = result.aux_out_BD
        assert aux_out_BD is not None
        residual = (x_BD - sae_out_BD).detach()
        error_B = (self.reshape_fn_out(aux_out_BD, self.d_head) - residual).pow(2).sum(dim=-1)
        # The number is filled in on the device: a copy from the host would wait for it.
        count = n_dead.to(error_B.dtype) if isinstance(n_dead, Tensor) else error_B.new_full((), n_dead)
        return self.cfg.aux_loss_coefficient * ((count / self.aux_k).clamp(max=1) * error_B).mean()
