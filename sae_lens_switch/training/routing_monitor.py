"""Whether the router still spreads tokens over the experts."""

from dataclasses import dataclass

import torch
import wandb
from sae_lens_switch_kernels import update_loads
from torch import Tensor

from sae_lens_switch.saes.expert_layout import ExpertLayout

# EMA decay of the running expert load, per step.
_LOAD_DECAY = 0.02


@dataclass(frozen=True)
class Collapse:
    """What has gone wrong for ``patience`` steps: experts without tokens, or an expert with too many."""

    without_tokens: list[int]
    busiest: int
    busiest_load: float
    too_busy: bool

    def describe(self, patience: int) -> str:
        found = []
        if self.too_busy:
            found.append(f"expert {self.busiest} has taken {self.busiest_load:.0%} of the tokens for {patience} steps")
        if self.without_tokens:
            names = ", ".join(map(str, self.without_tokens[:8])) + (", ..." if len(self.without_tokens) > 8 else "")
            found.append(f"{len(self.without_tokens)} experts ({names}) have had no token for {patience} steps")
        return "the router has collapsed: " + "; ".join(found)


class RoutingMonitor:
    """Running statistics of the routing on the SAE's device, read back lazily."""

    def __init__(self, layout: ExpertLayout, share: float | None, patience: int, device: str) -> None:
        n_experts = layout.n_experts
        self.share = (1 + 1 / n_experts) / 2 if share is None else share
        self.layout, self.patience = layout, patience
        self.load_E = torch.full((n_experts,), 1 / n_experts, device=device)
        self.last_load_E = self.load_E
        self.steps_without_E = torch.zeros(n_experts, device=device)
        self.steps_too_busy = torch.zeros((), device=device)

    @torch.no_grad()
    def update(self, load_E: Tensor) -> None:
        load_E = load_E.to(self.load_E.dtype)
        self.last_load_E = load_E
        update_loads(load_E, self.load_E, self.steps_without_E, self.steps_too_busy, _LOAD_DECAY, self.share)

    @property
    def dead_experts(self) -> Tensor:
        return self.steps_without_E >= self.patience

    def collapse(self) -> Collapse | None:
        """Waits for the device."""
        without = self.dead_experts.nonzero().flatten().tolist()
        too_busy = bool(self.steps_too_busy >= self.patience)
        if not without and not too_busy:
            return None
        busiest = int(self.last_load_E.argmax())
        return Collapse(without, busiest, float(self.last_load_E[busiest]), too_busy)

    def start_over(self) -> None:
        """After a counter-measure: give it ``patience`` steps before the next."""
        self.steps_without_E.zero_()
        self.steps_too_busy.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "load_E": self.load_E,
            "steps_without_E": self.steps_without_E,
            "steps_too_busy": self.steps_too_busy,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    def metrics(self) -> dict[str, float]:
        """Of the running load, for logs. Waits for the device."""
        loads = {f"routing/load_expert_{e}": load for e, load in enumerate(self.load_E.tolist())}
        return {"routing/dead_experts": int(self.dead_experts.sum()), **loads}

    def histograms(
        self, dead_F: Tensor, density_F: Tensor | None, gates_B: Tensor | None
    ) -> dict[str, wandb.Histogram]:
        """Of loads, of each expert's dead latents and mean latent density, and of the gates, for W&B."""
        values = {
            "load": self.load_E,
            "dead_latents": self.layout.by_expert(dead_F).sum(1),
            "latent_density": None if density_F is None else self.layout.by_expert(density_F).mean(1),
            "gates": gates_B,
        }
        # numpy makes bins for finite numbers only, and in float32 not for those that are very close.
        return {
            f"routing/{name}_histogram": wandb.Histogram(t[t.isfinite()].double().cpu().numpy())  # type: ignore[arg-type]
            for name, t in values.items()
            if t is not None
        }
