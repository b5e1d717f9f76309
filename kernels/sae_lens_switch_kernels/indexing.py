"""The tokens of each latent and the tokens of each expert: indices that a step builds once and reads many times."""

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
        return segment_sums(values_S, self.starts_F1)


def segment_sums(values_S: Tensor, starts_F1: Tensor) -> Tensor:
    """The sum of each segment, in the order of its values and added in float32 at least."""
    wide_S = values_S.to(torch.promote_types(values_S.dtype, torch.float32))  # torch would add in their own dtype
    return torch.segment_reduce(wide_S, "sum", offsets=starts_F1, initial=0, unsafe=True).to(values_S.dtype)


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


class CodeRows(NamedTuple):
    """The rows of codes whose number varies by row, as in a CSR matrix. Values and indices are then [S].

    A token has one row, or one per level (Matryoshka): L rows, one after the other. Q counts all rows.

    Attributes:
        offsets_Q1: [Q + 1]; row q owns codes offsets_Q1[q] to offsets_Q1[q + 1].
        row_S: The row of each code.
        n_levels: L.
    """

    offsets_Q1: Tensor
    row_S: Tensor
    n_levels: int

    @property
    def offsets_B1(self) -> Tensor:
        """Where each token's codes begin."""
        return self.offsets_Q1[:: self.n_levels].contiguous()

    @property
    def token_S(self) -> Tensor:
        """The token of each code."""
        return self.row_S if self.n_levels == 1 else torch.div(self.row_S, self.n_levels, rounding_mode="floor")


def n_rows(indices_BK: Tensor, offsets_B1: Tensor | None) -> int:
    """Of codes [B, K], or [S] with offsets."""
    return indices_BK.shape[0] if offsets_B1 is None else offsets_B1.shape[0] - 1


def code_rows(offsets_Q1: Tensor, n_codes: int, n_levels: int = 1) -> CodeRows:
    """Waits for nothing: the number of codes is known."""
    rows_Q = torch.arange(len(offsets_Q1) - 1, device=offsets_Q1.device)
    row_S = torch.repeat_interleave(rows_Q, offsets_Q1.diff(), output_size=n_codes)
    return CodeRows(offsets_Q1, row_S, n_levels)


def level_offsets(offsets_B1: Tensor, positions_S: Tensor, ends_L: Tensor, width: int) -> Tensor:
    """Where the codes of each token and level begin, [B * L + 1].

    Args:
        offsets_B1: Where each token's codes begin; within a token, positions ascend.
        positions_S: The place of each latent among the M of its expert.
        ends_L: The position at which each level ends, ascending to M.
        width: M.
    """
    row_S = code_rows(offsets_B1, len(positions_S)).row_S
    first_B = torch.arange(len(offsets_B1) - 1, device=offsets_B1.device) * width
    ends_Q = (first_B.unsqueeze(1) + ends_L).flatten()
    ends_Q = torch.searchsorted(row_S * width + positions_S, ends_Q)
    return torch.nn.functional.pad(ends_Q, (1, 0))


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


class ExpertBlocks(NamedTuple):
    """Which latents belong to which expert: the first ``n_shared`` to none, then equally many to each.

    Attributes:
        n_latents: F.
        n_experts: E.
        n_shared: Latents that every token may choose, with a gate of 1.
    """

    n_latents: int
    n_experts: int
    n_shared: int = 0

    @property
    def width(self) -> int:
        """M, the latents of one expert."""
        return (self.n_latents - self.n_shared) // self.n_experts

    def expert_of(self, latents: Tensor) -> Tensor:
        """The expert of each latent; negative for a shared one."""
        latents = latents - self.n_shared if self.n_shared else latents
        return torch.div(latents, self.width, rounding_mode="floor")

    def positions_of(self, latents: Tensor) -> Tensor:
        """The place of each latent among those of its expert, from 0; 0 for a shared one."""
        if self.n_experts == 1 and not self.n_shared:
            return latents
        positions = torch.remainder(latents - self.n_shared, self.width)
        return positions.masked_fill(latents < self.n_shared, 0) if self.n_shared else positions


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

    def owners(self, n_tokens: int) -> Tensor:
        """[B], the expert that owns each sorted row."""
        E1 = self.offsets_E1
        rows_B = torch.arange(n_tokens, device=E1.device, dtype=E1.dtype)
        return torch.searchsorted(E1, rows_B, right=True) - 1

    def first_latents(self, n_tokens: int, n_latents: int) -> Tensor:
        """[B, 1], the first latent of the expert that owns each sorted row."""
        return (self.owners(n_tokens) * (n_latents // (len(self.offsets_E1) - 1))).unsqueeze(1)


def by_level(
    values_S: Tensor, indices_S: Tensor, offsets_B1: Tensor, blocks: ExpertBlocks, ends_L: Tensor, is_ordered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of which each token's are those of one level after another, and where each level's begin, [B * L + 1].

    A latent is of the level that its position inside its expert lies in, a shared one of the first.

    Args:
        values_S: Values.
        indices_S: The latents.
        offsets_B1: Where each token's codes begin.
        blocks: Which latents belong to which expert.
        ends_L: The position at which each level ends, ascending to M.
        is_ordered: Whether positions ascend within a token already.
    """
    positions_S = blocks.positions_of(indices_S)
    if not is_ordered:
        order_S = (code_rows(offsets_B1, len(indices_S)).row_S * blocks.width + positions_S).argsort(stable=True)
        values_S, indices_S, positions_S = values_S[order_S], indices_S[order_S], positions_S[order_S]
    return values_S, indices_S, level_offsets(offsets_B1, positions_S, ends_L, blocks.width)


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
