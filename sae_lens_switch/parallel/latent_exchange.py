"""What processes tell each other in a step whose latents are divided over them.

Every token has a home: the process whose batch it is from. All of a row see the token, and send home what their best
latents are ranked by; the home finds the border of the k best, and sends it back. All send home what their chosen
latents reconstruct; the home knows the error, and sends its gradient to all. Nothing grows with the width of the
dictionary, and no process does for a token what another does too.

Letters beside the package's: n tokens at home here, of the row's B; C candidates per token and process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from sae_lens_switch.parallel.ranks import Ranks


@dataclass(frozen=True)
class RowBatch:
    """The tokens of a row of processes, in the order of these.

    Attributes:
        ranks: The processes.
        n_tokens: Tokens of all rows.
        sizes: Tokens at home at each process of the row.
        n_dead: Dead latents of each process of the row, by level (Matryoshka SAEs); none without AuxK.
    """

    ranks: Ranks
    n_tokens: int
    sizes: list[int]
    n_dead: list[Sequence[int]]

    @classmethod
    def of(cls, n_tokens: int, n_dead: Sequence[int], ranks: Ranks) -> Self:
        """From each process's own numbers, which the hosts exchange."""
        everybodys = ranks.gather_objects((n_tokens, n_dead))
        sizes, dead = zip(*(everybodys[rank] for rank in ranks.row), strict=True)
        return cls(ranks, sum(n for n, _ in everybodys), [*sizes], [*dead])

    @property
    def n_dead_L(self) -> list[int]:
        """Dead latents of the row, by level."""
        return [sum(of_level) for of_level in zip(*self.n_dead, strict=True)]

    @classmethod
    def of_parts(cls, parts: Sequence[Self]) -> Self:
        """The batch whose parts these are."""
        sizes = [sum(of_place) for of_place in zip(*(part.sizes for part in parts), strict=True)]
        return cls(parts[0].ranks, sum(part.n_tokens for part in parts), sizes, parts[0].n_dead)

    def choose_of_batch(self, ranked_C: Tensor, k: int) -> Tensor:
        """Which of this process's candidates are among the k best of all rows' tokens, as ``choose`` for one token.

        Everybody's candidates, at most k of each, go to everybody.
        """
        mine = torch.nn.functional.pad(ranked_C, (0, k - len(ranked_C)), value=-torch.inf)
        of_all = border(self.ranks.gather(mine, "candidates").unsqueeze(1), k)
        return is_within(ranked_C.unsqueeze(0), of_all[self.ranks.rank])[0]

    @property
    def n_home(self) -> int:
        return self.sizes[self.ranks.row_rank]

    def to_all(self, t_nX: Tensor, what: str) -> Tensor:
        """Everybody's rows of their tokens, [B, X]."""
        most = max(self.sizes)
        if len(t_nX) < most:
            t_nX = torch.cat([t_nX, t_nX.new_zeros(most - len(t_nX), t_nX.shape[1])])
        everybodys = self.ranks.gather_row(t_nX, what)
        if min(self.sizes) == most:
            return everybodys.flatten(0, 1)
        return torch.cat([t[:n] for t, n in zip(everybodys, self.sizes, strict=True)])

    def to_homes(self, t_BX: Tensor, what: str) -> Tensor:
        """What every process has of the tokens at home here, [P, n, X]."""
        P, n = len(self.sizes), self.n_home
        if P == 1:
            return t_BX.unsqueeze(0)
        return self.ranks.exchange(t_BX, self.sizes, [n] * P, what).unflatten(0, (P, n))

    def from_homes(self, t_PnX: Tensor, what: str) -> Tensor:
        """What the homes have for this process, [B, X]; ``t_PnX`` is what this home has for each."""
        P, n = len(self.sizes), self.n_home
        return t_PnX[0] if P == 1 else self.ranks.exchange(t_PnX.flatten(0, 1), [n] * P, self.sizes, what)

    @torch.no_grad()
    def choose(self, ranked: Sequence[Tensor], k: Sequence[int]) -> list[Tensor]:
        """Which of this process's candidates are among the best of all processes, bool.

        Exactly k per token are. Of equal ones those of the lower process are first, as their latents are; within a
        process, where ``topk`` leaves the order open, those that are found first.

        Args:
            ranked: One or more kinds of candidates, each [B, C]; C is the same on all processes.
            k: How many of each kind per token; at most those of all processes.
        """
        at_home = self.to_homes(torch.cat([*ranked], dim=1), "candidates").split([t.shape[1] for t in ranked], dim=2)
        borders = torch.cat([border(t_PnC, n) for t_PnC, n in zip(at_home, k, strict=True)], dim=2)
        here = self.from_homes(borders, "borders").split(2, dim=1)
        return [is_within(t_BC, border_B2) for t_BC, border_B2 in zip(ranked, here, strict=True)]

    def summed(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of each of these, [B, X], the sum over everybody's, of the tokens at home here, [n, X]; differentiable."""
        total_nX: Tensor = _SummedAtHome.apply(torch.cat([*parts], dim=1), self)
        return total_nX.split([t.shape[1] for t in parts], dim=1)


def border(ranked_PnC: Tensor, k: int) -> Tensor:
    """Per process and token, the least number that is chosen, and how many equal to it are, [P, n, 2]."""
    least_n = ranked_PnC.transpose(0, 1).flatten(1).topk(k, dim=1, sorted=False).values.amin(dim=1)
    above_Pn = (ranked_PnC > least_n.unsqueeze(1)).sum(dim=2)
    equal_Pn = (ranked_PnC == least_n.unsqueeze(1)).sum(dim=2)
    before_Pn = equal_Pn.cumsum(dim=0) - equal_Pn
    taken_Pn = (k - above_Pn.sum(dim=0) - before_Pn).clamp_min(0).minimum(equal_Pn)
    return torch.stack([least_n.expand(len(ranked_PnC), -1), taken_Pn.to(least_n.dtype)], dim=2)


def is_within(ranked_BC: Tensor, border_B2: Tensor) -> Tensor:
    least_B1, taken_B1 = border_B2.split(1, dim=1)
    is_equal = ranked_BC == least_B1
    return (ranked_BC > least_B1) | (is_equal & (is_equal.cumsum(dim=1) <= taken_B1))


class _SummedAtHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part_BX: Tensor, batch: RowBatch) -> Tensor:
        ctx.batch = batch
        return batch.to_homes(part_BX, "parts of the reconstruction").sum(dim=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_nX,) = grads
        return ctx.batch.to_all(grad_nX, "the gradient of the reconstruction"), None
