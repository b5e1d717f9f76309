"""The response to a collapsed router: a warning, a higher coefficient, or a new start for idle experts."""

from collections.abc import Iterable, Mapping

import torch
from sae_lens.training.optim import CoefficientScheduler
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sae_lens_switch.common.printable import logger
from sae_lens_switch.saes.router import router_logits
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE
from sae_lens_switch.training.field_rules import OnCollapse
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam
from sae_lens_switch.training.routing_monitor import RoutingMonitor

# Twins split the busiest expert's tokens by logits this many times as wide as the router's own: a token then goes to
# one of the two with nearly all of the probability that the busiest had.
_TWIN_WIDTH = 2.0
_REMEDY = (
    "raise load_balance_coefficient, or load_balance_bias_rate, or lower the learning rate; or let the trainer counter "
    "it: on_collapse='raise_coefficient' or 'reseed'"
)


class CollapseResponse:
    """Looks at a RoutingMonitor now and then, warns once, and counters each collapse as ``on_collapse`` says."""

    def __init__(self, on_collapse: OnCollapse) -> None:
        self.on_collapse = on_collapse
        self.placement = ExpertPlacement()
        self.n_interventions = 0
        self.has_reported = False
        self.watched_at = 0

    def watch(
        self,
        monitor: RoutingMonitor,
        step: int,
        sae: nn.Module,
        optimizer: Optimizer,
        schedulers: Mapping[str, CoefficientScheduler],
        x_BD: Tensor,
    ) -> None:
        """Waits for the device, at most once in a quarter of the monitor's patience."""
        if step - self.watched_at < monitor.patience // 4:
            return
        self.watched_at = step
        collapse = monitor.collapse()
        if collapse is None:
            return
        if not self.has_reported:
            self.has_reported = True
            what = f"To do: {_REMEDY}" if self.on_collapse == "report" else f"on_collapse={self.on_collapse!r}"
            logger.warning(f"step {step - 1}: {collapse.describe(monitor.patience)}. {what}")
        if self.on_collapse == "report":
            return
        self.n_interventions += 1
        if self.on_collapse == "raise_coefficient":
            _double(schedulers["load_balance"])
        else:
            assert isinstance(sae, SwitchTrainingSAE)
            idle = collapse.without_tokens or [int(monitor.load_E.argmin())]
            reseed(sae, optimizer, self.placement.whole(x_BD), idle, self.placement)
        monitor.start_over()


def _double(scheduler: CoefficientScheduler) -> None:
    scheduler.final_value = 2 * scheduler.final_value or 0.1
    scheduler.warm_up_steps = 0
    scheduler.current_value = scheduler.final_value


class ExpertPlacement:
    """Where the experts that ``reseed`` copies are, and the tokens of a batch: all in this process."""

    def whole(self, x_BD: Tensor) -> Tensor:
        """The batch of all processes."""
        return x_BD

    def two_of(self, n: int) -> list[int]:
        """Two different numbers below n, by chance."""
        return torch.randperm(n)[:2].tolist()

    def copy(self, tensors: list[Tensor], source: slice, target: slice) -> None:
        """Copy latents over others, in place; the slices count all latents, and each tensor has a row per latent."""
        for t in tensors:
            t[target].copy_(t[source])


@torch.no_grad()
def reseed(
    sae: SwitchTrainingSAE,
    optimizer: Optimizer,
    x_BD: Tensor,
    experts: Iterable[int],
    placement: ExpertPlacement | None = None,
) -> list[tuple[int, int]]:
    """Make each of ``experts`` a twin of the expert with most tokens of the batch, and let the two share its tokens.

    The twin gets the other's encoder, decoder and moments, so that the reconstruction stays what it was. The two
    columns of the router are set apart, by as much in opposite directions, along a difference of two of its tokens.

    Args:
        sae: The SAE.
        optimizer: Its optimiser.
        x_BD: A batch, of all processes.
        experts: Which, of all.
        placement: Where the experts are. None: in this process.

    Returns:
        The pairs (twin, expert); none where the router, encoder or decoder is frozen, since a twin needs all three.
    """
    placement = ExpertPlacement() if placement is None else placement
    needed = {"W_router": sae.W_router, "W_enc": sae.W_enc, "W_dec": sae.W_dec}
    frozen = [name for name, p in needed.items() if not p.requires_grad]
    if frozen:
        logger.warning(f"on_collapse='reseed' changes nothing, because {' and '.join(frozen)} have requires_grad=False")
        return []
    layout, bias = sae.expert_layout, sae.effective_router_bias
    x_BD = sae.run_time_activation_norm_fn_in(x_BD.to(sae.dtype))  # what the router sees
    pairs = []
    for expert in experts:
        logits_BE = router_logits(x_BD, sae.W_router, bias)
        chosen_B = (logits_BE if sae.expert_bias is None else logits_BE + sae.expert_bias).argmax(dim=1)
        busiest = int(torch.bincount(chosen_B, minlength=layout.n_experts).argmax())
        mine_BD = x_BD[chosen_B == busiest].to(sae.W_router.dtype)
        if expert == busiest or len(mine_BD) < 2:
            continue
        first, second = placement.two_of(len(mine_BD))
        direction_D = mine_BD[first] - mine_BD[second]
        along_B = (mine_BD - mine_BD.mean(dim=0)) @ direction_D
        direction_D *= _TWIN_WIDTH * logits_BE.std() / along_B.std().clamp_min(1e-30)
        # What the split would add to all of the busiest's tokens alike is no split: it is taken out.
        offset = ((mine_BD.mean(dim=0) - bias) @ direction_D) / (mine_BD.mean(dim=0) - bias).square().sum()
        direction_D -= offset * (mine_BD.mean(dim=0) - bias)
        sae.W_router[:, expert] = sae.W_router[:, busiest] - direction_D
        sae.W_router[:, busiest] += direction_D
        if sae.expert_bias is not None:
            sae.expert_bias[expert] = sae.expert_bias[busiest]
        if sae.topk_threshold is not None:
            threshold_E = layout.of_experts(sae.topk_threshold)
            threshold_E[expert] = threshold_E[busiest]
        placement.copy(_latent_rows(sae, optimizer), layout.latents_of(busiest), layout.latents_of(expert))
        for t in _state(sae.W_router, optimizer):
            t.view(-1, *sae.W_router.shape)[..., expert] = 0  # row-sparse Adam keeps both moments in one tensor
        pairs.append((expert, busiest))
    return pairs


def _latent_rows(sae: SwitchTrainingSAE, optimizer: Optimizer) -> list[Tensor]:
    """All that belongs to latents, with a row for each."""
    rows = []
    for p, latent_dim in ((sae.W_enc, 1), (sae.W_dec, 0)):
        rows.append(p.detach().movedim(latent_dim, 0))
        where = 0 if isinstance(optimizer, RowSparseAdam) else latent_dim
        rows += [t.movedim(where, 0) for t in _state(p, optimizer)]
    return rows


def _state(p: nn.Parameter, optimizer: Optimizer) -> list[Tensor]:
    """What the optimiser keeps for each of the parameter's entries or rows."""
    return [t for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor) and t.numel() > 1]
