"""Whether the router still spreads tokens over experts; and what can be done when it does not."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sae_lens_switch.common.printable import logger
from sae_lens_switch.saes.router import router_logits
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam

# The running load forgets with this share a step.
_FORGET = 0.02
# Twins split the busiest expert's tokens by logits this many times as wide as the router's own: a token then goes to
# one of the two with nearly all of the probability that the busiest had.
_TWIN_WIDTH = 2.0


@dataclass(frozen=True)
class Collapse:
    """What has gone wrong: experts without tokens, and an expert with too many, each for ``patience`` steps."""

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


REMEDY = (
    "raise load_balance_coefficient or lower the learning rate; or let the trainer counter it: "
    "on_collapse='raise_coefficient' or 'reseed'"
)


class RoutingMonitor:
    """Running statistics of the routing, on the device of the SAE: nothing is read back until asked for."""

    def __init__(self, n_experts: int, share: float | None, patience: int, device: Any) -> None:
        self.share = (1 + 1 / n_experts) / 2 if share is None else share
        self.patience = patience
        self.load_E = torch.full((n_experts,), 1 / n_experts, device=device)
        self.last_load_E = self.load_E
        self.steps_without_E = torch.zeros(n_experts, device=device)
        self.steps_too_busy = torch.zeros((), device=device)

    @torch.no_grad()
    def update(self, load_E: Tensor) -> None:
        load_E = load_E.to(self.load_E.dtype)
        self.last_load_E = load_E
        self.load_E.lerp_(load_E, _FORGET)
        self.steps_without_E.add_(1).mul_(load_E == 0)
        self.steps_too_busy.add_(1).mul_(load_E.max() > self.share)

    @property
    def dead_experts(self) -> Tensor:
        return self.steps_without_E >= self.patience

    def collapse(self) -> Collapse | None:
        """Reads the statistics back from the device."""
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
        return {name: getattr(self, name) for name in ("load_E", "steps_without_E", "steps_too_busy")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)


@torch.no_grad()
def reseed(sae: Any, optimizer: Optimizer, x_BD: Tensor, experts: Iterable[int]) -> list[tuple[int, int]]:
    """Make each of ``experts`` a twin of the expert with most tokens of the batch, and let the two share its tokens.

    The twin gets the other's encoder, decoder and moments, so that the reconstruction stays what it was. The two
    columns of the router are set apart, by as much in opposite directions, along a difference of two of its tokens.
    Returns the pairs (twin, expert); none where the router, encoder or decoder is frozen, since a twin needs all three.
    """
    frozen = [name for name in ("W_router", "W_enc", "W_dec") if not getattr(sae, name).requires_grad]
    if frozen:
        logger.warning(f"on_collapse='reseed' changes nothing, because {' and '.join(frozen)} have requires_grad=False")
        return []
    E, M = sae.cfg.n_experts, sae.cfg.d_sae // sae.cfg.n_experts
    bias = sae._router_bias()
    pairs = []
    for expert in experts:
        logits_BE = router_logits(x_BD, sae.W_router, bias)
        chosen_B = logits_BE.argmax(dim=1)
        busiest = int(torch.bincount(chosen_B, minlength=E).argmax())
        mine_BD = x_BD[chosen_B == busiest].to(sae.W_router.dtype)
        if expert == busiest or len(mine_BD) < 2:
            continue
        first, second = torch.randperm(len(mine_BD))[:2].tolist()
        direction_D = mine_BD[first] - mine_BD[second]
        along_B = (mine_BD - mine_BD.mean(dim=0)) @ direction_D
        direction_D *= _TWIN_WIDTH * logits_BE.std() / along_B.std().clamp_min(1e-30)
        # What the split would add to all of the busiest's tokens alike is no split: it is taken out.
        offset = ((mine_BD.mean(dim=0) - bias) @ direction_D) / (mine_BD.mean(dim=0) - bias).square().sum()
        direction_D -= offset * (mine_BD.mean(dim=0) - bias)
        sae.W_router[:, expert] = sae.W_router[:, busiest] - direction_D
        sae.W_router[:, busiest] += direction_D
        target, source = (slice(e * M, (e + 1) * M) for e in (expert, busiest))
        for p, latent_dim in ((sae.W_enc, 1), (sae.W_dec, 0)):
            p.detach().narrow(latent_dim, target.start, M).copy_(p.detach().narrow(latent_dim, source.start, M))
            for t in _state(p, optimizer):
                where = 0 if isinstance(optimizer, RowSparseAdam) else latent_dim
                t.narrow(where, target.start, M).copy_(t.narrow(where, source.start, M))
        for t in _state(sae.W_router, optimizer):
            t.view(-1, *sae.W_router.shape)[..., expert] = 0  # row-sparse Adam keeps both moments in one tensor
        pairs.append((expert, busiest))
    return pairs


def _state(p: nn.Parameter, optimizer: Optimizer) -> list[Tensor]:
    """What the optimiser keeps for each of the parameter's entries or rows."""
    return [t for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor) and t.numel() > 1]
