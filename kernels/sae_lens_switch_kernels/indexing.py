"""The tokens of each latent and the tokens of each expert: indices that a step builds once and reads many times."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class LatentIndex(NamedTuple):
    """The transpose of indices_BK, as in a CSR matrix.

    Attributes:
        order_S: [B * K], positions in the flattened indices_BK sorted by latent; position // K is the token. Positions
            of one latent ascend, so a sum over them has one fixed order.
        starts_F1: [F + 1]; latent f owns order_S[starts_F1[f] : starts_F1[f + 1]].
    """

    order_S: Tensor
    starts_F1: Tensor

    def sums(self, values_S: Tensor) -> Tensor:
        """The sum of each latent's values, [F]; values are in the order of ``order_S``."""
        return torch.segment_reduce(values_S, "sum", offsets=self.starts_F1, initial=0, unsafe=True)


def latent_index(indices_BK: Tensor, n_latents: int) -> LatentIndex:
    """The index over all latents: one stable sort of B * K numbers, no host synchronisation."""
    by_latent_S, order_S = indices_BK.flatten().sort(stable=True)
    ends = torch.arange(n_latents + 1, device=indices_BK.device, dtype=indices_BK.dtype)
    return LatentIndex(order_S, torch.searchsorted(by_latent_S, ends))


def active_latent_index(indices_BK: Tensor) -> tuple[Tensor, LatentIndex]:
    """The active latents in ascending order and the index over these alone, so that nothing has F entries.

    Synchronises with the device, to learn how many there are.
    """
    by_latent_S, order_S = indices_BK.flatten().sort(stable=True)
    rows_R, counts_R = by_latent_S.unique_consecutive(return_counts=True)
    return rows_R, LatentIndex(order_S, torch.nn.functional.pad(counts_R.cumsum(0), (1, 0)))


@dataclass
class RowGrads:
    """Where the backward pass of ``sparse_autoencode`` leaves gradients for an optimiser.

    Attributes:
        active_only: True: the weight gradients of the active latents are left here, and autograd gets none. False:
            autograd gets all gradients as usual, and only ``radial_R`` is left here, with all F rows.
        rows_R: The active latents, ascending and distinct; None until a backward pass has run.
        dW_enc_RD: Their rows of the encoder's gradient. Those of all other latents are zero.
        dW_dec_RD: Their rows of the decoder's gradient, likewise.
        d_bias_R: Their entries of the encoder bias's gradient, likewise.
        radial_R: <dW_dec[r], W_dec[r]>, the radial component that a unit-norm decoder's gradient must lose. It is a
            by-product of the gradient; None where products run in less than float32.
    """

    active_only: bool = True
    rows_R: Tensor | None = None
    dW_enc_RD: Tensor | None = None
    dW_dec_RD: Tensor | None = None
    d_bias_R: Tensor | None = None
    radial_R: Tensor | None = None

    def clear(self) -> None:
        self.rows_R = self.dW_enc_RD = self.dW_dec_RD = self.d_bias_R = self.radial_R = None

    def store(
        self, rows_R: Tensor | None, dW_enc_RD: Tensor, dW_dec_RD: Tensor, d_bias_R: Tensor, radial_R: Tensor | None
    ) -> None:
        """Keep what ``active_only`` asks for.

        Raises:
            RuntimeError: If an earlier backward pass is still held.
        """
        if self.rows_R is not None or self.radial_R is not None:
            raise RuntimeError("row_grads still holds an earlier backward pass: take a step, or clear() it")
        self.radial_R = radial_R
        if self.active_only:
            self.rows_R, self.dW_enc_RD, self.dW_dec_RD, self.d_bias_R = rows_R, dW_enc_RD, dW_dec_RD, d_bias_R

    def plus(self, other: "RowGrads") -> "RowGrads":
        """The sum of two backward passes, over the latents active in either."""
        if self.rows_R is None or other.rows_R is None:  # active_only=False: radial_R has F rows, or there is none
            mine, others = self.radial_R, other.radial_R
            return RowGrads(self.active_only, radial_R=None if mine is None or others is None else mine + others)
        rows_R = torch.cat([self.rows_R, other.rows_R]).unique()
        places = [torch.searchsorted(rows_R, rows) for rows in (self.rows_R, other.rows_R)]

        def total(mine: Tensor | None, others: Tensor | None) -> Tensor | None:
            if mine is None or others is None:
                return None
            total_R = mine.new_zeros(len(rows_R), *mine.shape[1:])
            for place, part in zip(places, (mine, others), strict=True):
                total_R[place] += part  # each row once: a sum of fixed order
            return total_R

        return RowGrads(self.active_only, rows_R, *map(total, self._per_row(), other._per_row()))

    def _per_row(self) -> tuple[Tensor | None, ...]:
        return self.dW_enc_RD, self.dW_dec_RD, self.d_bias_R, self.radial_R


class LatentGrads(NamedTuple):
    """Sums over the entries (b, j) of each latent, from one walk of a LatentIndex.

    Attributes:
        dW_dec_FD: Sum of values[b, j] g[b].
        dW_enc_FD: Sum of d_pre[b, j] x[b]; None if not requested.
        d_b_enc_F: Sum of d_pre[b, j]; None likewise.
    """

    dW_dec_FD: Tensor
    dW_enc_FD: Tensor | None
    d_b_enc_F: Tensor | None


class ExpertGroups(NamedTuple):
    """Tokens sorted by expert, in their original order within an expert.

    Attributes:
        order_B: [B], the token in each row of the sorted batch; None if the batch is sorted already.
        offsets_E1: [E + 1]; expert e owns the sorted rows offsets_E1[e] to offsets_E1[e + 1].
    """

    order_B: Tensor | None
    offsets_E1: Tensor

    def sorted(self, t: Tensor) -> Tensor:
        return t if self.order_B is None else t.index_select(0, self.order_B)

    def unsorted(self, t: Tensor) -> Tensor:
        return t if self.order_B is None else torch.empty_like(t).index_copy_(0, self.order_B, t)

    def first_latents(self, n_tokens: int, n_latents: int) -> Tensor:
        """[B, 1], the first latent of the expert that owns each sorted row."""
        E1 = self.offsets_E1
        rows_B = torch.arange(n_tokens, device=E1.device, dtype=E1.dtype)
        expert_B = torch.searchsorted(E1, rows_B, right=True) - 1
        return (expert_B * (n_latents // (len(E1) - 1))).unsqueeze(1)


def expert_groups(expert_B: Tensor, n_experts: int) -> ExpertGroups:
    by_expert, order_B = expert_B.sort(stable=True)
    ends = torch.arange(n_experts + 1, device=expert_B.device, dtype=expert_B.dtype)
    return ExpertGroups(order_B, torch.searchsorted(by_expert, ends))


def one_group(n_tokens: int, device: torch.device) -> ExpertGroups:
    """All tokens belong to one expert."""
    # Computed on the device: a copy from the host would synchronise.
    if n_tokens == 0:
        return ExpertGroups(None, torch.zeros(2, dtype=torch.long, device=device))
    return ExpertGroups(None, torch.arange(0, 2 * n_tokens, n_tokens, device=device))
