"""Which latents belong to which expert: asked here, computed nowhere else; without torch, which is slow to load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class ExpertLayout:
    """The shared part has the first S latents; expert e owns the M latents from ``S + e * M`` on.

    Attributes:
        d_sae: F, all latents.
        n_experts: E, the experts that tokens are routed to.
        shared_width: S, latents that every token may use.
    """

    d_sae: int
    n_experts: int = 1
    shared_width: int = 0

    @classmethod
    def of(cls, d_sae: int, n_experts: int, n_shared_experts: int, shared_width: int | None) -> ExpertLayout:
        """As a config has them; ``shared_width`` None: all experts, shared or not, are equally wide."""
        if shared_width is None:
            shared_width = n_shared_experts * (d_sae // (n_experts + n_shared_experts))
        return cls(d_sae, n_experts, shared_width)

    @classmethod
    def of_fields(cls, fields: Mapping[str, object]) -> ExpertLayout | None:
        """Of a config as a file has it; None where there is no router, or no layout."""
        d_sae, n_experts = fields.get("d_sae"), fields.get("n_experts")
        n_shared, width = fields.get("n_shared_experts", 0), fields.get("shared_width")
        if not isinstance(d_sae, int) or not isinstance(n_experts, int) or not isinstance(n_shared, int):
            return None
        if n_experts < 1 or n_shared < 0:
            return None
        layout = cls.of(d_sae, n_experts, n_shared, width if isinstance(width, int) else None)
        return layout if layout.is_possible else None

    @property
    def is_possible(self) -> bool:
        """Whether every expert has equally many latents, and at least one."""
        n_routed = self.d_sae - self.shared_width
        return self.shared_width >= 0 and n_routed >= self.n_experts and n_routed % self.n_experts == 0

    @property
    def expert_width(self) -> int:
        """M, the latents of one expert."""
        return (self.d_sae - self.shared_width) // self.n_experts

    def latents_of(self, expert: int) -> slice:
        first = self.shared_width + expert * self.expert_width
        return slice(first, first + self.expert_width)

    def expert_of(self, latent: int) -> int:
        """-1 for a shared latent."""
        return max(-1, (latent - self.shared_width) // self.expert_width)

    def owner_of(self, latent: int) -> str:
        """In words."""
        return "shared" if latent < self.shared_width else f"expert {self.expert_of(latent)}"

    def experts_of(self, latents: Tensor) -> Tensor:
        """-1 for shared latents."""
        if self.shared_width == 0:
            return latents // self.expert_width
        return ((latents - self.shared_width) // self.expert_width).clamp_min(-1)

    @property
    def n_owners(self) -> int:
        """The experts; and the shared part, if there is one, which comes before them."""
        return self.n_experts + (self.shared_width > 0)

    def owners_of(self, latents: Tensor) -> Tensor:
        """Counted from 0, the shared part first."""
        return self.experts_of(latents) + (self.shared_width > 0)

    def of_experts(self, t_O: Tensor) -> Tensor:
        """[E], a view of what there is one of per owner."""
        return t_O[-self.n_experts :]

    def firsts(self, t_F: Tensor) -> Tensor:
        """What there is for the first latent of each owner, [n_owners]."""
        return t_F[[*([0] if self.shared_width else []), *range(self.shared_width, self.d_sae, self.expert_width)]]

    def per_latent(self, t_O: Tensor) -> Tensor:
        """[F], what each latent's owner has."""
        import torch

        return t_O[self.owners_of(torch.arange(self.d_sae, device=t_O.device))]

    def positions(self, device: torch.device) -> Tensor:
        """[F], the place of each latent among those of its expert; 0 of shared ones."""
        import torch

        return (torch.arange(self.d_sae, device=device) - self.shared_width).clamp_min(0) % self.expert_width

    def shared(self, t_F: Tensor) -> Tensor:
        """[S] of what there is one of per latent."""
        return t_F[: self.shared_width]

    def by_expert(self, t_F: Tensor) -> Tensor:
        """[E, M] of what there is one of per latent, [F], without the shared ones; or [E, M, ...] of [F, ...]."""
        return t_F[self.shared_width :].reshape(self.n_experts, self.expert_width, *t_F.shape[1:])

    def latents(self, experts: Tensor) -> Tensor:
        """All latents of tokens with these experts, [..., A] to [..., S + A * M]."""
        import torch

        M, lead = self.expert_width, experts.shape[:-1]
        within = self.shared_width + torch.arange(M, device=experts.device)
        routed = (experts.unsqueeze(-1) * M + within).flatten(-2)
        return torch.cat([torch.arange(self.shared_width, device=experts.device).expand(*lead, -1), routed], dim=-1)
