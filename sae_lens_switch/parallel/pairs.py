"""Tokens sent to the processes of all their experts: what goes out, and what comes home.

A token and one of its experts are a pair. Pairs go to the process that owns the expert, which knows nothing else of the
token; what its latents find, and reconstruct, comes home, where gate, loss and gradient are.

Letters beside the package's: n tokens at home here, A active experts of each; R pairs received, C candidates of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from sae_lens_switch.parallel.exchange import RoutedBatch, owners_of
from sae_lens_switch.parallel.ranks import Ranks


@dataclass(frozen=True)
class SentPairs:
    """Where the pairs of a step go, and which have arrived.

    Attributes:
        ranks: The processes.
        order: The home pairs, [n * A], in the order in which they are sent.
        sent: How many of them to each process of the row.
        received: How many from each.
        n_active: A.
    """

    ranks: Ranks
    order: Tensor
    sent: list[int]
    received: list[int]
    n_active: int

    @classmethod
    def of(cls, batch: RoutedBatch, experts_nA: Tensor, n_experts: int, ranks: Ranks) -> Self:
        """Of tokens at home here.

        Args:
            batch: What is known of all tokens.
            experts_nA: The experts of these, among all.
            n_experts: E.
            ranks: Who owns which experts.
        """
        order = owners_of(experts_nA.flatten(), n_experts, ranks).argsort(stable=True)
        return cls(ranks, order, batch.sent, batch.received, experts_nA.shape[1])

    def to_owners(self, t_nAX: Tensor, what: str) -> Tensor:
        """What the homes have for pairs of this process's experts, [R, X], in the order of the whole batch."""
        return self._out(t_nAX.flatten(0, 1)[self.order], what)

    def tokens_to_owners(self, x_nD: Tensor, what: str) -> Tensor:
        """As ``to_owners``, what all pairs of a token have alike."""
        return self._out(x_nD[torch.div(self.order, self.n_active, rounding_mode="floor")], what)

    def _out(self, sent: Tensor, what: str) -> Tensor:
        return sent if self.ranks.row_size == 1 else self.ranks.exchange(sent, self.sent, self.received, what)

    def to_homes(self, t_RX: Tensor, what: str) -> Tensor:
        """What the owners have for pairs of tokens at home here, [n, A, X]."""
        here = t_RX if self.ranks.row_size == 1 else self.ranks.exchange(t_RX, self.received, self.sent, what)
        found = torch.empty_like(here)
        found[self.order] = here
        return found.unflatten(0, (-1, self.n_active))

    @torch.no_grad()
    def choose(self, ranked: Sequence[Tensor], k: Sequence[int], gates_nA: Tensor | None) -> list[Tensor]:
        """Which of this process's candidates are among the best of all of a token's experts, gates included; bool.

        Args:
            ranked: One or more kinds of candidates of the pairs here, each [R, C].
            k: How many of each kind per token.
            gates_nA: Of the tokens at home here.
        """
        widths = [t.shape[1] for t in ranked]
        at_home = self.to_homes(torch.cat([*ranked], dim=1), "candidates").split(widths, dim=2)
        # A gate of 0 would make of -inf what is no number.
        ranked_at_home = [_times(t, gates_nA).masked_fill(t == -torch.inf, -torch.inf) for t in at_home]
        chosen = [among_best(t, n) for t, n in zip(ranked_at_home, k, strict=True)]
        return [*self.to_owners(torch.cat(chosen, dim=2).byte(), "choices").bool().split(widths, dim=1)]

    def sums_at_home(self, parts: Sequence[Tensor], gates: Sequence[Tensor | None]) -> list[Tensor]:
        """Each token's sum of what its experts reconstruct, times their gates; differentiable in both.

        Args:
            parts: One or more reconstructions of the pairs here, each [R, D].
            gates: What each is multiplied by, [n, A].
        """
        parts_nAX: Tensor = _AtHome.apply(torch.cat([*parts], dim=1), self)
        at_home = parts_nAX.split([t.shape[1] for t in parts], dim=2)
        return [_times(t, gates_nA).sum(dim=1) for t, gates_nA in zip(at_home, gates, strict=True)]


def _times(t_nAX: Tensor, gates_nA: Tensor | None) -> Tensor:
    return t_nAX if gates_nA is None else t_nAX * gates_nA.to(t_nAX.dtype).unsqueeze(2)


@torch.no_grad()
def among_best(ranked_nAC: Tensor, k: int) -> Tensor:
    """Which of a token's candidates, of all its experts, are among its k best, bool: exactly k, but none of -inf."""
    flat = ranked_nAC.flatten(1)
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.topk(k, dim=1, sorted=False).indices, value=True)
    return (chosen & (flat != -torch.inf)).view(ranked_nAC.shape)


class _AtHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts_RD: Tensor, pairs: SentPairs) -> Tensor:
        ctx.pairs = pairs
        return pairs.to_homes(parts_RD, "parts of the reconstruction")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_nAD,) = grads
        return ctx.pairs.to_owners(grad_nAD, "the gradient of the reconstruction"), None
