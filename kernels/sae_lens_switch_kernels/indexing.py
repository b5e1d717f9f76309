"""Who belongs to whom: the tokens of each latent, the tokens of each expert. Built once a step, read many times."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class LatentIndex(NamedTuple):
    """The transpose of indices_BK, as in a CSR matrix.

    order_N:   [B * K], positions in the flattened indices_BK sorted by latent; position // K is the token.
               Positions of one latent ascend, so a sum over them has one fixed order.
    starts_F1: [F + 1]; latent f owns order_N[starts_F1[f] : starts_F1[f + 1]]
    """

    order_N: Tensor
    starts_F1: Tensor

    def sums(self, values_N: Tensor) -> Tensor:
        """[F], of values in the order of ``order_N``."""
        return torch.segment_reduce(values_N, "sum", offsets=self.starts_F1, initial=0, unsafe=True)


def latent_index(indices_BK: Tensor, n_latents: int) -> LatentIndex:
    """One stable sort of B * K numbers; no host synchronisation."""
    by_latent, order_N = indices_BK.flatten().sort(stable=True)
    ends = torch.arange(n_latents + 1, device=indices_BK.device, dtype=indices_BK.dtype)
    return LatentIndex(order_N, torch.searchsorted(by_latent, ends))


def active_latent_index(indices_BK: Tensor) -> tuple[Tensor, LatentIndex]:
    """The latents that occur, ascending, and the index over these alone: nothing is as long as the dictionary.

    How many there are is read back from the device.
    """
    by_latent, order_N = indices_BK.flatten().sort(stable=True)
    rows_R, counts_R = by_latent.unique_consecutive(return_counts=True)
    return rows_R, LatentIndex(order_N, torch.nn.functional.pad(counts_R.cumsum(0), (1, 0)))


@dataclass
class RowGrads:
    """What the backward pass that it was given to leaves for an optimiser.

    active_only: weight gradients are left here, of the step's active latents alone. False: they go where autograd puts
               them, as ever, and only along_R is left here, of all latents
    rows_R:    the active latents, ascending, each once; None until a backward pass has run
    dW_enc_RD, dW_dec_RD, d_bias_R: their rows of the gradients; those of all other latents are zero
    along_R:   <dW_dec[r], W_dec[r]>, which a constrained decoder's gradient must lose, and which costs nothing where
               the gradients are made; None where that is done in less than float32
    """

    active_only: bool = True
    rows_R: Tensor | None = None
    dW_enc_RD: Tensor | None = None
    dW_dec_RD: Tensor | None = None
    d_bias_R: Tensor | None = None
    along_R: Tensor | None = None

    def clear(self) -> None:
        self.rows_R = self.dW_enc_RD = self.dW_dec_RD = self.d_bias_R = self.along_R = None

    def plus(self, other: "RowGrads") -> "RowGrads":
        """The sum with what another backward pass has left, over the latents active in either."""
        if self.rows_R is None or other.rows_R is None:  # gradients as autograd has them: all of one length, or none
            mine, others = self.along_R, other.along_R
            return RowGrads(self.active_only, along_R=None if mine is None or others is None else mine + others)
        rows_R = torch.cat([self.rows_R, other.rows_R]).unique()
        places = [torch.searchsorted(rows_R, rows) for rows in (self.rows_R, other.rows_R)]

        def total(name: str) -> Tensor | None:
            parts = getattr(self, name), getattr(other, name)
            if parts[0] is None or parts[1] is None:
                return None
            total_R = parts[0].new_zeros(len(rows_R), *parts[0].shape[1:])
            for place, part in zip(places, parts, strict=True):
                total_R[place] += part  # each row once: a sum of fixed order
            return total_R

        return RowGrads(self.active_only, rows_R, *map(total, ("dW_enc_RD", "dW_dec_RD", "d_bias_R", "along_R")))


class LatentGrads(NamedTuple):
    """What one walk of a LatentIndex gives.

    dW_dec_FD:  sum over the latent's (b, j) of values[b, j] g[b]
    dW_enc_FD:  sum of d_pre[b, j] x[b], or None if not asked for
    d_b_enc_F:  sum of d_pre[b, j], or None likewise
    fired_F:    int32, how many of its values are positive
    """

    dW_dec_FD: Tensor
    dW_enc_FD: Tensor | None
    d_b_enc_F: Tensor | None
    fired_F: Tensor


class ExpertGroups(NamedTuple):
    """Tokens sorted by expert, in their own order within an expert.

    order_B:    [B], the token in each row of the sorted batch; None if the rows are sorted as they are
    offsets_E1: [E + 1]; expert e owns the sorted rows offsets_E1[e] to offsets_E1[e + 1]
    """

    order_B: Tensor | None
    offsets_E1: Tensor

    def sorted(self, t: Tensor) -> Tensor:
        return t if self.order_B is None else t.index_select(0, self.order_B)

    def unsorted(self, t: Tensor) -> Tensor:
        return t if self.order_B is None else torch.empty_like(t).index_copy_(0, self.order_B, t)


def expert_groups(expert_B: Tensor, n_experts: int) -> ExpertGroups:
    by_expert, order_B = expert_B.sort(stable=True)
    ends = torch.arange(n_experts + 1, device=expert_B.device, dtype=expert_B.dtype)
    return ExpertGroups(order_B, torch.searchsorted(by_expert, ends))


def one_group(n_tokens: int, device: torch.device) -> ExpertGroups:
    """All tokens belong to one expert."""
    # Made on the device: a copy of numbers from the host would wait for it.
    return ExpertGroups(None, torch.arange(2, device=device) * n_tokens)
