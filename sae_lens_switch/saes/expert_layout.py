"""Which latents belong to which expert: asked here, computed nowhere else."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ExpertLayout:
    """Expert e owns the latents ``e * M`` to ``(e + 1) * M``.

    Attributes:
        d_sae: F, all latents.
        n_experts: E.
    """

    d_sae: int
    n_experts: int = 1

    @property
    def expert_width(self) -> int:
        """M, the latents of one expert."""
        return self.d_sae // self.n_experts

    def latents_of(self, expert: int) -> slice:
        return slice(expert * self.expert_width, (expert + 1) * self.expert_width)

    def expert_of(self, latent: int) -> int:
        return latent // self.expert_width

    def experts_of(self, latents: Tensor) -> Tensor:
        return latents // self.expert_width

    def by_expert(self, t_F: Tensor) -> Tensor:
        """[E, M] of what there is one of per latent, [F]; or [E, M, ...] of [F, ...]."""
        return t_F.reshape(self.n_experts, self.expert_width, *t_F.shape[1:])
