"""Tokens sent to the processes that own their experts, with what a step must know of the batch as a whole.

Letter beside the package's: A active experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from sae_lens_switch.parallel.ranks import Ranks


@dataclass(frozen=True)
class RoutedBatch:
    """The tokens of this process, and facts about all tokens of the step.

    Attributes:
        x_BD: Its share of the batch; or tokens whose expert it owns, in the order of the whole batch. A transcoder's
            rows, which have targets too.
        n_tokens: Tokens of the whole batch.
        load_E: Share of the whole batch's choices that each expert receives.
        mean_D: Mean of what is reconstructed, over the whole batch.
        variance: Mean squared distance from that mean.
        sent: How many of this process's choices fall on each place of its row.
        received: How many choices of each place of the row fall on this process's experts.
    """

    x_BD: Tensor
    n_tokens: int
    load_E: Tensor
    mean_D: Tensor
    variance: Tensor
    sent: list[int]
    received: list[int]

    @classmethod
    def of_parts(cls, parts: Sequence[Self]) -> Self:
        """The batch whose parts these are."""
        if len(parts) == 1:
            return parts[0]
        n = sum(part.n_tokens for part in parts)

        def mean(of_parts: Sequence[Tensor]) -> Tensor:
            weighted = [t * (part.n_tokens / n) for t, part in zip(of_parts, parts, strict=True)]
            return torch.stack(weighted).sum(dim=0)

        mean_D = mean([part.mean_D for part in parts])
        return cls(
            torch.cat([part.x_BD for part in parts]),
            n,
            load_E=mean([part.load_E for part in parts]),
            mean_D=mean_D,
            variance=mean([part.variance + (part.mean_D - mean_D).square().sum() for part in parts]),
            sent=[sum(of_place) for of_place in zip(*(part.sent for part in parts), strict=True)],
            received=[sum(of_place) for of_place in zip(*(part.received for part in parts), strict=True)],
        )


def send_to_owners(x_BD: Tensor, target_BD: Tensor, expert_B: Tensor, n_experts: int, ranks: Ranks) -> RoutedBatch:
    """Send each token to the process that owns its expert.

    Beside facts of the batch one all-to-all of the tokens, whatever the width of the dictionary. The whole batch is
    that of the first rank, followed by that of the second, and so on; tokens arrive in this order.

    Args:
        x_BD: This process's share of the batch.
        target_BD: What is to be reconstructed of it.
        expert_B: The expert of each token.
        n_experts: E.
        ranks: Who owns which experts.
    """
    batch = with_facts(x_BD, target_BD, expert_B.unsqueeze(1), n_experts, ranks)
    if ranks.row_size == 1:
        return batch
    by_owner_B = owners_of(expert_B, n_experts, ranks).argsort(stable=True)
    return replace(batch, x_BD=ranks.exchange(x_BD[by_owner_B], batch.sent, batch.received, "tokens"))


def owners_of(experts: Tensor, n_experts: int, ranks: Ranks) -> Tensor:
    """Places in a row of the processes that own these experts."""
    return torch.div(experts, n_experts // ranks.row_size, rounding_mode="floor")


def with_facts(x_BD: Tensor, target_BD: Tensor, experts_BA: Tensor, n_experts: int, ranks: Ranks) -> RoutedBatch:
    """This process's share of the batch, with the facts of all.

    A sum of E + D + 1 numbers over all processes, and one number to each of the row. The host waits for the device
    once, since an all-to-all must know how much to receive.
    """
    (B, A), E, P = experts_BA.shape, n_experts, ranks.row_size
    counts_E = (experts_BA.reshape(B * A, 1) == torch.arange(E, device=x_BD.device)).sum(dim=0)
    sums = [counts_E.double(), target_BD.sum(dim=0, dtype=torch.float64), _squares(target_BD).view(1)]
    total = ranks.sum_(torch.cat(sums), "statistics of the batch")
    sent_P = counts_E.view(P, E // P).sum(dim=1)
    received_P = ranks.exchange(sent_P, [1] * P, [1] * P, "statistics of the batch") if P > 1 else sent_P

    all_counts_E, sum_D, squares = total.split([E, target_BD.shape[1], 1])
    n_choices = all_counts_E.sum()
    n = n_choices / A
    mean_D = sum_D / n
    variance = (squares.squeeze(0) / n - mean_D.square().sum()).clamp_min(0)
    dtype = torch.promote_types(target_BD.dtype, torch.float32)
    facts = (all_counts_E / n_choices).to(dtype), mean_D.to(dtype), variance.to(dtype)
    *sizes, n_all = torch.cat([sent_P, received_P, n_choices.long().view(1)]).tolist()
    return RoutedBatch(x_BD, n_all // A, *facts, sent=sizes[:P], received=sizes[P:])


def _squares(x_BD: Tensor) -> Tensor:
    """Sum of all squares; in float64, of which the mean's can be subtracted."""
    return torch.linalg.vector_norm(x_BD, dtype=torch.float64).square()
