"""Tokens sent to the processes that own their experts, with what a step must know of the batch as a whole.

Letter beside the package's: A active experts per token.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae_lens_switch.parallel.ranks import Ranks


@dataclass(frozen=True)
class RoutedBatch:
    """The tokens of this process, and facts about all tokens of the step.

    Attributes:
        x_BD: Its share of the batch; or tokens whose expert it owns, in the order of the whole batch.
        n_tokens: Tokens of the whole batch.
        load_E: Share of the whole batch's choices that each expert receives.
        mean_D: Mean of the whole batch.
        variance: Mean squared distance of its tokens from that mean.
        sizes: How many choices of each process fall on each place of its row.
    """

    x_BD: Tensor
    n_tokens: int
    load_E: Tensor
    mean_D: Tensor
    variance: Tensor
    sizes: list[list[int]]


def send_to_owners(x_BD: Tensor, expert_B: Tensor, n_experts: int, ranks: Ranks) -> RoutedBatch:
    """Send each token to the process that owns its expert.

    One all-gather of E + D + 1 numbers and one all-to-all of the tokens, whatever the width of the dictionary. The
    whole batch is that of the first rank, followed by that of the second, and so on; tokens arrive in this order.

    Args:
        x_BD: This process's share of the batch.
        expert_B: The expert of each token.
        n_experts: E.
        ranks: Who owns which experts.
    """
    batch = with_facts(x_BD, expert_B.unsqueeze(1), n_experts, ranks)
    if ranks.row_size == 1:
        return batch
    received = [batch.sizes[rank][ranks.row_rank] for rank in ranks.row]
    by_owner_B = owners_of(expert_B, n_experts, ranks).argsort(stable=True)
    return replace(batch, x_BD=ranks.exchange(x_BD[by_owner_B], batch.sizes[ranks.rank], received, "tokens"))


def owners_of(experts: Tensor, n_experts: int, ranks: Ranks) -> Tensor:
    """Places in a row of the processes that own these experts."""
    return torch.div(experts, n_experts // ranks.row_size, rounding_mode="floor")


def with_facts(x_BD: Tensor, experts_BA: Tensor, n_experts: int, ranks: Ranks) -> RoutedBatch:
    """This process's share of the batch, with the facts of all.

    One all-gather of E + D + 1 numbers. The host waits for the device once, since an all-to-all must know how much to
    receive.
    """
    (B, A), E, P = experts_BA.shape, n_experts, ranks.row_size
    counts_E = (experts_BA.reshape(B * A, 1) == torch.arange(E, device=x_BD.device)).sum(dim=0)
    mean_D, around_mean = _moments(x_BD)
    facts = torch.cat([counts_E.double(), mean_D, around_mean.view(1)])
    facts_WS = ranks.gather(facts, "statistics of the batch")
    counts_WE, means_WD, around_W = facts_WS[:, :E], facts_WS[:, E:-1], facts_WS[:, -1]

    sizes = counts_WE.view(ranks.size, P, E // P).sum(dim=2).long().tolist()  # from whom, to which place in a row
    n_W = counts_WE.sum(dim=1) / A
    n = n_W.sum()
    mean_D = n_W @ means_WD / n
    variance = (around_W.sum() + n_W @ (means_WD - mean_D).square().sum(dim=1)) / n
    dtype = torch.promote_types(x_BD.dtype, torch.float32)
    load_E = counts_WE.sum(dim=0) / (A * n)
    n_tokens = sum(map(sum, sizes)) // A
    return RoutedBatch(x_BD, n_tokens, load_E.to(dtype), mean_D.to(dtype), variance.to(dtype), sizes)


def _moments(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and summed squared distance from it, as float64."""
    x_BD = x_BD.to(torch.promote_types(x_BD.dtype, torch.float32))
    mean_D = x_BD.mean(dim=0)
    return mean_D.double(), (x_BD - mean_D).square().sum().double()
